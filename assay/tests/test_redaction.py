"""A planted key is found in whatever form it is written, and other text stays."""

import base64
import contextlib
import time
import urllib.parse

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.agents.redaction import LEAST, MARK, Redactor

KEY = "sk-planted+0Aq7Zt9x/Wv3LmB5d=="
FORMS = {
    "plain": KEY,
    "in words": f"the key is '{KEY}', yes",
    "reversed": KEY[::-1],
    "hexadecimal": KEY.encode().hex(),
    "upper hexadecimal": KEY.encode().hex().upper(),
    "quoted for a URL": urllib.parse.quote(KEY, safe=""),
    "base64": base64.b64encode(KEY.encode()).decode(),
    "base64 in the middle": base64.b64encode(f'{{"key":"{KEY}"}}'.encode()).decode(),
    "base64 shifted": base64.b64encode(f"ab{KEY}x".encode()).decode(),
    "base64 for URLs": base64.urlsafe_b64encode(KEY.encode()).decode(),
    "base64 in lines": base64.encodebytes(f"{'x' * 50}{KEY}".encode()).decode(),
    "added up": f'"{KEY[:9]}" + "{KEY[9:]}"',
    "a letter per line": "\n".join(KEY),
    "in escaped lines": "\\n".join(KEY),
    "with blanks": " ".join(KEY),
    "its first half": KEY[: len(KEY) // 2],
    "its second half": KEY[len(KEY) // 2 :],
    "other case": KEY.swapcase(),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str) -> None:
    """Nothing of the key's own letters is left in a row, but for what is too short to be a piece."""
    cleaned, count = Redactor([KEY]).clean(FORMS[name].encode())
    assert count and MARK in cleaned
    left = "".join(letter for letter in cleaned.replace(MARK, b"").decode() if letter.isalnum())
    assert Redactor([KEY]).clean(left.encode())[1] == 0 and len(left) < len(FORMS[name]) - LEAST


def test_other_text_stays() -> None:
    text = b"nothing of it here: sk-other-1234567890, base64 c29tZXRoaW5nIGVsc2U=\n" * 20
    assert Redactor([KEY]).clean(text) == (text, 0) and Redactor([]).clean(text) == (text, 0)
    twice = b"a " + KEY.encode() + b" b " + KEY.encode()
    assert Redactor([KEY]).clean(twice) == (b"a " + MARK + b"== b " + MARK + b"==", 2)


def test_a_key_that_is_too_short() -> None:
    with pytest.raises(ValueError, match="keys: expected secrets with at least 6 letters"):
        Redactor(["abc-=-=-="])


def padded(data: bytes) -> bytes:
    return data + b"=" * (-len(data) % 4)


ENCODINGS = {
    "plain": (bytes, bytes),
    "base64": (base64.b64encode, lambda data: base64.b64decode(padded(data))),
    "base64 for URLs": (base64.urlsafe_b64encode, lambda data: base64.urlsafe_b64decode(padded(data))),
    "hexadecimal": (lambda data: data.hex().encode(), lambda data: bytes.fromhex(data.decode())),
}


@settings(max_examples=60, deadline=None)
@given(
    st.text("ABCDEFGHabcdefgh0123456789-_", min_size=24, max_size=48).filter(lambda key: len(set(key)) > 6),
    st.binary(max_size=20),
    st.binary(max_size=20),
    st.sampled_from(sorted(ENCODINGS)),
)
def test_whatever_stands_around(key: str, before: bytes, after: bytes, name: str) -> None:
    """The key cannot be read from what is left, decoded or not."""
    encode, decode = ENCODINGS[name]
    cleaned, count = Redactor([key]).clean(encode(before + key.encode() + after))
    assert count >= 1
    for part in cleaned.split(MARK):
        assert key.encode() not in part
        for cut in range(4):
            with contextlib.suppress(ValueError):
                assert key.encode() not in decode(part[cut:])


def test_much_text_takes_little_time() -> None:
    start = time.perf_counter()
    assert Redactor([KEY]).clean(b"a quick brown fox, 0123456789\n" * (1 << 17) + KEY.encode())[1] == 1
    assert time.perf_counter() - start < 20
