"""Python expressions that draw a value of an annotated type: from `random`, and as a strategy of hypothesis."""

import ast

from assay.mining.functions import Parameter

_RANDOM = {
    "int": "random.randint(0, 1000)",
    "float": "random.uniform(0, 1000)",
    "bool": "random.random() < 0.5",
    "str": '"".join(random.choices("abc 0123456789", k=200))',
    "bytes": "random.randbytes(200)",
}
_STRATEGY = {
    "int": "strategies.integers(0, 1000)",
    "float": "strategies.floats(allow_nan=False)",
    "bool": "strategies.booleans()",
    "str": "strategies.text(max_size=50)",
    "bytes": "strategies.binary(max_size=50)",
}
_LISTS = ("list", "List", "Sequence", "Iterable", "Collection", "Iterator")
_TUPLES = ("tuple", "Tuple")


def drawn(parameter: Parameter) -> str:
    """An expression that draws a value from `random`; "" if the annotation does not say enough."""
    return _of(parameter, _RANDOM, "[{one} for _ in range(200)]", "({ones},)")


def strategy(parameter: Parameter) -> str:
    """An expression that is a strategy; "" if the annotation does not say enough."""
    return _of(parameter, _STRATEGY, "strategies.lists({one}, max_size=20)", "strategies.tuples({ones})")


def _of(parameter: Parameter, simple: dict[str, str], many: str, several: str) -> str:
    if not parameter.annotation:
        return ""
    try:
        node = ast.parse(parameter.annotation.strip("\"'"), mode="eval").body
    except SyntaxError:
        return ""
    return _node(node, simple, many, several)


def _node(node: ast.expr, simple: dict[str, str], many: str, several: str) -> str:
    if isinstance(node, ast.Name):
        return simple.get(node.id, "")
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):  # the first that can be drawn stands for all
        return _node(node.left, simple, many, several) or _node(node.right, simple, many, several)
    if not isinstance(node, ast.Subscript):
        return ""
    name = ast.unparse(node.value).rpartition(".")[2]
    inside = list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]
    if name == "Optional":
        return _node(inside[0], simple, many, several)
    ones = [_node(one, simple, many, several) for one in inside if not isinstance(one, ast.Constant)]
    if not all(ones) or not ones:
        return ""
    if name in _LISTS or (name in _TUPLES and len(ones) == 1):
        return many.format(one=ones[0])
    return several.format(ones=", ".join(ones)) if name in _TUPLES else ""
