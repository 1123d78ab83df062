"""Real experiments on small trees: planted effects, the null, contamination, failures, RAW and its replay."""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jsonschema
import pytest

from assay.__main__ import main
from assay.arms.inside.supervisor import cpu_seconds
from assay.arms.process import Running
from assay.experiment import processes
from assay.experiment.raw import replay
from assay.machine import load
from holding import python, start
from small_trees import ANY_LOAD, CALL, ab, call, rows, tree


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    printed = subprocess.run(
        [sys.executable, "-m", "assay", "schema"], capture_output=True, check=True, env=_environment()
    )
    found = json.loads(printed.stdout)
    jsonschema.Draft202012Validator.check_schema(found)
    return jsonschema.Draft202012Validator(found)


def _environment() -> dict[str, str]:
    return dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))


@pytest.mark.parametrize("isolation", ["auto", pytest.param("links", marks=pytest.mark.full)])
def test_planted_effects_both_ways_and_replay(
    isolation: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], schema: jsonschema.Draft202012Validator
) -> None:
    quick, slow = tree(tmp_path / "quick", 20), tree(tmp_path / "slow", 120)
    assert ab(slow, quick, tmp_path / "raw1", *ANY_LOAD, "--isolation", isolation) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("faster: the interval lies above 0, beyond the margin") and "12 blocks" in shown
    assert "wall, gets the verdict" in shown
    assert ab(quick, slow, tmp_path / "raw2", *ANY_LOAD, "--isolation", isolation) == 1
    first = capsys.readouterr().out.splitlines()
    assert main(["replay", str(tmp_path / "raw2")]) == 1
    assert capsys.readouterr().out.splitlines()[1:3] == first[:2]
    found = rows(tmp_path / "raw2")
    assert [row["kind"] for row in found] == ["header", *["block"] * 12, "verdict"]
    for row in found:
        schema.validate(row)
    assert len({tuple(row["order"]) for row in found[1:-1]}) > 1
    block = found[1]
    assert all(0 < block["cpu_s"][arm] and 0 < block["primary"][arm] for arm in ("base", "candidate", "control"))
    assert found[0]["plan"]["delta"] == 0.02 and found[0]["schema"] == 3
    found[0]["plan"]["looks"] = [[8, 0.05]]
    with pytest.raises(ValueError, match="RAW: expected the looks of this version"):
        replay([json.dumps(row) for row in found])


def test_the_schema_rejects_what_is_no_raw(schema: jsonschema.Draft202012Validator) -> None:
    good = {"kind": "verdict", "verdict": "void", "reason": "", "estimate": None, "interval": [None, None]}
    good |= {"blocks": 3, "alpha": 1.0, "material": False, "detectable": None}
    schema.validate(good)
    for bad in ({**good, "verdict": "great"}, {**good, "more": 1}, {**good, "interval": [1.0]}, {"kind": "block"}):
        assert not schema.is_valid(bad)


@pytest.mark.full
def test_the_same_tree_is_not_called_material(tmp_path: Path) -> None:
    same = tree(tmp_path / "same", 10)
    ab(same, same, tmp_path / "raw", *ANY_LOAD)
    seen, _ = replay((tmp_path / "raw").read_text().splitlines())
    assert not seen.material or seen.verdict == "void"


@pytest.mark.full
@pytest.mark.parametrize("rounds", [1, 2])
def test_callables(
    rounds: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], schema: jsonschema.Draft202012Validator
) -> None:
    quick = tree(tmp_path / "quick", 8, text=CALL)
    twice = "_once = work\ndef work(n):\n    _once(n)\n    return _once(n)\n"
    slow = tree(tmp_path / "slow", 8, twice, text=CALL)
    page = tmp_path / "page.html"
    assert call(slow, quick, tmp_path / "raw", "--rounds", str(rounds), "--html", str(page)) == 0
    shown = capsys.readouterr().out
    assert "beyond the margin" in shown and "0 differ" in shown
    found = rows(tmp_path / "raw")
    for row in found:
        schema.validate(row)
    blocks = found[1:-1]
    assert len({block["inputs"] for block in blocks}) == len(blocks)
    assert all(len(block["calls"][arm]) >= 3 for block in blocks for arm in block["order"])
    names = {"import", "first", "steady", "memory", "processors", "transport", "spared"}
    assert names == set(blocks[0]["figures"]["base"])
    assert found[0]["calibrated"]["transport_s"] < 0.1 * found[0]["calibrated"]["call_s"]
    text = page.read_text()
    assert text.count("<circle") == 5 * len(blocks) and "http" not in text and "<script" not in text
    assert main(["report", str(tmp_path / "raw"), "--out", str(page)]) == 0 and page.read_text() == text


def test_wrong_outputs_are_incorrect_however_fast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = tree(tmp_path / "good", 8, text=CALL)
    wrong = tree(tmp_path / "wrong", 0, text=CALL)
    assert call(good, wrong, tmp_path / "raw") == 1
    assert capsys.readouterr().out.startswith("incorrect: outputs of ")
    assert rows(tmp_path / "raw")[-1]["verdict"] == "incorrect" and len(rows(tmp_path / "raw")) == 3


OUTLIVES = "import subprocess, sys\nsubprocess.Popen([sys.executable, '-S', '-c', {code!r}])\n"
SPINS, WAITS = (OUTLIVES.format(code=code) for code in ("while True: pass", "import time; time.sleep(60)"))


@pytest.mark.parametrize(
    ("more", "verdict", "status"),
    [
        pytest.param(("", SPINS), "tampered", 1, id="works on"),
        pytest.param(("", WAITS), "void", 3, id="waits", marks=pytest.mark.full),
        pytest.param((SPINS, SPINS), "void", 3, id="base does so, too", marks=pytest.mark.full),
    ],
)
def test_what_outlives_its_arm_is_killed_and_its_block_left_out(
    more: tuple[str, str], verdict: str, status: int, tmp_path: Path
) -> None:
    """A process that spins while others run would slow them: none is alive when the next arm starts."""
    a, b = tree(tmp_path / "a", 1, more[0]), tree(tmp_path / "b", 1, more[1])
    assert ab(a, b, tmp_path / "raw", *ANY_LOAD) == status
    found = rows(tmp_path / "raw")
    left = {"base": int(bool(more[0])), "candidate": 1, "control": int(bool(more[0]))}
    assert all(row["left"] == left for row in found if row["kind"] == "block")
    assert found[-1]["verdict"] == verdict
    if verdict == "tampered":
        words = "candidate: a process went on working after the end, in 14 of 14 blocks, and in no other arm"
        assert found[-1]["reason"] == words


ON_ONE_CORE = """
import os, subprocess, sys
os.sched_setaffinity(0, [{core}])
subprocess.Popen([sys.executable, "-S", "-c", "{code}"])
"""


@pytest.fixture
def crowded() -> Iterator[Callable[[int], None]]:
    """Fills a core with 24 busy sessions, as kernels may share a core among sessions, not processes."""
    hogs: list[int] = []

    def fill(core: int) -> None:
        for _ in range(24):
            hogs.append(os.fork())
            if hogs[-1] == 0:
                os.setsid()
                os.sched_setaffinity(0, [core])
                while True:
                    pass

    yield fill
    for hog in hogs:
        os.kill(hog, signal.SIGKILL)
        os.waitpid(hog, 0)


@pytest.mark.parametrize(
    ("code", "works"), [("while True: pass", True), ("import time; time.sleep(60)", False)], ids=["works on", "waits"]
)
@pytest.mark.full
def test_a_busy_machine_does_not_hide_who_works_on(
    code: str, works: bool, tmp_path: Path, crowded: Callable[[int], None]
) -> None:
    """What was left behind gets 4 ms in 100 ms."""
    core = min(os.sched_getaffinity(0))
    (tmp_path / "tree").mkdir()
    with tempfile.TemporaryFile() as log:
        running = start(tmp_path, "links", python(ON_ONE_CORE.format(core=core, code=code)), log.fileno())
        running.release()
        assert running.wait(20).left == 1
        stop = time.monotonic() + 20
        time.sleep(0.5)  # it starts
        while running.runnable() is not works:
            assert time.monotonic() < stop
            time.sleep(0.01)
        crowded(core)
        begun = time.monotonic()
        assert processes._works(running) is works
        assert works or time.monotonic() - begun < 2
        running.end()


def test_foreign_load_is_seen() -> None:
    before = load.Load.now()
    child = os.fork()
    if child == 0:
        stop = time.monotonic() + 1.0
        while time.monotonic() < stop:
            pass
        os._exit(0)
    time.sleep(0.8)
    foreign = before.foreign_since()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert foreign is None or foreign > 0.3  # a child that has not ended counts as foreign


@pytest.mark.parametrize(
    ("more", "options", "message"),
    [
        ("raise SystemExit('no good')", [], "candidate: ended with status 1: no good"),
        ("import time; time.sleep(30)", ["--timeout", "0.5"], "candidate: did not end within 0.5 s"),
    ],
)
def test_failing_runs(
    more: str, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = time.monotonic()
    assert ab(tree(tmp_path / "a", 1), tree(tmp_path / "b", 1, more), tmp_path / "raw", *options) == 3
    assert message in capsys.readouterr().err and time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("def work(n): raise KeyError('no good')\n", [], "KeyError: 'no good'"),
        ("def other(n): pass\n", [], "has no attribute 'work'"),
        (
            "import os\ndef work(n): print('last words', flush=True); os._exit(7)\n",
            [],
            "ended with status 7: last words",
        ),
        ("import time\ndef work(n): time.sleep(30)\n", ["--timeout", "0.5"], "did not answer within 0.5 s"),
        ("def work(n): return object()\n", [], "expected numbers, text, bytes, arrays"),
    ],
)
def test_failing_callables(
    text: str, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = time.monotonic()
    good = tree(tmp_path / "a", 8, text=CALL)
    assert call(good, tree(tmp_path / "b", 0, text=text), tmp_path / "raw", *options) == 3
    assert message in capsys.readouterr().err and time.monotonic() - start < 20


def test_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = tree(tmp_path / "a", 1)
    assert ab(a, tmp_path / "none", tmp_path / "raw") == 2 and not (tmp_path / "raw").exists()
    assert "B: expected a directory" in capsys.readouterr().err
    (tmp_path / "raw").write_text("kept")
    assert ab(a, a, tmp_path / "raw") == 2 and (tmp_path / "raw").read_text() == "kept"
    assert main(["replay", str(tmp_path / "raw")]) == 2
    assert "RAW: expected JSON lines" in capsys.readouterr().err
    assert ab(a, a, tmp_path / "new", "--delta", "0") == 2
    with pytest.raises(SystemExit) as stop:
        main(["ab", str(a), str(a)])
    assert stop.value.code == 2 and "COMMAND: expected" in capsys.readouterr().err
    assert main(["ab", str(a), str(a), "--out", str(tmp_path / "x"), "--", "no-such-program"]) == 3
    assert "cannot start no-such-program" in capsys.readouterr().err
    for options, words in (
        (["--primary", "speed"], "--primary: expected one of steady, first, import, memory, got speed"),
        (["--graph"], "--graph: expected --clock cuda"),
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
    ):
        assert call(a, a, tmp_path / "new", *options) == 2
        assert words in capsys.readouterr().err and not (tmp_path / "new").exists()


ASV = """
class TimeSums:
    params = [[1, 3], ["a", "b"]]
    def setup_cache(self): return 20000
    def setup(self, cache, times, name): self.numbers = range(cache * times * {units})
    def time_sum(self, cache, times, name): sum(self.numbers)
def time_alone(): sum(range(200000 * {units}))
"""
PYPERF = """
import pyperf
runner = pyperf.Runner()
runner.bench_func("other", lambda: 1 / 0)
runner.bench_func("sum", sum, range(200000 * {units}))
runner.timeit("text", stmt="sum(numbers)", setup="numbers = range(200000 * {units})")
"""


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--asv", "work.py:TimeSums.time_sum", "--case", "3"], ASV),
        (["--asv", "work.py:time_alone"], ASV),
        (["--pyperf", "work.py:sum"], PYPERF),
        (["--pyperf", "work.py:text"], PYPERF),
    ],
)
@pytest.mark.full
def test_benchmarks_of_asv_and_pyperf(options: list[str], text: str, tmp_path: Path) -> None:
    if "--pyperf" in options:
        pytest.importorskip("pyperf", reason="pyperf is not installed")
    a, b = tree(tmp_path / "a", 1, text=text), tree(tmp_path / "b", 2, text=text)
    assert main(["ab", str(a), str(b), "--out", str(tmp_path / "raw"), *ANY_LOAD, *options]) == 1
    assert rows(tmp_path / "raw")[-1]["verdict"] == "slower"


def test_benchmarks_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = tree(tmp_path / "a", 1, text=ASV)
    for target, words in (
        (["--asv", "work.py:TimeSums.time_sum", "--case", "4"], "case: expected below 4"),
        (["--asv", "work.py:TimeSums.time_other"], "no attribute 'time_other'"),
        (["--asv", "nothing.py:X.y"], "expected a Python file, found none"),
    ):
        assert main(["ab", str(a), str(a), "--out", str(tmp_path / "raw"), *target]) == 3
        assert words in capsys.readouterr().err


HOG = """
import subprocess, sys
for _ in range(12): subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"])
"""


def _only_looks(running: Running) -> float:
    """What freezing does, without the stop."""
    running._frozen = {process: cpu_seconds(process) for process in running.members()}
    return sum(running._frozen.values())


def _hogged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, freezing: bool) -> tuple[float, float, list[str]]:
    """Medians of base and candidate, which do the same, and why blocks were left out."""
    if not freezing:
        monkeypatch.setattr(Running, "freeze", _only_looks)
    a, b = tree(tmp_path / "a", 8, text=CALL), tree(tmp_path / "b", 8, HOG, text=CALL)
    call(a, b, tmp_path / "raw", "--rounds", "2", "--calls", "4")
    blocks = [row for row in rows(tmp_path / "raw") if row["kind"] == "block"]
    base, candidate = (statistics.median(row["primary"][arm] for row in blocks) for arm in ("base", "candidate"))
    return base, candidate, [words for row in blocks for words in row["reasons"]]


@pytest.mark.full
def test_a_hog_only_harms_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Helpers of the candidate that always spin are frozen while base runs."""
    base, candidate, reasons = _hogged(tmp_path, monkeypatch, freezing=True)
    assert candidate > 1.3 * base and not reasons, (candidate, base, reasons)


@pytest.mark.full
def test_without_freezing_a_hog_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, reasons = _hogged(tmp_path, monkeypatch, freezing=False)
    assert reasons and set(reasons) == {"an arm ran while it was frozen"}
