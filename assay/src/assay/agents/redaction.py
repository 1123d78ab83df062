"""Secrets are taken out of whatever is kept: as they are, in pieces, spread out, and in the usual encodings.

Only letters and digits are looked at, without regard to case, so that quotes, plus signs, line ends and escapes between
them hide nothing. LEAST of them in a row, as they stand in a secret, are redacted wherever they are: a key that is cut
in two is found on both sides. Not found: what was compressed or encrypted, and shorter pieces that stand apart.
"""

import base64
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

LEAST = 10
"""Letters and digits of a secret in a row that are redacted; of a shorter secret, all of them."""
MARK = b"[redacted]"
_BLOCK = LEAST // 2
"""A run of LEAST holds a whole block of this length, wherever blocks begin."""
_SHORTEST = 6
_ESCAPED = re.compile(rb"\\+[nrt]|%[0-9A-Fa-f]{2}")


class Redactor:
    """Knows some secrets."""

    def __init__(self, secrets: Iterable[str]) -> None:
        """ValueError for one that is too short to be told from other text."""
        known = [secret.encode() for secret in secrets]
        if any(len(_bare(secret)) < _SHORTEST for secret in known):
            raise ValueError(f"keys: expected secrets with at least {_SHORTEST} letters and digits, got a shorter one")
        self._forms = {bare for secret in known for form in _forms(secret) if len(bare := _bare(form)) >= _SHORTEST}

    def clean(self, data: bytes) -> tuple[bytes, int]:
        """The data without any secret, and how many places were redacted."""
        if not self._forms:
            return data, 0
        letters = np.frombuffer(data, dtype=np.uint8)
        kept = _ALNUM[letters]
        for match in _ESCAPED.finditer(data):
            kept[match.start() : match.end()] = False
        places = np.flatnonzero(kept)
        # What looks like an escape may be none, so that the letters are looked at with and without them.
        spans = [*self._found(data, places), *self._found(data, np.flatnonzero(_ALNUM[letters]))]
        joined: list[list[int]] = []
        for start, end in sorted(spans):
            if joined and start <= joined[-1][1]:
                joined[-1][1] = max(joined[-1][1], end)
            else:
                joined.append([start, end])
        for start, end in reversed(joined):
            data = data[:start] + MARK + data[end:]
        return data, len(joined)

    def _found(self, data: bytes, places: "np.typing.NDArray[np.intp]") -> Iterator[tuple[int, int]]:
        """Spans of the data that hold a form, or LEAST of it in a row. `places`: [letters] those that are looked at."""
        text = np.frombuffer(data, dtype=np.uint8)[places].tobytes().lower()
        for form in self._forms:
            least = min(LEAST, len(form))
            for offset in range(0, len(form), _BLOCK):
                block = form[offset : offset + _BLOCK]
                at = text.find(block) if len(block) == _BLOCK else -1
                while at >= 0:
                    start, end = _extended(text, at, form, offset, len(block))
                    if end - start >= least:
                        yield int(places[start]), int(places[end - 1]) + 1
                    at = text.find(block, at + 1)

    def clean_text(self, text: str) -> str:
        """As `clean`, of text."""
        return self.clean(text.encode(errors="surrogateescape"))[0].decode(errors="surrogateescape")

    def clean_file(self, path: Path) -> int:
        """Rewrites a file if it holds a secret; how many places were redacted."""
        cleaned, count = self.clean(path.read_bytes())
        if count:
            path.write_bytes(cleaned)
        return count


_ALNUM = np.array([chr(code).isascii() and chr(code).isalnum() for code in range(256)])


def _extended(text: bytes, at: int, form: bytes, offset: int, size: int) -> tuple[int, int]:
    """The longest run around a block that stands in both."""
    start, end = at, at + size
    while start > 0 and start - at + offset > 0 and text[start - 1] == form[start - 1 - at + offset]:
        start -= 1
    while end < len(text) and end - at + offset < len(form) and text[end] == form[end - at + offset]:
        end += 1
    return start, end


def _bare(form: bytes) -> bytes:
    """Its letters and digits, small."""
    return re.sub(rb"[^A-Za-z0-9]", b"", form).lower()


def _forms(secret: bytes) -> Iterator[bytes]:
    """A secret as people and programs write it: plain, reversed, hexadecimal, and base64 at each alignment."""
    yield secret
    yield secret[::-1]
    yield secret.hex().encode()
    for shift in range(3):
        whole = base64.b64encode(b"\0" * shift + secret).rstrip(b"=")
        inner = whole[(shift * 8 + 5) // 6 :]  # letters at the ends hold bits of the neighbours, too
        yield inner[:-1] if (len(secret) + shift) % 3 else inner
