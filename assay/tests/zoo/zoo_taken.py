"""Tricks that take what others need: disk, pipes, time and locks; and one that looks ahead."""

from zoo_candidates import FILLS, FORESEES, HOLDS_LOCK, LOCKS, PIPES, STALLS
from zoo_controls import (
    any_disk,
    any_lock,
    any_pipes,
    eight_seconds,
    foreseeable,
    shared_file,
    small_disk,
    without_budget,
)
from zoo_project import Trick

TAKEN = [
    Trick(
        "a disk that fills up",
        "rejected:incorrect",
        "what an arm writes has a quota: each file by the kernel, all together by a look",
        {"work.py": FILLS},
        needs=small_disk,
        control=any_disk,
    ),
    Trick(
        "pipes that run out",
        "rejected:incorrect",
        "an arm may have so many pipes that others of this user get theirs",
        {"work.py": PIPES},
        control=any_pipes,
    ),
    Trick(
        "a gate that stalls",
        "rejected:infra.budget",
        "gates have the seconds of the task together",
        {"work.py": STALLS},
        needs=eight_seconds,
        control=without_budget,
        won="stalled",
    ),
    Trick(
        "a lock that base waits for",
        "rejected:tampered",
        "a frozen arm that holds what others could wait for spoils a block; the candidate alone is tampering",
        {"work.py": HOLDS_LOCK},
        base={"work.py": LOCKS},
        needs=shared_file,
        control=any_lock,
    ),
    Trick(
        "inputs foreseen from the hash seed",
        "neutralised:slower",
        "every draw is a SHA-256 of a secret with a label of its own, and says nothing of another",
        {"work.py": FORESEES},
        control=foreseeable,
    ),
]
