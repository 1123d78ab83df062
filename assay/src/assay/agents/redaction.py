"""Secrets are taken out of whatever is kept: as they are, in pieces, spread out, and in the usual encodings.

A piece of LEAST bytes in a row is found wherever it stands, so a key that is cut in two is redacted on both sides.
Between two bytes of a secret a few separators may stand: quotes, plus signs, line ends. Not found: what was
compressed or encrypted, and pieces shorter than LEAST that stand apart.
"""

import base64
import re
import urllib.parse
from collections.abc import Iterable, Iterator
from pathlib import Path

LEAST = 10
"""Bytes of a secret in a row that are redacted; of a shorter secret, all of it."""
MARK = b"[redacted]"
_BETWEEN = rb"(?:[^A-Za-z0-9]|\\n|\\r|\\t){0,6}"
_LEAST_SECRET = 6


class Redactor:
    """Knows some secrets."""

    def __init__(self, secrets: Iterable[str]) -> None:
        """ValueError for one that is too short to be told from other text."""
        known = {secret.encode() for secret in secrets}
        if any(len(secret) < _LEAST_SECRET for secret in known):
            raise ValueError(f"keys: expected secrets of at least {_LEAST_SECRET} bytes, got a shorter one")
        forms = sorted({form for secret in known for form in _forms(secret)}, key=len, reverse=True)
        self._pieces = {form[i : i + LEAST] for form in forms for i in range(max(1, len(form) - LEAST + 1))}
        self._spread = re.compile(b"|".join(map(_spread, forms)), re.IGNORECASE) if forms else None

    def clean(self, data: bytes) -> tuple[bytes, int]:
        """The data without any secret, and how many places were redacted."""
        if self._spread is None:
            return data, 0
        data, count = self._spread.subn(MARK, data)
        spans = list(self._found(data))
        for start, end in reversed(spans):
            data = data[:start] + MARK + data[end:]
        return data, count + len(spans)

    def _found(self, data: bytes) -> Iterator[tuple[int, int]]:
        """Spans that pieces of secrets cover, overlapping ones joined."""
        places = []
        for piece in self._pieces:
            at = data.find(piece)
            while at >= 0:
                places.append((at, at + len(piece)))
                at = data.find(piece, at + 1)
        start, end = -1, -1
        for one, other in sorted(places):
            if one > end:
                if end >= 0:
                    yield start, end
                start = one
            end = max(end, other)
        if end >= 0:
            yield start, end

    def clean_text(self, text: str) -> str:
        """As `clean`, of text."""
        return self.clean(text.encode(errors="surrogateescape"))[0].decode(errors="surrogateescape")

    def clean_file(self, path: Path) -> int:
        """Rewrites a file if it holds a secret; how many places were redacted."""
        data = path.read_bytes()
        cleaned, count = self.clean(data)
        if count:
            path.write_bytes(cleaned)
        return count


def _forms(secret: bytes) -> Iterator[bytes]:
    """A secret as people and programs write it: plain, reversed, hexadecimal, quoted, and base64 at each alignment."""
    yield secret
    yield secret[::-1]
    yield secret.hex().encode()
    yield secret.hex().upper().encode()
    yield urllib.parse.quote(secret, safe="").encode()
    for shift in range(3):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            whole = encode(b"\0" * shift + secret).rstrip(b"=")
            # The letters at both ends hold bits of the neighbours, too.
            inner = whole[(shift * 8 + 5) // 6 :]
            yield inner[:-1] if (len(secret) + shift) % 3 else inner


def _spread(form: bytes) -> bytes:
    return _BETWEEN.join(re.escape(form[i : i + 1]) for i in range(len(form)))
