"""The committed runs of `assay ab` and `assay judge` on commits of this repository: their verdicts follow from their
samples."""

import json
from pathlib import Path

import jsonschema
import pytest

from assay.cli.shown import schema
from assay.experiment.blocks import Blocks
from assay.experiment.raw import replay, verdict_row

FILE = Path(__file__).parents[1] / "proof" / "ab-align-cpu.json"
JUDGED = {
    "equal": ("judge-align-cpu", "equivalent", "sandbox"),
    "slower": ("judge-align-cpu", "slower", "sandbox"),
    "faster": ("judge-align-h200", "faster", "namespaces"),
}
"""Of a verdict that was kept: its folder, what it says, how its arms were held apart."""


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


@pytest.mark.parametrize("name", JUDGED)
def test_the_verdicts_of_tasks_follow_from_their_samples(name: str) -> None:
    """tasks/align_cpu.toml on aae35e2, which left the layout alone, and on a patch that plants needless work;
    tasks/align_h200.toml on 0e6da25, which made the kernel quicker.
    """
    folder, word, isolation = JUDGED[name]
    verdict = json.loads((FILE.parent / folder / f"{name}.json").read_text())
    (workload,) = verdict["workloads"]
    seen, header = replay((FILE.parent / folder / f"{name}.jsonl").read_text().splitlines())
    row = json.loads(json.dumps(verdict_row(seen)))
    assert {key: row[key] for key in ("verdict", "estimate", "interval", "blocks", "material")} == {
        key: workload[key] for key in ("verdict", "estimate", "interval", "blocks", "material")
    }
    assert verdict["outcome"] == seen.verdict == word
    assert not any(gate["outcome"] for gate in verdict["gates"]) and header["isolation"] == isolation
    assert ("unsandboxed" in verdict["trust"]) == (isolation != "sandbox")


def test_committed_rows_follow_the_schema_that_is_made_from_the_models() -> None:
    validator = jsonschema.Draft202012Validator(schema("raw"))
    for file in FILE.parent.glob("judge-*/*.jsonl"):
        for line in file.read_text().splitlines():
            validator.validate(json.loads(line))
