"""The two functions of vllm.utils that the wrapper imports."""


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(a // -b)


def round_up(x: int, y: int) -> int:
    """The least multiple of y that is at least x."""
    return cdiv(x, y) * y
