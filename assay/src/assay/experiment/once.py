"""A workload once, without a figure: to see whether it works at all, or what of it runs."""

import random
import secrets
from dataclasses import replace

from assay.arms.trees import Trees
from assay.contract import seeds
from assay.contract.workload import Plan
from assay.experiment.inputs import Inputs
from assay.experiment.processes import command_sample
from assay.experiment.samples import worker_samples


def once(plan: Plan, alone: Trees, base: Trees, label: str, inputs: int = 1) -> None:
    """One run, or first calls, of a workload in the one arm of `alone`. ArmError if it fails.

    Args:
        alone: trees with one arm.
        base: trees with the arm `base`, in which inputs are made.
        label: what the inputs are drawn for; others than any that are timed.
        inputs: how many different ones.
    """
    (arm,) = alone.trees
    if not plan.workload.worker:
        command_sample(arm, plan, alone, secrets.randbits(32))
        return
    maker = Inputs(plan, base)
    drawn = seeds.inputs(plan.seed, label)
    try:
        made = maker.make([next(drawn) for _ in range(inputs)])
    finally:
        maker.end()
    short = replace(plan, workload=replace(plan.workload, rounds=1, warmups=1))
    worker_samples(short, alone, random.Random(0), [*made, made[0]], secrets.randbits(32))
