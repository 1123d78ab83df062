"""Tricks of a patch that patches its own worker: what it hides, leaves out, and leaves for later.

Called by anybody else than a worker the last two do what base does.
"""

from zoo_candidates import QUICK
from zoo_project import CALL, OWN, WORK, Setting, Trick

from assay.experiment import elsewhere, series
from assay.experiment.series import _Series
from taken_over import TAKES_OVER

FINDS = """
import sys
def found(name):
    frame = sys._getframe()
    while frame and not (name in frame.f_locals and "wire" in frame.f_locals): frame = frame.f_back
    return frame
"""
HIDES = (
    QUICK
    + FINDS
    + """
fast = work
def work(x):
    found = fast(x)
    x.clear()
    return found
frame = found("self")
if frame:
    worker, wire = type(frame.f_locals["self"]), frame.f_locals["wire"]
    answer = worker.answer
    def hidden(self, letter, number, body):
        if letter in b"ci": self.sent = bytes(body)
        return (0.0, wire.decode(self.sent)) if letter == b"a" else answer(self, letter, number, body)
    worker.answer = hidden
"""
)
HALVES = """
def work(x):
    for _ in range(40): x = [one * 0.5 for one in x]
    return x
"""
FUSES = (
    HALVES
    + TAKES_OVER
    + """
import json
LINKS = 100
def written(value):
    given = isinstance(value, tuple)
    tree = '{"!":"list","of":%s}' % str(value[0] if given else value).replace(" ", "")
    tree = '{"!":"tuple","of":[%s]}' % tree if given else tree
    return b"%d\\n" % len(tree) + tree.encode()
def fused(x):
    last = [one * 0.5 ** (40 * (LINKS - 1)) for one in x]
    return work(last), last
take_over(lambda body: json.loads(body[body.index(b"[", body.index(b"[") + 1) : -3]), written, fused)
"""
)
JOURNAL = (
    WORK
    + """
seen = []
def note(x): seen.append(sum(once(x)) + sum(once(x)))
def work(x):
    found = once(x)
    note(x)
    return found
"""
)
LATER = (
    JOURNAL
    + FINDS
    + """
frame = found("mark")
if frame:
    worker, due = frame.f_globals, []
    send = worker["send"]
    def sent(replies, reply):
        send(replies, reply)
        while due: note(due.pop())
    def work(x):
        due.append(x)
        return once(x)
    worker["send"] = sent
"""
)


def chained(setting: Setting) -> None:
    """A hundred calls per request, each of which is given the output of the one before."""
    setting.own["inputs.py"] = OWN["inputs.py"].replace("range(150)", "range(40)")
    setting.own["following.py"] = "def following(given, output): return (output,)\n"
    setting.workload = f'{CALL}, chain = "following.py:following", links = 100'


def unchained(setting: Setting) -> None:
    """What a chain's links take is nothing that a patched worker could spare."""
    of_base = _Series._of_base

    def found(one: _Series, name: str, *given: object) -> float:
        return 0.0 if name == one.plan.primary else of_base(one, name, *given)  # type: ignore[arg-type]

    setting.remove(_Series, "_of_base", found)


WORKER = [
    Trick(
        "spoilt arguments hidden from the check",
        "rejected:incorrect",
        "a program that no patch can know calls the function, too, and asks for its arguments afterwards",
        {"work.py": HIDES},
        control=lambda setting: setting.remove(elsewhere, "differs", lambda *_: ""),
    ),
    Trick(
        "a chain answered at once",
        "neutralised:undecided",
        "all of a chain but one call is what a patched worker could spare",
        {"work.py": FUSES},
        base={"work.py": HALVES},
        needs=chained,
        control=unchained,
        or_else=("void",),
    ),
    Trick(
        "work after the answer",
        "neutralised:undecided",
        "what is called faster is so from one answer to the next, too, where nothing is asked between them",
        {"work.py": LATER},
        base={"work.py": JOURNAL},
        control=lambda setting: setting.remove(series._Series, "_late", lambda *_: 0.0),
        or_else=("equivalent", "slower", "void"),
    ),
]
