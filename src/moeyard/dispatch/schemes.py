"""Which rows of the table take which quantised weights. A row without an entry refuses every scheme in words."""

from collections.abc import Callable
from dataclasses import replace

from moeyard.quant import QuantScheme, fits_tiles

_KNOWN = frozenset(("e4m3", "int8", "int4", "e2m1"))


def _known(scheme: QuantScheme) -> bool:
    return scheme.weights in _KNOWN and not scheme.tiled


def _in_rows(scheme: QuantScheme) -> bool:
    return not scheme.tiled


def _coded(scheme: QuantScheme) -> bool:
    """8-bit weights times rows of the same codes: scales per matrix or row and token, or in blocks of 128."""
    of_rows = scheme.block in ((0, 0), (1, 0)) and not scheme.activation_group
    of_blocks = scheme.block == (128, 128) and scheme.activation_group == 128 and scheme.weights == "e4m3"
    codes = scheme.weights in ("e4m3", "int8") and scheme.activations == scheme.weights
    return codes and scheme.scales == "float" and not scheme.global_scales and (of_rows or of_blocks)


def _eight_bits(scheme: QuantScheme) -> bool:
    """Codes of 8 bits with scales per matrix, per row or per 128 x 128, and rows of 16 bits or of the code."""
    rows = scheme.activations in ("none", scheme.weights) and scheme.activation_group in (0, 128)
    plain = scheme.weights in ("e4m3", "int8") and scheme.scales == "float" and not scheme.global_scales
    return plain and rows and scheme.block in ((0, 0), (1, 0), (128, 128))


def _tiles(scheme: QuantScheme) -> bool:
    """Weights of 4 bits in tiles (`pack_experts`), times rows as they are."""
    return scheme.tiled and scheme.activations == "none"


def _eight_bits_or_tiles(scheme: QuantScheme) -> bool:
    """Also tiles times rows of e4m3, one scale each."""
    return _eight_bits(scheme) or scheme.tiled


TAKES: dict[str, Callable[[QuantScheme], bool]] = {
    "cpu": _known,
    "cuda (products)": _coded,
    "cuda (few tokens)": _eight_bits,
    "cuda (few tokens of 4 bits)": _tiles,
    "cuda (many tokens of 4 bits)": _tiles,
    "triton": _eight_bits_or_tiles,
    "torch": _known,
    "reference": _in_rows,
}
"""By the labels of rows ("cpu", "cuda (products)"): whether it takes a scheme."""


def refusal_of(label: str, scheme: QuantScheme | None) -> str | None:
    """Why a row of the table takes no weights of a scheme, in words; None if it does."""
    if scheme is None or (label in TAKES and TAKES[label](scheme)):
        return None
    if fits_tiles(scheme) and not scheme.tiled and label in TAKES and TAKES[label](replace(scheme, tiled=True)):
        return f"takes weights of scheme {str(scheme)!r} in tiles alone (pack_experts)"
    return f"takes no weights of scheme {str(scheme)!r}"
