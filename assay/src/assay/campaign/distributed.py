"""Cells on the nodes of a Ray cluster: a task per step, which starts the cell's process and waits for it.

Nodes see the campaign's folder at one path, as over NFS, and have assay, git, bubblewrap, the agents and their keys. A
node offers as many SLOT as it has devices to measure on; a step takes one. When a node is lost its steps are given to
others, and a cell goes on from its folder, so that the journal ends as it would have.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from assay.contract.errors import NotInstalledError, UsageError

if TYPE_CHECKING:
    from assay.campaign.running import Part

SLOT = "assay_slot"
"""Resource of a node: `ray start --resources '{"assay_slot": 1}'`."""
_LOOK_S, _TRIES = 0.5, 5


@dataclass
class Cluster:
    """A Ray cluster, by its address; `auto` is the one that this machine is part of."""

    address: str

    def run(self, parts: "Sequence[Part]", most: int, told: "Callable[[list[Part]], None]") -> None:
        """Runs all parts to their ends, at most `most` beside each other. UsageError for a cluster without a slot."""
        ray = _connected(self.address)
        remote = ray.remote(num_cpus=1, resources={SLOT: 1}, max_retries=_TRIES)(_step)
        waiting, running = list(parts), dict[Any, Part]()
        try:
            while waiting or running:
                while waiting and len(running) < most:
                    part = waiting.pop(0)
                    running[remote.remote(part.command[1:])] = part
                told(list(running.values()))
                ended, _ = ray.wait(list(running), num_returns=1, timeout=_LOOK_S)
                for reference in ended:
                    del running[reference]  # what came of it is in the cell's folder, or it is not
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def _connected(address: str) -> Any:
    """Ray, connected. NotInstalledError without it, UsageError where no node offers a slot."""
    try:
        import ray
    except ImportError:
        raise NotInstalledError("ray: --ray needs it: pip install 'assay[ray]'") from None
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except ConnectionError as problem:
            raise UsageError(f"--ray: expected the address of a cluster, got {address}: {problem}") from None
    if not ray.cluster_resources().get(SLOT):
        raise UsageError(f"--ray: expected a node that offers {SLOT}, got none; ray start --resources with it")
    return ray


def _step(command: Sequence[str]) -> int:
    """On a node: the cell's process, which dies with this one."""
    process = subprocess.Popen([sys.executable, *command, str(os.getpid())], stdin=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            time.sleep(0.1)
    finally:
        process.kill()
    return process.wait()
