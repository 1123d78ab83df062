"""A campaign on a real local Ray cluster of two nodes, one of which is killed in the middle: the journal ends alike."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from assay.campaign import distributed, plan, rows
from assay.campaign.predictions import Prediction, written_predictions
from assay.campaign.running import Course
from assay.contract.errors import UsageError
from small_project import BASE, files, project

pytestmark = [pytest.mark.full, pytest.mark.sandbox]
CAMPAIGN = """schema = 1
name = "spread"
tasks = ["task.toml"]
canaries = false
jobs = 2
retries = 1

[[prediction]]
file = "given.jsonl"
"""
EDIT = """diff --git a/{name} b/{name}
new file mode 100644
--- /dev/null
+++ b/{name}
@@ -0,0 +1 @@
+x = {number}
"""


def campaign(folder: Path) -> plan.Read:
    """Six patches that are rejected one way or another, so that nothing is measured on a busy machine."""
    project(folder)
    wrong = f"--- a/pkg/__init__.py\n+++ b/pkg/__init__.py\n@@ -1,1 +1,1 @@\n-{BASE.splitlines()[0]}\n+def work(n, base=3):\n"
    patches = [EDIT.format(name=f"other{i}.py", number=i) for i in range(4)] + ["", wrong]
    given = [Prediction("sums", "somebody", patch.encode()) for patch in patches]
    files(folder, {"campaign.toml": CAMPAIGN, "given.jsonl": written_predictions(given)})
    return plan.read(folder / "campaign.toml")


def told(found: dict[str, dict[str, Any]]) -> dict[str, tuple[Any, ...]]:
    names = ("outcome", "status", "patch", "number", "words")
    return {key: tuple(str(row[name]) for name in names) for key, row in found.items()}


def test_a_node_that_is_killed_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'assay[ray]'")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("RAY_health_check_period_ms", "500")
    monkeypatch.setenv("RAY_health_check_failure_threshold", "3")
    read = campaign(tmp_path)
    Course(read, tmp_path / "whole", lambda _: None, lambda _: None).run()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1, resources={distributed.SLOT: 1}) for _ in range(2)]
        cluster.wait_for_nodes()
        killed: list[int] = []

        def progress(_: str) -> None:
            """Kills a node while both work."""
            if not killed and len(rows.read(tmp_path / "out")) >= 2:
                killed.append(1)
                cluster.remove_node(nodes[0], allow_graceful=False)

        Course(read, tmp_path / "out", progress, lambda _: None, distributed.Cluster(cluster.address)).run()
        assert killed
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert told(rows.read(tmp_path / "out")) == told(rows.read(tmp_path / "whole"))
    assert len((tmp_path / "out" / rows.JOURNAL).read_text().splitlines()) == 6


def test_a_cluster_without_a_slot(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'assay[ray]'")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        with pytest.raises(UsageError, match="--ray: expected a node that offers assay_slot, got none"):
            distributed.Cluster(cluster.address).run([], 1, lambda _: None)
    finally:
        ray.shutdown()
        cluster.shutdown()
