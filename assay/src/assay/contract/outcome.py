"""The words that a verdict may say, and what each of them stands for. Gates add their own (gates/table.py)."""

from enum import StrEnum


class Outcome(StrEnum):
    """What a judgement comes to. An outcome `infra.PART` says which part of the infrastructure failed."""

    FASTER = "faster"
    SLOWER = "slower"
    EQUIVALENT = "equivalent"
    UNDECIDED = "undecided"
    INCORRECT = "incorrect"
    TAMPERED = "tampered"
    OUT_OF_SCOPE = "out_of_scope"
    API_BREAK = "api_break"
    NO_PATCH = "no_patch"
    NOT_EVALUATED = "not_evaluated"
    VOID = "void"
    TASK_INVALID = "task_invalid"


DECIDED = (Outcome.FASTER, Outcome.SLOWER, Outcome.EQUIVALENT, Outcome.UNDECIDED)
"""What an interval says."""
REJECTED = (
    *(Outcome.INCORRECT, Outcome.TAMPERED, Outcome.OUT_OF_SCOPE, Outcome.API_BREAK, Outcome.NO_PATCH, Outcome.SLOWER),
)
"""What counts against a candidate, beside what gates find."""
INFRA = "infra."
"""How the name of every outcome begins that counts against nobody."""
NOISE = f"{INFRA}noise"
"""The machine scatters so much that the blocks which are allowed could not show the margin."""
NOTHING = (Outcome.VOID, NOISE)
"""What says nothing of a candidate, since this machine could not show it."""
MEASURED = (*DECIDED, Outcome.INCORRECT, Outcome.TAMPERED, *NOTHING)
"""What a workload's blocks can come to."""
REQUIREMENTS = ("faster", "material", "not_slower", "any")
