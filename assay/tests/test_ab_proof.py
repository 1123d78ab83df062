"""The committed runs of `assay ab` on two commits of this repository: their verdicts follow from their samples."""

import json
from pathlib import Path

import pytest

from assay.experiment import Blocks, verdict_row

FILE = Path(__file__).parents[1] / "proof" / "ab-align-cpu.json"


@pytest.mark.skipif(not FILE.exists(), reason="no runs have been committed")
def test_the_verdicts_follow_from_the_samples() -> None:
    runs = json.loads(FILE.read_text())["runs"]
    assert set(runs) == {"equal", "planted"}
    for run in runs.values():
        blocks = Blocks()
        for primary in run["primary"]:
            blocks.add({"differing": [], "reasons": [], "primary": primary})
        seen = blocks.decision(run["delta"])
        assert seen is not None and json.loads(json.dumps(verdict_row(seen))) == run["verdict"]
    assert runs["planted"]["verdict"]["verdict"] == "slower" and runs["equal"]["verdict"]["verdict"] != "slower"
    assert not runs["equal"]["verdict"]["material"]
