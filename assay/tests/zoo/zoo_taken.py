"""Tricks that take what others need: disk, pipes, time and locks; and one that looks ahead."""

import resource
import shutil

from zoo_candidates import FILLS, FORESEES, HOLDS_LOCK, LOCKS, PIPES, QUICK, STALLS
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
from zoo_project import Setting, Trick, outcome

from assay.arms import handle, sandbox
from assay.arms.handle import MOST_BYTES
from assay.experiment.exchange import Exchange

MOVES = """
import os, threading
SIZE = 4 << 20
def work(x):
    there, back = os.pipe()
    got = []
    def reads():
        while sum(got) < SIZE: got.append(len(os.read(there, 1 << 16)))
    reader = threading.Thread(target=reads)
    reader.start()
    data, sent = memoryview(bytes(SIZE)), 0
    while sent < SIZE: sent += os.write(back, data[sent:])
    reader.join()
    for one in (there, back): os.close(one)
    return [one + sum(got) for one in x]
"""
HOLDS_PAGES = (
    MOVES.replace("there, back = os.pipe()", "there, back = own")
    .replace("in (there, back)", "in ()")
    .replace("4 << 20", "5 << 20")
    .replace("+ sum(got)", "+ (4 << 20)")
    + """
import fcntl
own = os.pipe()
held = [os.pipe()]
while len(held) < 150 and fcntl.fcntl(held[-1][0], 1032) > 1 << 13:
    for size in (20, 18):
        try: fcntl.fcntl(held[-1][0], 1031, 1 << size)
        except OSError: continue
        break
    held.append(os.pipe())
"""
)
"""Base makes a pipe per call; the candidate keeps one, sends more, and holds all pages that its user may have."""


REPLIES = (
    QUICK
    + """
calls = 0
def answered(x):
    global calls
    calls += 1
    return bytes(256 << 20) if calls == 4 else once(x)
work = answered
"""
)


def any_length(setting: Setting) -> str:
    """A reply is read, however long it is."""

    def expect(exchange: Exchange, _: int | None) -> None:
        exchange._most = MOST_BYTES

    setting.remove(Exchange, "expect", expect)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome(setting, stop=False)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return "held" if grown > 200 << 10 else f"{grown} KiB"


def any_size(setting: Setting) -> None:
    """A pipe may be made as large as the kernel lets an ordinary user make it."""
    folder = setting.folder / "inside"
    shutil.copytree(sandbox.INSIDE, folder)
    text = (folder / "supervisor.py").read_text()
    assert text.count("    no_larger_pipes()\n") == 1
    (folder / "supervisor.py").write_text(text.replace("    no_larger_pipes()\n", ""))
    setting.remove(sandbox, "INSIDE", folder)
    setting.remove(handle, "INSIDE", folder)


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
        "large pipes that make others small",
        "neutralised:slower",
        "the kernel lets no arm make a pipe larger, so that those which it may have leave pages to others",
        {"work.py": HOLDS_PAGES},
        base={"work.py": MOVES},
        control=any_size,
        or_else=("undecided", "void"),
    ),
    Trick(
        "a reply that fills the judge's memory",
        "rejected:incorrect",
        "a reply that is many times as long as base's is not read",
        {"work.py": REPLIES},
        control=any_length,
        won="held",
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
