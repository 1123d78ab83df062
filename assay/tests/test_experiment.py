"""Real experiments on small trees: planted effects, the null, contamination, failures, RAW and its replay."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from assay import sense
from assay.__main__ import main
from assay.experiment import replay

WORK = "total = 0\nfor i in range({units} * 10000): total += i * i\n"
ANY_LOAD = ["--most-foreign", "1e9"]  # tests run beside each other


def tree(folder: Path, units: int, more: str = "") -> Path:
    folder.mkdir()
    (folder / "work.py").write_text(WORK.format(units=units) + more)
    return folder


def ab(a: Path, b: Path, raw: Path, *options: str) -> int:
    return main(["ab", str(a), str(b), "--out", str(raw), *options, "--", sys.executable, "-S", "work.py"])


def test_planted_effects_both_ways_and_replay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick, slow = tree(tmp_path / "quick", 20), tree(tmp_path / "slow", 120)
    assert ab(slow, quick, tmp_path / "raw1", *ANY_LOAD) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("faster: the interval lies above 0, beyond the margin") and "12 blocks" in shown
    assert ab(quick, slow, tmp_path / "raw2", *ANY_LOAD) == 1
    first = capsys.readouterr().out.splitlines()
    assert main(["replay", str(tmp_path / "raw2")]) == 1
    assert capsys.readouterr().out.splitlines()[1:3] == first[:2]
    rows = [json.loads(line) for line in (tmp_path / "raw2").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["header", *["block"] * 12, "verdict"]
    assert len({tuple(row["order"]) for row in rows[1:-1]}) > 1
    block = rows[1]
    assert all(0 < block["cpu_s"][arm] and 0 < block["seconds"][arm] for arm in ("base", "candidate", "control"))
    assert rows[0]["plan"]["delta"] == 0.02 and rows[0]["schema"] == 1
    rows[0]["plan"]["looks"] = [[8, 0.05]]
    with pytest.raises(ValueError, match="RAW: expected the looks of this version"):
        replay([json.dumps(row) for row in rows])


def test_the_same_tree_is_not_called_material(tmp_path: Path) -> None:
    same = tree(tmp_path / "same", 10)
    ab(same, same, tmp_path / "raw", *ANY_LOAD)
    seen, _ = replay((tmp_path / "raw").read_text().splitlines())
    assert not seen.material or seen.verdict == "void"


def test_what_outlives_its_arm_is_killed_and_its_block_left_out(tmp_path: Path) -> None:
    """A process that spins while others run would slow them: none is alive when the next arm starts."""
    spins = "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'while True: pass'])\n"
    a, b = tree(tmp_path / "a", 1), tree(tmp_path / "b", 1, spins)
    assert ab(a, b, tmp_path / "raw", *ANY_LOAD) == 3
    rows = [json.loads(line) for line in (tmp_path / "raw").read_text().splitlines()]
    assert all(row["survivors"] == {"base": 0, "candidate": 1, "control": 0} for row in rows if row["kind"] == "block")
    assert rows[-1]["verdict"] == "void" and "contaminated" in rows[-1]["reason"]


def test_foreign_load_is_seen(tmp_path: Path) -> None:
    load = sense.Load.now()
    child = os.fork()
    if child == 0:
        stop = time.monotonic() + 1.0
        while time.monotonic() < stop:
            pass
        os._exit(0)
    time.sleep(0.8)
    foreign = load.foreign_since()
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
