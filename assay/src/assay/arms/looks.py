"""What /proc says of a process: whether it works, and what it has in memory."""

from pathlib import Path

from assay.arms.inside.supervisor import stat


def awake(process: int) -> bool:
    """Whether a process runs or sleeps of its own accord: it is not stopped, not ending, not held up in the kernel."""
    fields = stat(process)
    return fields is not None and fields[0] in "RS"


def runnable(process: int) -> bool:
    """Whether any thread of a process runs or waits for a processor."""
    try:
        threads = [path.name for path in Path(f"/proc/{process}/task").iterdir()]
    except OSError:
        return False
    return any((fields := stat(f"{process}/task/{thread}")) and fields[0] == "R" for thread in threads)


def own_kib(process: int) -> int:
    """What a process has in memory, its share of what it has together with others."""
    try:
        lines = Path("/proc", str(process), "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def peak_kib(process: int) -> int:
    """The most that a process has had in memory."""
    try:
        lines = Path("/proc", str(process), "status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)
