"""What can stop a command, each with its exit status, and what can stop a measurement, each with its outcome."""

from enum import IntEnum

PATHS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
"""What is wrong with a path that somebody gave; any other error of the system is the machine's."""


class Status(IntEnum):
    """Exit statuses of every command."""

    SHOWN = 0
    """What the task requires was shown; a command that judges nothing did its work."""
    REFUTED = 1
    """The patch is rejected or slower, or the opposite of what is required was shown; a promise was broken."""
    USAGE = 2
    INFRASTRUCTURE = 3
    """Infrastructure failed, or the blocks are void."""
    INVALID = 4
    """The task makes no sense."""
    OPEN = 5
    """Undecided or not evaluated; measuring is not finished."""


class StoppedError(Exception):
    """Ends a command with its words on stderr and its status."""

    status = Status.USAGE


class UsageError(StoppedError, ValueError):
    """What was asked for cannot be done."""


class NotInstalledError(UsageError):
    """A package is missing that this command needs."""


class TaskError(StoppedError, ValueError):
    """The task makes no sense; begins with file and line."""

    status = Status.INVALID


class NoSandboxError(StoppedError, RuntimeError):
    """A sandbox is wanted and cannot be had here."""

    status = Status.INFRASTRUCTURE


class IsolationError(StoppedError, RuntimeError):
    """Others cannot be kept away from a processor here."""

    status = Status.INFRASTRUCTURE


class BuildError(StoppedError, RuntimeError):
    """A setup or build command failed in an arm."""

    status = Status.INFRASTRUCTURE

    def __init__(self, arm: str, words: str) -> None:
        super().__init__(f"{arm}: {words}")
        self.arm = arm


class HostError(StoppedError, RuntimeError):
    """The machine failed: its disk is full, say."""

    status = Status.INFRASTRUCTURE


class MeasurementError(StoppedError):
    """Ends the measurement of a workload. `outcome` is that of the workload."""

    @property
    def outcome(self) -> str:
        """The word for a verdict."""
        return "task_invalid"


class TooShortError(MeasurementError, ValueError):
    """The workload takes so little that the transport would be measured with it."""


class NotRepeatableError(MeasurementError, ValueError):
    """Two builds of base gave different outputs, so that a candidate's cannot be compared with them."""


class InputsAlikeError(MeasurementError, ValueError):
    """Different seeds give inputs that are alike, so that a cache would answer calls that are to be new."""


class OverBudgetError(MeasurementError, RuntimeError):
    """The task's seconds did not suffice."""

    status = Status.INFRASTRUCTURE

    @property
    def outcome(self) -> str:
        """Never the candidate's fault."""
        return "infra.budget"


class ArmError(MeasurementError, RuntimeError):
    """A run did not end with status 0 in time; `arm` says whose.

    `killed`: it took too long or too much. `infra`: not its own doing, there was no supervisor or sandbox for it.
    `tampered`: it did what is no mistake.
    """

    status = Status.INFRASTRUCTURE

    def __init__(
        self, arm: str, words: str, *, killed: bool = False, infra: bool = False, tampered: bool = False
    ) -> None:
        super().__init__(f"{arm}: {words}")
        self.arm, self.words, self.killed, self.infra, self.tampered = arm, words, killed, infra, tampered

    @property
    def outcome(self) -> str:
        """The candidate's own failure counts against it, another arm's does not."""
        if self.arm != "candidate" or self.infra:
            return "infra.run"
        return "tampered" if self.tampered else "incorrect"


class LateError(ArmError):
    """It did not come in the time that was given to it."""
