"""A rendered prompt, as harnesses write them for agents: its parts with their lines, and what a task makes of them.

Structure and demands are those of the benchmark whose prompts have a test script, lists of target files, constraints,
statistics of the reference and a block of commands at the end. Nothing in a prompt is obeyed.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from assay.contract.mined import Part

_TAG = re.compile(r"^<(/?)([a-z_]+)>\s*$")
_HEADING = re.compile(r"^(?:#{1,6}\s+.+|[A-Z][^`]{3,100}:)\s*$")
_BULLET = re.compile(r"^\s*(?:[-*]|\d+\.)\s+(.*)$")
_PATH = re.compile(r"^`?([\w.@+-]+(?:/[\w.@+-]+)*\.\w+)`?$")
_STAT = re.compile(r"^\s*(\S+)\s+\|\s+(\d+)\s+([+-]*)\s*$")
_STAT_SUM = re.compile(r"(\d+) files? changed(?:, (\d+) insertions?\(\+\))?(?:, (\d+) deletions?\(-\))?")
_ORDER = re.compile(
    r"\b(?:by|within|before|until) iteration \d+|at least \d+ (?:concrete )?(?:edits|optimi[sz]ations)|no more analysis"
    r"|immediately|finish command",
    re.IGNORECASE,
)
_BROKEN_TEXT = re.compile("(?:\u00e2\u20ac|\u00e2\u2020|\u00c3[\u0080-\u00bf])")
_CHECKS = re.compile(r"(?:^|/)(?:tests?|benchmarks?)/")
_MUST = re.compile(r"\b(?:MUST|must fail|will fail|CRITICAL|IMPORTANT)\b")


@dataclass(frozen=True)
class Piece:
    """Some lines of a prompt."""

    kind: str
    """script, example, targets, only, constraint, statistics, order, hint, message, completion, demand or place."""
    first: int
    last: int
    text: str


@dataclass
class Prompt:
    """What a prompt says."""

    file: Path
    pieces: list[Piece] = field(default_factory=list)
    wrong: list[Piece] = field(default_factory=list)
    """Where it contradicts itself or is damaged; `text` says how."""

    def of(self, kind: str) -> list[Piece]:
        """All pieces of a kind."""
        return [one for one in self.pieces if one.kind == kind]

    @property
    def targets(self) -> list[str]:
        """Every file that it asks to change, in the order of its lists; those that it allows alone come last."""
        found = [path for kind in ("targets", "only") for one in self.of(kind) for path in one.text.split("\n")]
        return list(dict.fromkeys(found))

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """(added, removed) lines by path, from the statistics, as far as their bars of + and - tell them."""
        found = {}
        for one in self.of("statistics"):
            for line in one.text.split("\n"):
                if match := _STAT.match(line):
                    total, bar = int(match[2]), match[3]
                    removed = round(total * bar.count("-") / len(bar)) if bar else 0
                    found[self._whole(match[1])] = (total - removed, removed)
        return found

    def _whole(self, path: str) -> str:
        """The target that an abbreviated path of the statistics means."""
        end = path.removeprefix("...")
        return next((target for target in self.targets if target.endswith(end)), path)


def read(file: Path) -> Prompt:
    """The prompt in a file. ValueError for one that has neither a script nor targets, OSError for none."""
    lines = file.read_text(errors="replace").split("\n")
    found = Prompt(file)
    found.pieces = list(_pieces(lines))
    if not found.of("script") and not found.targets:
        raise ValueError(f"{file}:1: expected a prompt with <test_script> or a list of target files, got neither")
    found.wrong = list(_wrong(found, lines))
    return found


def _pieces(lines: list[str]) -> Iterator[Piece]:
    number, heading = 0, ""
    while number < len(lines):
        line = lines[number]
        if (tag := _TAG.match(line)) and not tag[1]:
            end = _until(lines, number, f"</{tag[2]}>")
            kind = "script" if "script" in tag[2] else "example"
            yield Piece(kind, number + 2, end, "\n".join(lines[number + 1 : end]))
            number = end + 1
            continue
        if line.startswith("```"):
            end = _until(lines, number, "```")
            yield from _fenced(heading, number, end, lines)
            number = end + 1
            continue
        if _HEADING.match(line):
            heading = line.strip("#: \t")
            if end := _listed(lines, number + 1):
                yield from _list(heading, number + 1, end, lines)
                number = end
                continue
        if _ORDER.search(line):
            yield Piece("order", number + 1, number + 1, line.strip())
        elif _MUST.search(line):
            yield Piece("demand", number + 1, number + 1, line.strip())
        elif match := re.search(r"(?:^|\s)(/(?:[\w.-]+/){2,}[\w.-]+)", line):
            yield Piece("place", number + 1, number + 1, match[1])
        number += 1


def _until(lines: list[str], start: int, end: str) -> int:
    """The line on which a block ends; the last one, if it does not."""
    return next((i for i in range(start + 1, len(lines)) if lines[i].strip() == end), len(lines) - 1)


def _listed(lines: list[str], start: int) -> int:
    """Behind the last bullet of a list that begins here; 0 if none does."""
    end = start
    while end < len(lines) and (_BULLET.match(lines[end]) or (lines[end].startswith("   ") and end > start)):
        end += 1
    return end if end > start else 0


def _list(heading: str, start: int, end: int, lines: list[str]) -> Iterator[Piece]:
    """A list under a heading: files, constraints, orders or hints."""
    items = [(i, match[1].strip()) for i in range(start, end) if (match := _BULLET.match(lines[i]))]
    paths = [match[1] for _, text in items if (match := _PATH.match(text))]
    if paths and len(paths) == len(items):
        yield Piece("only" if re.search(r"\bonly\b", heading, re.I) else "targets", start + 1, end, "\n".join(paths))
        return
    for i, text in items:
        lowered = heading.lower()
        if _ORDER.search(text):
            kind = "order"
        elif "constraint" in lowered or "guideline" in lowered:
            kind = "constraint"
        elif "step" in lowered:
            kind = "order"
        else:
            kind = "hint"
        yield Piece(kind, i + 1, i + 1, text)


def _fenced(heading: str, start: int, end: int, lines: list[str]) -> Iterator[Piece]:
    text = "\n".join(lines[start + 1 : end])
    if any(_STAT.match(line) for line in lines[start + 1 : end]):
        kind = "statistics"
    elif re.search(r"\bgit (?:add|commit|diff)\b", text):
        kind = "completion"
    elif "command" in heading.lower() or lines[start].startswith("```bash"):
        kind = "hint"
    else:
        kind = "message"
    yield Piece(kind, start + 2, end, text)


def _wrong(prompt: Prompt, lines: list[str]) -> Iterator[Piece]:
    lists = [*prompt.of("targets"), *prompt.of("only")]
    for one in lists[1:]:
        if set(one.text.split("\n")) != set(lists[0].text.split("\n")):
            words = f"names other files than the list of lines {lists[0].first}-{lists[0].last}"
            yield Piece("targets", one.first, one.last, words)
            break
    no_tests = next((one for one in prompt.of("constraint") if "non-test" in one.text), None)
    for one in lists:
        tests = [path for path in one.text.split("\n") if _CHECKS.search(path)]
        if no_tests and tests:
            words = f"names {', '.join(tests)}, while line {no_tests.first} allows files alone that are no tests"
            yield Piece("targets", one.first, one.last, words)
            break
    for one in prompt.of("completion"):
        if "merge-base" in one.text:
            words = "takes the patch from merge-base, or from the last commit alone where there is no remote"
            yield Piece("completion", one.first, one.last, words)
    broken = [i for i, line in enumerate(lines, 1) if _BROKEN_TEXT.search(line)]
    if broken:
        yield Piece("text", broken[0], broken[-1], "UTF-8 that was read as another encoding")


_BECOMES = {
    "script": ("workload", "the script; it prints a time of its own, which is not read"),
    "example": ("", "lines of the reference: whoever reads them has the answer"),
    "targets": ("scope.files", "those that are no tests, benchmarks, build files"),
    "only": ("scope.files", "those that are no tests, benchmarks, build files"),
    "statistics": ("", "sizes of the reference's changes; kept for the audit of what a prompt gives away"),
    "order": ("", "an order of steps or iterations; the budget counts seconds, and no step is prescribed"),
    "hint": ("", "a hint at the reference or at a strategy"),
    "message": ("", "the reference's message; kept for the audit of what a prompt gives away"),
    "completion": ("", "how an agent hands in; the judge computes the patch itself"),
    "demand": ("", "a demand without a measurement: a task that changes nothing is `no_patch`"),
    "place": ("", "a path of the machine on which the prompt was made"),
}


def parts(prompt: Prompt) -> list[Part]:
    """Every piece with its lines: what of a task it becomes, or why it was dropped."""
    found = []
    for one in sorted(prompt.pieces, key=lambda piece: piece.first):
        became, words = _BECOMES.get(one.kind, ("", ""))
        if one.kind == "constraint":
            became, words = _constraint(one.text)
        found.append(Part(one.kind, one.first, max(one.first, one.last), became, f"{words}: {_short(one.text)}"))
    return found + [Part(f"wrong {one.kind}", one.first, one.last, "", one.text) for one in prompt.wrong]


def _constraint(text: str) -> tuple[str, str]:
    """A constraint in the words of a task."""
    lowered = text.lower()
    if "api" in lowered:
        return "api.packages", "the public API is compared by the judge"
    if "testpack" in lowered:
        return "tests.command", "the repository's tests; a pack of tests that is named and not given is dropped"
    if "equivalent" in lowered:
        return "property", "outputs are compared on drawn inputs"
    if "non-test" in lowered or "only inside" in lowered:
        return "scope.files", "files outside the scope are put back or rejected"
    if "rebuild" in lowered:
        return "commands.build", "every arm is built by the judge"
    return "", "nothing that can be measured"


def _short(text: str) -> str:
    kept = [line for line in text.split("\n") if not re.match(r"[A-Z][A-Za-z-]*-[Bb]y: ", line)]
    words = " ".join(" ".join(kept).split())
    return words if len(words) <= 80 else f"{words[:77]}..."
