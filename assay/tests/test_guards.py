"""From what is handed in to the judged patch: our own git alone, and guards on exactly the tree that is judged."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from assay.contract.task import Scope
from assay.judgement.guards import Judged, Source, judged
from assay.repository.store import GitError, Store, resolved
from small_project import BASE, FASTER, assay, files, git, project

SCOPE = Scope(files=("pkg/**",))


class Case:
    """A store with base in it."""

    def __init__(self, folder: Path) -> None:
        project(folder)
        self.repository, self.base = folder / "repo", folder / "base"
        self.store = Store(folder / "store", self.repository)
        self.tree = self.store.tree_of(resolved(self.repository, "HEAD"))
        self.store.write(self.tree, self.base)
        self.candidate = folder / "candidate"
        shutil.copytree(self.repository, self.candidate, symlinks=True)

    def judged(self, scope: Scope = SCOPE, kind: str = "tree", value: str = "") -> Judged:
        source = Source(kind, value or str(self.candidate))  # type: ignore[arg-type]
        return judged(self.store, self.tree, self.base, scope, source, self.repository)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def test_the_same_patch_from_a_tree_a_commit_and_a_file(case: Case, tmp_path: Path) -> None:
    files(case.candidate, {"pkg/__init__.py": FASTER, "pkg/more.py": "x = 1\n"})
    (case.candidate / "pkg/__pycache__").mkdir()
    (case.candidate / "pkg/__pycache__/x.pyc").write_bytes(b"\0")
    tree = case.judged()
    assert (tree.outcome, tree.changed) == ("", ("pkg/__init__.py", "pkg/more.py")) and tree.words == ()
    git(case.candidate, "add", "pkg/__init__.py", "pkg/more.py")
    git(case.candidate, "commit", "-m", "faster")
    git(case.repository, "fetch", "--quiet", str(case.candidate), "HEAD:refs/heads/faster")
    assert case.judged(kind="commit", value="faster") == tree
    patch = subprocess.run(["git", "-C", case.candidate, "diff", "HEAD~1"], check=True, capture_output=True).stdout
    (tmp_path / "p.diff").write_bytes(patch)
    assert case.judged(kind="patch", value=str(tmp_path / "p.diff")) == tree
    case.store.write(tree.tree, tmp_path / "again")
    assert (tmp_path / "again/pkg/__init__.py").read_text() == FASTER
    assert case.store.take(tmp_path / "again").tree == tree.tree


def _link(folder: Path) -> None:
    (folder / "pkg/link").symlink_to("/etc/passwd")


def _folder_link(folder: Path) -> None:
    shutil.rmtree(folder / "pkg")
    (folder / "pkg").symlink_to("tests", target_is_directory=True)


def _submodule(folder: Path) -> None:
    git(folder, "init", "--quiet", "pkg/sub")
    git(folder / "pkg/sub", "commit", "--allow-empty", "-m", "x")
    git(folder, "add", "pkg/sub")
    git(folder, "commit", "-m", "sub")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: files(folder, {"other.py": "x = 1\n"}), "other.py: outside the task's scope"),
        (lambda folder: (folder / "README.md").unlink(), "README.md: outside the task's scope"),
        (_link, "pkg/link: a symbolic link"),
        (_folder_link, "pkg/__init__.py: outside"),
        (lambda folder: (folder / "pkg/__init__.py").chmod(0o755), "pkg/__init__.py: its mode became 100755"),
        (lambda folder: (folder / "pkg/lib.so").write_bytes(b"\x7fELF\0"), "pkg/lib.so: a binary file"),
        (lambda folder: files(folder, {"pkg/a\nb.py": ""}), "a name that cannot be printed"),
        (lambda folder: os.mkfifo(folder / "pkg/pipe"), "pkg/pipe: expected a file"),
        (lambda folder: files(folder, {"pkg/big.py": "x = 1\n" * 300000}), "expected a patch of at most 1048576 bytes"),
        (lambda folder: files(folder, {f"pkg/{i}.py": "" for i in range(101)}), "expected at most 100 changed files"),
    ],
)
def test_what_is_out_of_scope(change: object, words: str, case: Case) -> None:
    change(case.candidate)  # type: ignore[operator]
    found = case.judged()
    if words.startswith("pkg/__init__.py: outside"):  # the folder became a link, which lies outside pkg/**
        words = "pkg: outside the task's scope"
    assert found.outcome == "out_of_scope" and any(words in one for one in found.words), found.words


def test_a_submodule_is_rejected(case: Case) -> None:
    _submodule(case.candidate)
    git(case.repository, "fetch", "--quiet", str(case.candidate), "HEAD:refs/heads/sub")
    assert "pkg/sub: a submodule" in case.judged(kind="commit", value="sub").words


def test_what_the_scope_admits(case: Case) -> None:
    (case.candidate / "pkg/lib.so").write_bytes(b"\0")
    (case.candidate / "pkg/__init__.py").chmod(0o755)
    found = case.judged(Scope(files=("pkg/**",), binary=("pkg/*.so",), modes=True))
    assert found.outcome == "" and found.changed == ("pkg/__init__.py", "pkg/lib.so")


def test_tests_and_build_files_are_put_back_and_an_agents_own_patch_is_left(case: Case) -> None:
    mine = {"tests/test_work.py": "def test_work(): pass\n", "conftest.py": "", "setup.py": "1 / 0\n"}
    files(case.candidate, {**mine, "model_patch.diff": "+lies\n", "a/.bench_scratch/x.py": "", "pkg/a.py": ""})
    found = case.judged()
    assert found.outcome == "" and found.changed == ("pkg/a.py",)
    assert found.restored == ("conftest.py", "setup.py", "tests/test_work.py")
    assert found.left == ("a/.bench_scratch/x.py", "model_patch.diff")
    for scope in (("pkg/**", "tests/**"), ("**",), ("**/*.py",)):  # wherever they lie, and however wide the scope is
        inside = case.judged(Scope(files=scope))
        assert inside.changed[-1] == "pkg/a.py" and set(inside.restored) == {*mine}, scope
    inside = case.judged(Scope(files=("pkg/**",), checks=("tests/**", "setup.py")))
    assert inside.changed == ("pkg/a.py", "setup.py", "tests/test_work.py") and inside.restored == ("conftest.py",)


@pytest.mark.parametrize("name", ["sitecustomize.py", "pkg/usercustomize.py"])
def test_modules_that_python_imports_by_itself(name: str, case: Case) -> None:
    files(case.candidate, {name: "x = 1\n"})
    found = case.judged(Scope(files=("**",)))
    assert (found.outcome, found.words) == ("out_of_scope", (f"{name}: a module that Python imports by itself",))
    assert case.judged(Scope(files=("**",), checks=(name,))).changed == (name,)


def test_files_that_base_ignores_are_seen_and_only_bases_rules_count(case: Case, tmp_path: Path) -> None:
    files(case.repository, {".gitignore": "*.tmp\n"})
    git(case.repository, "add", "--all")
    git(case.repository, "commit", "-m", "ignore")
    tree = case.store.tree_of(resolved(case.repository, "HEAD"))
    case.store.write(tree, tmp_path / "new")
    files(case.candidate, {".gitignore": "pkg/hidden.py\n", "pkg/x.tmp": "a\n", "pkg/hidden.py": "b\n"})
    (case.candidate / ".git/info").mkdir(exist_ok=True)
    (case.candidate / ".git/info/exclude").write_text("*\n")
    source = Source("tree", str(case.candidate))
    found = judged(case.store, tree, tmp_path / "new", SCOPE, source, case.repository)
    assert found.words == ("pkg/x.tmp: a file that base's ignore rules leave out",)
    assert found.restored == (".gitignore",) and "pkg/hidden.py" in found.changed


def test_nothing_to_judge(case: Case, tmp_path: Path) -> None:
    assert (case.judged().outcome, case.judged().patch) == ("no_patch", b"")
    for text, words in (("nonsense\n", "does not apply"), ("", "is empty"), (_NOT_THERE, "does not apply")):
        (tmp_path / "p.diff").write_text(text)
        found = case.judged(kind="patch", value=str(tmp_path / "p.diff"))
        assert found.outcome == "no_patch" and words in found.words[0]
    with pytest.raises(GitError, match="expected a commit of"):
        case.judged(kind="commit", value="nowhere")
    for kind in ("patch", "tree"):
        with pytest.raises(ValueError, match=f"--{kind}: expected a"):
            case.judged(kind=kind, value=str(tmp_path / "nothing"))


_NOT_THERE = """diff --git a/pkg/__init__.py b/pkg/__init__.py
--- a/pkg/__init__.py
+++ b/pkg/__init__.py
@@ -1 +1 @@
-nothing like it
+new
"""
_OUTSIDE = """diff --git a/../escaped b/../escaped
new file mode 100644
--- /dev/null
+++ b/../escaped
@@ -0,0 +1 @@
+x
"""


def test_a_patch_cannot_leave_the_tree(case: Case, tmp_path: Path) -> None:
    (tmp_path / "p.diff").write_text(_OUTSIDE)
    assert case.judged(kind="patch", value=str(tmp_path / "p.diff")).outcome == "no_patch"
    assert not (tmp_path / "escaped").exists()


def test_nothing_that_a_candidates_git_names_is_run(case: Case, tmp_path: Path) -> None:
    """The control: git in the candidate's own folder does run it, and does not see the change."""
    marker = tmp_path / "ran"
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {marker}\ncat\n")
    program.chmod(0o755)
    files(case.candidate, {".gitattributes": "*.py filter=f diff=d\n", "pkg/__init__.py": FASTER})
    for name in ("core.fsmonitor", "filter.f.clean", "filter.f.smudge", "diff.d.textconv", "diff.external"):
        git(case.candidate, "config", name, str(program))
    assert case.judged().changed == ("pkg/__init__.py",) and not marker.exists()
    git(case.candidate, "diff")
    assert marker.exists()
    git(case.candidate, "config", "--unset", "core.fsmonitor")
    git(case.candidate, "config", "--unset", "filter.f.clean")
    git(case.candidate, "update-index", "--assume-unchanged", "pkg/__init__.py")
    assert "pkg/__init__.py" not in git(case.candidate, "status", "--porcelain")
    assert case.judged().changed == ("pkg/__init__.py",)


def committed(case: Case, contents: dict[str, str]) -> None:
    """More files in base, which the candidate has, too."""
    files(case.repository, contents)
    git(case.repository, "add", "--all")
    git(case.repository, "commit", "-m", "more")
    shutil.rmtree(case.candidate)
    shutil.copytree(case.repository, case.candidate, symlinks=True)
    renew(case)


def renew(case: Case) -> None:
    shutil.rmtree(case.base)
    case.tree = case.store.tree_of(resolved(case.repository, "HEAD"))
    case.store.write(case.tree, case.base)


def test_a_working_tree_with_a_store_and_what_base_ignores(case: Case) -> None:
    """`--tree .` in one's own repository: the store, environments and what was built are nobody's change."""
    committed(case, {".gitignore": "/.venv/\n/build/\nkept/*.o\n", "kept/x.py": ""})
    files(case.candidate, {"pkg/__init__.py": FASTER, ".assay/ledger.sqlite": "", ".assay/attempts/x/plan.json": "{}"})
    files(case.candidate, {".venv/bin/python": "", "build/lib/pkg.so": "\0", "mine/attempts/y": ""})
    source = Source("tree", str(case.candidate))
    found = judged(case.store, case.tree, case.base, SCOPE, source, case.repository, case.candidate / "mine")
    assert (found.outcome, found.changed) == ("", ("pkg/__init__.py",)), found.words
    assert set(found.left) == {".venv/", "build/"}
    elsewhere = judged(case.store, case.tree, case.base, SCOPE, source, case.repository)
    assert elsewhere.words == ("mine/attempts/y: outside the task's scope",)  # a store that is not ours is no store


def test_judge_inside_the_repository(tmp_path: Path) -> None:
    """The store lies in the tree that is judged, from the first command on."""
    project(tmp_path)
    files(tmp_path / "repo", {"pkg/__init__.py": BASE.replace(", base=2", "")})
    for number in (1, 2):
        done = assay("judge", "../task.toml", "--tree", ".", "--no-sandbox", cwd=tmp_path / "repo")
        assert done.stdout.startswith("api_break: pkg.work: Parameter was removed"), done.stdout + done.stderr
        assert len(list((tmp_path / "repo/.assay/attempts").iterdir())) == number


def test_an_ignored_folder_that_is_left_is_not_judged(case: Case) -> None:
    """The control: what lies in it would be found by Python, and is in no arm."""
    committed(case, {".gitignore": "/pkg/fast/\n"})
    files(case.candidate, {"pkg/__init__.py": "from pkg.fast import work\n", "pkg/fast/__init__.py": FASTER})
    found = case.judged()
    assert found.left == ("pkg/fast/",) and "pkg/fast/__init__.py" not in case.store.entries(found.tree)


def test_a_submodule_that_is_checked_out(case: Case, tmp_path: Path) -> None:
    git(case.repository, "init", "--quiet", "lib/sub")
    files(case.repository, {"lib/sub/code.py": "x = 1\n"})
    git(case.repository / "lib/sub", "add", "--all")
    git(case.repository / "lib/sub", "commit", "-m", "x")
    committed(case, {})
    assert case.store.entries(case.tree)["lib/sub"].mode == "160000"
    assert case.judged().outcome == "no_patch"
    files(case.candidate, {"pkg/__init__.py": FASTER})
    assert case.judged().changed == ("pkg/__init__.py",)
    shutil.rmtree(case.candidate / "lib/sub")
    files(case.candidate, {"lib/sub": "no folder\n"})
    assert "lib/sub: outside the task's scope" in case.judged().words


def test_a_file_of_git_lfs_that_is_checked_out(case: Case) -> None:
    content = b"\0weights" * 100
    digest = hashlib.sha256(content).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(content)}\n"
    committed(case, {"data/weights.bin": pointer, "data/other.txt": "no pointer\n"})
    (case.candidate / "data/weights.bin").write_bytes(content)
    files(case.candidate, {"pkg/__init__.py": FASTER})
    found = case.judged()
    assert (found.outcome, found.changed) == ("", ("pkg/__init__.py",)), found.words
    (case.candidate / "data/weights.bin").write_bytes(content + b"1")
    assert case.judged().words == ("data/weights.bin: outside the task's scope",)
