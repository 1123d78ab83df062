"""What a traceback says to somebody who did not write the program: the exception, and where it was raised."""

import re

_BEGIN = "Traceback (most recent call last):"
_PLACE = re.compile(r'^ +File "(?P<file>.+)", line (?P<line>\d+)(?:, in (?P<function>.+))?$')

_OURS = ("/assay/worker.py", "/arms/inside/worker.py")
"""What calls the program says nothing of where it failed."""


def brief(words: str) -> str:
    """The words with each traceback as one line, `ValueError: no (pkg/work.py:3, in work)`; others as they are."""
    kept: list[str] = []
    lines = words.splitlines()
    while lines:
        line = lines.pop(0)
        before, mark, _ = line.partition(_BEGIN)
        if not mark:
            kept.append(line)
            continue
        place = ""
        while lines and (not lines[0].strip() or lines[0].startswith(" ")):
            found = _PLACE.match(lines.pop(0))
            if found and not found["file"].endswith(_OURS):
                place = f"{found['file']}:{found['line']}" + (f", in {found['function']}" if found["function"] else "")
        raised = lines.pop(0) if lines else "an exception that was not told"
        kept.append(f"{before}{raised}{f' ({place})' if place else ''}")
    return "\n".join(kept)
