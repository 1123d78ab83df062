"""A task from a commit: what the repository and the change say, a driver to fill in, and what nobody could know."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from assay.contract.mined import Part
from assay.mining import functions, history, reverts
from assay.mining.draft import Draft, named
from assay.mining.functions import Function
from assay.mining.history import COMPILED, Commit
from assay.mining.skeleton import skeleton
from assay.repository.lines import Lines

_MOST_TESTS = 5
_BUILDERS = {
    "meson.build": "meson",
    "CMakeLists.txt": "CMake",
    "Cargo.toml": "cargo",
}


@dataclass(frozen=True)
class Touched:
    """A function that a change touches, and where it is."""

    path: str
    function: Function

    @property
    def module(self) -> str:
        """What is imported."""
        return functions.module_of(self.path)


def new(repository: Path, revision: str, folder: Path, *, name: str = "") -> tuple[Draft, Path]:
    """Writes a task for a commit and its first parent into a folder; what it says, and its file.

    ValueError for a commit that changes no source or has no parent, GitError for one that is not there,
    FileExistsError for a folder that holds a task.
    """
    one = history.commit(repository, revision)
    sources = sorted(path for path in one.files if history.is_source(path))
    if not one.parent or not sources:
        lack = "a parent" if not one.parent else "a change of code that is no test, benchmark, build file or document"
        raise ValueError(f"--commit: expected a commit with {lack}, got {one.name[:12]}, {one.subject!r}")
    draft = drafted(repository, one, sources, folder, name or named_after(repository, one.name))
    parts = [Part("subject", 1, 1, "about", one.subject)]
    return draft, draft.write(folder, "commit", f"{one.name} of {repository.name}", parts)


def named_after(repository: Path, revision: str) -> str:
    """A task's name from a repository's and a commit's."""
    return named(f"{repository.resolve().stem}-{history.commit(repository, revision).name[:9]}")


def drafted(repository: Path, one: Commit, sources: list[str], folder: Path, name: str) -> Draft:
    """What a commit says of a task."""
    path = os.path.relpath(repository.resolve(), folder.resolve())
    draft = Draft(name, path, one.parent, one.name, scope=sources)
    draft.about = [f"{one.subject} ({one.name[:12]}, {one.date[:10]}).", "assay task check FILE reads this strictly."]
    draft.unknown += [f"it may be a revert: {sign.words}" for sign in reverts.found(repository, one)]
    changed = history.lines(repository, one.parent, one.name, sources)
    found = list(touched(repository, one, changed))
    there = set(history.paths(repository, one.parent))
    _python(draft, there, sources)
    _compiled(draft, repository, one, there, sources)
    _tests(draft, repository, one, there, found)
    skeleton(draft, [(each.module, each.function) for each in found], lambda module: _init(repository, one, module))
    return draft


def touched(repository: Path, one: Commit, changed: dict[str, Lines]) -> Iterator[Touched]:
    """Functions of base that the change touches, public ones first; those it adds are not there to be compared."""
    found = []
    for path, lines in changed.items():
        if not path.endswith(".py"):
            continue
        before, after = (history.text(repository, name, path) for name in (one.parent, one.name))
        old = {each.name: each for each, _, _ in functions.functions(before)}
        names = [each.name for each in functions.touched(before, (number for number, _ in lines.removed))]
        names += [each.name for each in functions.touched(after, (number for number, _ in lines.added))]
        found += [Touched(path, old[name]) for name in dict.fromkeys(names) if name in old]
    yield from sorted(found, key=lambda each: not each.function.public)


def _init(repository: Path, one: Commit, name: str) -> Function | None:
    """The `__init__` of a class, by `module:Class`."""
    module, _, owner = name.partition(":")
    for path in one.files:
        if path.endswith(".py") and functions.module_of(path) == module:
            for each, _, _ in functions.functions(history.text(repository, one.parent, path)):
                if each.name == f"{owner}.__init__":
                    return each
    return None


def _python(draft: Draft, there: set[str], sources: list[str]) -> None:
    """The packages in which the sources lie, and where they are found."""
    packages = {package for path in sources if (package := _package(path, there))}
    draft.packages = sorted({functions.module_of(f"{package}/__init__.py") for package in packages})
    if any(package.startswith("src/") for package in packages):
        draft.environment["PYTHONPATH"] = "src"
    if not draft.packages:
        draft.unknown.append("api.packages: no package of Python holds what is changed")


def _package(path: str, there: set[str]) -> str:
    """The outermost folder that is a package of Python and holds a file, or the file, if it is a module; else ""."""
    folders = [str(folder) for folder in PurePosixPath(path).parents if f"{folder}/__init__.py" in there]
    if folders:
        return folders[-1]
    return path.removesuffix(".py") if path.endswith(".py") else ""


def _compiled(draft: Draft, repository: Path, one: Commit, there: set[str], sources: list[str]) -> None:
    compiled = [path for path in sources if PurePosixPath(path).suffix.lower() in COMPILED]
    draft.native = [path for path in compiled if path.endswith((".c", ".cc", ".cpp", ".cu", ".h", ".hpp", ".cuh"))]
    if not compiled:
        return
    if re.search(r"ext_modules|Extension\(", history.text(repository, one.parent, "setup.py")):
        draft.build = [["python", "setup.py", "build_ext", "--inplace"]]
        return
    builder = next((words for name, words in _BUILDERS.items() if name in there), "no build file that is known here")
    draft.unknown.append(f"commands.build: {', '.join(compiled)} must be compiled; the repository has {builder}")


def _tests(draft: Draft, repository: Path, one: Commit, there: set[str], found: list[Touched]) -> None:
    """The tests that the commit touches, else those that name what it changes or its file, else all of them."""
    tests = [path for path in one.files if path in there and _is_pytest(path)]
    if not tests:
        names = {each.function.name.rpartition(".")[2] for each in found} - {"__init__"}
        names |= {each.function.owner for each in found} - {""}
        expression = re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(names)))})\b") if names else None
        every = [path for path in sorted(there) if _is_pytest(path)]
        tests = [
            path for path in every if expression and expression.search(history.text(repository, one.parent, path))
        ][:_MOST_TESTS]
    if not tests:
        stems = {f"test_{PurePosixPath(path).stem.strip('_')}.py" for path in draft.scope}
        tests = [path for path in sorted(there) if PurePosixPath(path).name in stems][:_MOST_TESTS]
    if not tests:
        tests = [name for name in ("tests", "test") if any(path.startswith(f"{name}/") for path in there)]
    if tests:
        draft.tests = ["python", "-m", "pytest", "-q", *sorted(tests)]
    else:
        draft.unknown.append("tests.command: no test of pytest is found in the repository")


def _is_pytest(path: str) -> bool:
    return bool(re.search(r"(?:^|/)(?:test_[^/]*|[^/]*_test)\.py$", path))


def summary(draft: Draft) -> list[str]:
    """What was found, a line each, for people."""
    tests = " ".join(draft.tests) or "none"
    targets = ", ".join(str(json.loads(json.dumps(one))["name"]) for one in draft.workloads)
    return [
        f"base {draft.base[:12]}, reference {draft.reference[:12]}",
        f"scope: {', '.join(draft.scope)}",
        f"tests: {tests}",
        f"to be filled in: {', '.join(sorted(draft.files))} ({targets})",
        *(f"not found out: {words}" for words in draft.unknown),
    ]
