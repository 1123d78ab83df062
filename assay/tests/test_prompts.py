"""What prompts tell: the historical ones what they told, the default one nothing of the reference and all the rules."""

from pathlib import Path

import pytest

from assay.__main__ import main
from assay.contract import task
from assay.contract.errors import UsageError
from assay.prompts import render
from assay.prompts.render import Prompt
from small_project import BASE, TASK, edited, files, git, project

SECRETS = {"message": "Zauberspruch", "name": "pkg/quicksilver.py", "line": "hocuspocus = 1", "call": "abrakadabra"}
"""What the reference holds and base does not."""


def referenced(folder: Path) -> Path:
    """A task with a reference whose message, file names, lines and calls are like nothing else."""
    file = project(folder)
    added = f"{SECRETS['line']}\n\n\ndef use():\n    return {SECRETS['call']}(1)\n"
    files(folder / "repo", {"pkg/__init__.py": BASE.replace("total = 0", "total = int(0)"), SECRETS["name"]: added})
    git(folder / "repo", "add", "--all")
    git(folder / "repo", "commit", "--quiet", "-m", SECRETS["message"])
    return edited(file, 'base = "HEAD"', 'base = "HEAD~1"\nreference = "HEAD"')


def rendered(file: Path, template: str = "default", **more: object) -> Prompt:
    options: dict[str, object] = {
        "tree": "/there",
        "seconds": 1800.0,
        "measure": {"squares": "/measure/squares"},
        **more,
    }
    return render.render(task.read(file), template, **options)  # type: ignore[arg-type]


def test_the_default_leaks_nothing(tmp_path: Path) -> None:
    found = rendered(referenced(tmp_path))
    assert found.level == "L0" and not [word for word in SECRETS.values() if word in found.text]


def test_the_default_does_not_look_at_the_reference(tmp_path: Path) -> None:
    with_one = rendered(referenced(tmp_path / "1"))
    without = rendered(project(tmp_path / "2"))
    assert with_one.text == without.text and with_one.digest == without.digest


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("delta = 0.02", "delta = 0.07", "7 %"),
        ('files = ["pkg/**", "lib/**"]', 'files = ["other/*.c"]', "`other/*.c`"),
        ('files = ["pkg/**", "lib/**"]', 'files = ["pkg/**"]\nchecks = ["bench/own.py"]', "`bench/own.py`"),
        ('files = ["pkg/**", "lib/**"]', 'files = ["pkg/**"]\nrestored = ["docs/**"]', "`docs/**` are put back"),
        ('files = ["pkg/**", "lib/**"]', 'files = ["pkg/**"]\nmost_files = 17', "17 changed files"),
        ('packages = ["pkg"]', 'packages = ["pkg", "pkg.inner"]', "`pkg.inner`"),
        ('packages = ["pkg"]', 'packages = ["pkg"]\nallow = ["pkg.gone"]', "pkg.gone"),
        ("-q", "--strict-markers", "--strict-markers"),
        ('require = "faster"', 'require = "not_slower"', "a loss of more than 2 % is ruled out"),
        ('require = "faster"', 'require = "material"', "if that interval lies above a gain of 2 %"),
        ("[api]", '[prompt]\ngoal = "Mind the small inputs."\n\n[api]', "Mind the small inputs."),
        ("[api]", '[commands]\nbuild = [["make", "fast"]]\n\n[api]', "`make fast`"),
    ],
)
def test_the_default_says_what_the_judge_applies(old: str, new: str, said: str, tmp_path: Path) -> None:
    assert said not in rendered(project(tmp_path / "1")).text
    assert said in rendered(edited(project(tmp_path / "2"), old, new)).text


def test_what_a_task_does_not_show_is_not_said(tmp_path: Path) -> None:
    file = edited(project(tmp_path), "[api]", "[prompt]\nshows = []\n\n[api]")
    found = rendered(file, measure={}).text
    assert "pkg:work" not in found and "pytest" not in found and "squares(seed)" not in found
    assert "Every test of the repository" in found and "Measure it yourself" not in found


HISTORY = {  # what each generation has, in the order early, middle, late
    "placed at /there": (1, 1, 1),
    "<test_script>": (1, 1, 1),
    "from pkg import work": (1, 1, 0),
    "No script is given": (0, 0, 1),
    "not tests": (1, 1, 1),
    "behave as it did": (1, 1, 1),
    "particular inputs alone": (0, 0, 1),
    "may need a rebuild": (1, 1, 0),
    "Profile the target files": (0, 1, 1),
    ".bench_scratch/test_opt.py": (1, 1, 1),
    "<example_optimization_diff>": (1, 0, 0),
    f"+{SECRETS['line']}": (1, 0, 0),
    "grep -n": (1, 0, 0),
    SECRETS["call"]: (1, 0, 0),
    "allocate less memory": (0, 1, 0),
    "Files to optimise:": (1, 1, 1),
    "The public API must not break": (1, 1, 1),
    "All checks of the test pack": (1, 1, 1),
    "change ONLY these": (1, 1, 1),
    SECRETS["name"]: (1, 1, 1),
    SECRETS["message"]: (1, 0, 0),
    "2 files changed": (1, 1, 0),
    "by iteration 3": (1, 0, 0),
    "MUST change at least one file": (1, 1, 1),
    "git add -A": (1, 1, 1),
    "/there/model_patch.diff": (1, 1, 1),
    "finish": (1, 1, 1),
    "Optimise   init  , quicksilver": (0, 0, 1),
    "DO NOT ANALYSE": (1, 1, 0),
}


@pytest.mark.parametrize(("at", "template", "level"), [(0, "early", "L4"), (1, "middle", "L2"), (2, "late", "L1")])
def test_three_generations(at: int, template: str, level: str, tmp_path: Path) -> None:
    found = rendered(referenced(tmp_path), template)
    assert found.level == level
    wrong = {words: has[at] for words, has in HISTORY.items() if (words in found.text) != bool(has[at])}
    assert not wrong, found.text


@pytest.mark.parametrize("template", ["early", "middle", "late"])
def test_without_a_reference_there_is_nothing_to_tell(template: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--template {template}: expected a task with a reference"):
        rendered(project(tmp_path), template)


def test_a_template_of_ones_own_is_judged_by_its_variables(tmp_path: Path) -> None:
    file, own = referenced(tmp_path), tmp_path / "own.md.j2"
    own.write_text("Harmless: {{ name }}{% if false %}{{ message }}{% endif %}\n")
    assert rendered(file, str(own)).level == "L3"
    own.write_text("{{ name }}\n")
    assert rendered(file, str(own)).text == "sums\n" and rendered(file, str(own)).level == "L0"
    assert rendered(file, str(own), audit=lambda text: 2 if "sums" in text else 0).level == "L2"
    assert rendered(file, "early", audit=lambda _: 0).level == "L4"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\n{% if %}\n", "own.md.j2:2: "),
        ("{{ nothing }}", "own.md.j2: expected variables among"),
        ("{% for x in 3 %}{% endfor %}", "own.md.j2: 'int' object is not iterable"),
    ],
)
def test_errors_of_a_template(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "own.md.j2").write_text(text)
    with pytest.raises(UsageError) as error:
        rendered(project(tmp_path), str(tmp_path / "own.md.j2"))
    assert words in str(error.value)


def test_a_template_cannot_reach_python(tmp_path: Path) -> None:
    (tmp_path / "own.md.j2").write_text("{{ name.__class__.__mro__ }}")
    with pytest.raises(UsageError, match="unsafe"):
        rendered(project(tmp_path), str(tmp_path / "own.md.j2"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = project(tmp_path)
    assert main(["prompt", "--list"]) == 0
    assert [line.partition(",")[0] for line in capsys.readouterr().out.splitlines()] == [
        "default: L0",
        "early: L4",
        "middle: L2",
        "late: L1",
    ]
    assert main(["prompt", str(file)]) == 0
    assert "/assay/measure/squares" in capsys.readouterr().out
    assert main(["prompt", str(file), "--facts"]) == 0
    assert '"level": "L0"' in capsys.readouterr().out
    assert main(["prompt", str(file), "--template", "nothing"]) == 2
    assert main(["prompt"]) == 2 and TASK in file.read_text()
