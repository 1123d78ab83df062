"""The committed runs of `assay ab` and `assay judge` on commits of this repository: their verdicts follow from their
samples."""

import json
from pathlib import Path

import pytest

from assay.experiment import Blocks, replay, verdict_row

FILE = Path(__file__).parents[1] / "proof" / "ab-align-cpu.json"
JUDGED = FILE.with_name("judge-align-cpu")


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


@pytest.mark.skipif(not JUDGED.exists(), reason="no runs have been committed")
@pytest.mark.parametrize("name", ["equal", "slower"])
def test_the_verdicts_of_tasks_follow_from_their_samples(name: str) -> None:
    """tasks/align_cpu.toml on aae35e2, which left the layout alone, and on a patch that plants needless work."""
    verdict = json.loads((JUDGED / f"{name}.json").read_text())
    (workload,) = verdict["workloads"]
    seen, header = replay((JUDGED / f"{name}.jsonl").read_text().splitlines())
    row = json.loads(json.dumps(verdict_row(seen)))
    assert {key: row[key] for key in ("verdict", "estimate", "interval", "blocks", "material")} == {
        key: workload[key] for key in ("verdict", "estimate", "interval", "blocks", "material")
    }
    assert verdict["outcome"] == seen.verdict == {"equal": "equivalent", "slower": "slower"}[name]
    assert not any(gate["outcome"] for gate in verdict["gates"]) and header["isolation"] == "sandbox"
