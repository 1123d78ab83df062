"""assay history: bisection with real judgements, bounded and resumable; a small repository judged for real."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from assay.__main__ import main
from assay.cli.shown import schema
from assay.contract.workload import Plan, Workload
from assay.experiment.raw import verdict_row
from assay.report import timeline
from assay.statistics.looks import LOOKS, Look, judge
from assay.timeline.bisection import BrokenError, Search, bound, parts
from assay.timeline.running import Options, Running, commits_of
from small_project import files, git

MARGIN = math.log1p(0.05)


@dataclass
class Simulated:
    """Judges pairs of commits with the protocol's own looks, on times with noise of 1 %."""

    times: list[float]
    most: int
    broken: frozenset[int] = frozenset()
    asked: list[tuple[int, int]] = field(default_factory=list)
    random: Any = field(default_factory=lambda: np.random.default_rng(1))

    def __call__(self, before: int, after: int) -> Any:
        for one in (before, after):
            if one in self.broken:
                raise BrokenError(one, f"commit {one} does not build")
        self.asked.append((before, after))
        looks = [Look(look.blocks, look.alpha / self.most) for look in LOOKS]
        noise = np.exp(self.random.normal(0, 0.01, (3, LOOKS[-1].blocks)))
        arms = np.array([self.times[before], self.times[after], self.times[before]])[:, None] * noise
        for look in looks:
            seen = judge(*arms[:, : look.blocks], delta=0.05, looks=looks)
            if seen.verdict != "continue":
                break
        row = {name: value for name, value in verdict_row(seen).items() if name in Pair.__dataclass_fields__}
        return Pair(**row)


@dataclass
class Pair:
    verdict: str
    estimate: float | None
    interval: list[float | None]


def searched(times: list[float], most: int, points: int = 1, broken: frozenset[int] = frozenset()) -> Any:
    ask = Simulated(times, most, broken)
    search = Search(len(times) - 1, ask, MARGIN, most)
    search.run(points)
    assert len(ask.asked) == search.asked <= most
    return search, ask


@pytest.mark.parametrize("place", range(1, 33))
def test_a_regression_in_32_commits_takes_7_judgements_at_most(place: int) -> None:
    search, ask = searched([1.0] * place + [1.2] * (33 - place), bound(32, 1, 1))
    (step,) = search.steps
    assert (step.first, step.last, step.kind, step.shown) == (place, place, "slower", True) and not search.open
    assert len(ask.asked) <= 7 and step.interval[0] < math.log(1 / 1.2) < step.interval[1]


def test_bounds() -> None:
    assert bound(32, 1, 1) == 7 and bound(1, 1, 1) == 2 and bound(100, 4, 3) == 4 + 3 * 6
    assert parts(32, 1) == [(0, 32)] and parts(10, 3) == [(0, 3), (3, 7), (7, 10)] and parts(2, 9) == [(0, 1), (1, 2)]


def test_two_changes_are_both_found() -> None:
    search, _ = searched([1.0] * 5 + [1.3] * 12 + [1.7] * 16, bound(32, 1, 3))
    assert [(step.first, step.last, step.shown) for step in search.steps] == [(5, 5, True), (17, 17, True)]


def test_what_cancels_out_needs_points() -> None:
    times = [1.0] * 9 + [1.4] * 8 + [1.0] * 16
    assert not searched(times, bound(32, 1, 2))[0].steps
    found = {(step.last, step.kind) for step in searched(times, bound(32, 4, 2), points=4)[0].steps}
    assert found == {(9, "slower"), (17, "faster")}


def test_what_is_not_allowed_is_left_open_and_said() -> None:
    search, _ = searched([1.0] * 20 + [1.2] * 13, 3)
    (step,) = search.steps
    assert step.first <= 20 <= step.last and not step.shown and "all 3 judgements" in step.words


def test_commits_that_cannot_be_run() -> None:
    times = [1.0] * 20 + [1.2] * 13
    search, _ = searched(times, bound(32, 1, 2), broken=frozenset({16, 8, 24}))
    assert [(step.first, step.last) for step in search.steps] == [(20, 20)] and set(search.broken) <= {16, 8, 24}
    search, _ = searched(times, bound(32, 1, 2), broken=frozenset({19, 20, 21}))
    (step,) = search.steps
    assert (step.first, step.last, step.shown) == (19, 22, False) and "cannot be run" in step.words
    search, _ = searched(times, bound(32, 1, 2), broken=frozenset({32}))
    assert not search.steps and "a commit cannot be run: commit 32" in search.open[0]


@pytest.mark.parametrize("undivided", [False, True])
def test_however_often_it_looks_nothing_is_called_too_often(undivided: bool) -> None:
    """The family of all judgements: 60 histories in which nothing changed, each with 19 judgements, at 0.5 % together.

    The control divides no level: with 19 judgements per history it errs more often than one judgement may.
    """
    called = 0
    for number in range(60):
        looked = 0
        ask = Simulated([1.0] * 33, 1 if undivided else 19, random=np.random.default_rng(number))
        for before, after in parts(32, 19):
            looked += ask(before, after).verdict in ("faster", "slower")
        called += bool(looked)
    assert called > 2 if undivided else called <= 2  # more than 2 of 60 at 0.5 %: a probability of 0.4 %


def repository(folder: Path, sleeps: list[str]) -> Path:
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch=main")
    for number, one in enumerate(sleeps):
        files(folder, {"work.sh": f"sleep {one} # {number}\n" if one else "exit 7\n"})
        git(folder, "add", "--all")
        git(folder, "commit", "-m", f"number {number} <b>\x1b[1m")
    return folder


GIVEN = ["--delta", "50%", "--most-foreign", "1e9", "--changes", "1"]


@pytest.mark.full
def test_a_small_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Judged for real; a second run takes everything from RAW; other options are refused."""
    repo = repository(tmp_path / "repo", ["0.01", "0.01", "0.01", "0.05", "0.05"])
    monkeypatch.chdir(repo)
    out = tmp_path / "out"
    given = ["history", "HEAD~4..", *GIVEN, "--out", str(out), "--", "sh", "work.sh"]
    assert main(given) == 1
    shown = capsys.readouterr().out
    name = git(repo, "rev-parse", "HEAD~1")
    assert (
        shown.startswith("regressed: 4 commits, ") and f"slower: {name[:10]} number 3" in shown and "\x1b" not in shown
    )
    found = json.loads((out / "history.json").read_text())
    jsonschema.Draft202012Validator(schema("history")).validate(found)
    assert (
        found["most"] == 4 and len(found["pairs"]) <= 4 and found["steps"][0]["first"] == found["steps"][0]["last"] == 3
    )
    assert {pair["alpha"] for pair in found["pairs"]} <= {look.alpha / 4 for look in LOOKS}
    page = (out / "index.html").read_text()
    assert "number 3 &lt;b&gt;" in page and "\x1b" not in page and "http" not in page
    before = {file: file.read_bytes() for file in (out / "raw").iterdir()}
    assert main(given) == 1 and {file: file.read_bytes() for file in (out / "raw").iterdir()} == before
    assert main([*given[:3], "10%", *given[4:]]) == 2 and "got another one" in capsys.readouterr().err
    for range_, words in (
        ("HEAD", "expected A..B"),
        ("HEAD..HEAD", "expected commits after"),
        ("no..HEAD", "expected a"),
    ):
        assert main(["history", range_, "--out", str(tmp_path / "x"), "--", "true"]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.full
def test_it_goes_on_where_it_was_cut_short(tmp_path: Path) -> None:
    """Rows that are there stay, whole lines only; a pair that was void is measured again and keeps its RAW."""
    repo = repository(tmp_path / "repo", ["0.01", "0.05", ""])
    commits = commits_of(repo, "HEAD~2..HEAD")
    plan = Plan(Workload("command", ("sh", "work.sh")), 0.5, most_foreign=1e9).checked()
    options = Options(plan, "work", most=2)

    def stop(row: dict[str, Any]) -> None:
        if row["kind"] == "block" and row["number"] == 5:
            raise KeyboardInterrupt

    running = Running(repo, commits[:2], tmp_path / "out", options, stop)
    with pytest.raises(KeyboardInterrupt):
        running.run()
    (file,) = (tmp_path / "out/raw").iterdir()
    cut = file.read_bytes()
    file.write_bytes(cut + b'{"kind": "bl')
    assert json.loads((tmp_path / "out/history.json").read_text())["outcome"] == "unfinished"
    found = Running(repo, commits[:2], tmp_path / "out", options, lambda _: None).run()
    assert file.read_bytes().startswith(cut) and found["outcome"] == "regressed" and found["pairs"][0]["voids"] == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["number"] for row in rows if row["kind"] == "block"] == list(range(len(rows) - 3))
    rows[-1] |= {"verdict": "void", "reason": "made so", "estimate": None}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = Running(repo, commits[:2], tmp_path / "out", options, lambda _: None).run()
    assert found["pairs"][0]["voids"] == 1 and file.with_name(f"{file.stem}.void-1.jsonl").exists()
    broken = Running(repo, commits, tmp_path / "broken", options, lambda _: None).run()
    assert broken["outcome"] == "undecided" and "ended with status 7" in broken["broken"]["2"] and broken["open"]


def test_points_of_the_page() -> None:
    """Times over the first commit's, by the fewest judgements: log-ratios of before over after change their sign."""
    pairs = [
        {"before": 0, "after": 4, "estimate": -0.4, "interval": [-0.5, -0.3]},
        {"before": 0, "after": 2, "estimate": -0.1, "interval": [-0.2, None]},
        {"before": 2, "after": 3, "estimate": -0.3, "interval": [-0.4, -0.2]},
    ]
    found = {index: values for index, *values in timeline.points(pairs)}
    assert found[4] == [0.4, 0.3, 0.5] and found[3][0] == pytest.approx(0.4) and found[2] == [0.1, -math.inf, 0.2]


@pytest.mark.full
def test_a_planted_regression_in_32_commits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same for real, with 20 units of work that become 40 in the 23rd commit. A void pair is measured again."""
    repo = tmp_path / "repo"
    repo.mkdir()
    git(repo, "init", "--quiet")
    for number in range(33):
        units = 20 if number < 23 else 40
        files(repo, {"work.py": f"def work():  # {number}\n    return sum(i & 7 for i in range({units} * 1000))\n"})
        git(repo, "add", "--all")
        git(repo, "commit", "-m", f"number {number}")
    monkeypatch.chdir(repo)
    given = ["history", "HEAD~32..HEAD", "--out", str(tmp_path / "out"), "--changes", "1", "--delta", "30%"]
    given += ["--most-foreign", "1e9", "--rounds", "1", "--calls", "5", "--call", "work:work"]
    tries = 1
    while (status := main(given)) == 3 and tries < 4:  # as it says: the same command goes on
        tries += 1
    assert status == 1
    found = json.loads((tmp_path / "out/history.json").read_text())
    (step,) = found["steps"]
    assert (step["first"], step["last"], step["shown"]) == (23, 23, True) and len(found["pairs"]) <= 7
    assert step["interval"][0] < math.log(20 / 40) < step["interval"][1]
    print(capsys.readouterr().out)
