"""Which functions a change touches, with their signatures: read from the text, nothing is imported."""

import ast
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

_ROOTS = ("src", "lib", "python")
Definition = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Parameter:
    """One parameter, as it is written."""

    name: str
    annotation: str = ""
    default: str = ""
    kind: str = "positional"
    """positional, keyword, args or kwargs."""


@dataclass(frozen=True)
class Function:
    """A function of a module."""

    name: str
    """Qualified: `Class.method`."""
    line: int
    parameters: tuple[Parameter, ...]
    returns: str = ""
    owner: str = ""
    """The class whose method it is; "" for a function of the module."""
    static: bool = False
    """Of a class: whether it takes neither object nor class."""

    @property
    def public(self) -> bool:
        """Whether callers may call it by its name; `__init__` is called by its class's."""
        return not any(part.startswith("_") for part in self.name.removesuffix(".__init__").split("."))


def functions(text: str) -> list[tuple[Function, int, int]]:
    """Every function of a module and its methods, with first and last line, decorators and all. [] if it is no Python.

    Functions inside functions belong to the outer one.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    return list(_walk(tree.body, ""))


def _walk(body: Sequence[ast.stmt], owner: str) -> Iterator[tuple[Function, int, int]]:
    for node in body:
        if isinstance(node, Definition):
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            yield _function(node, owner), first, node.end_lineno or node.lineno
        elif isinstance(node, ast.ClassDef):
            yield from _walk(node.body, f"{owner}.{node.name}".lstrip("."))
        elif isinstance(node, ast.If | ast.Try):
            yield from _walk([*node.body, *node.orelse], owner)


def _function(node: Definition, owner: str) -> Function:
    given = node.args
    plain = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(plain) - len(given.defaults)) + list(given.defaults)
    found = [_parameter(one, default, "positional") for one, default in zip(plain, defaults, strict=True)]
    found += [_parameter(given.vararg, None, "args")] if given.vararg else []
    found += [_parameter(one, value, "keyword") for one, value in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    found += [_parameter(given.kwarg, None, "kwargs")] if given.kwarg else []
    decorators = {ast.unparse(one) for one in node.decorator_list}
    static = "staticmethod" in decorators
    if owner and not static:
        found = found[1:]
    returns = ast.unparse(node.returns) if node.returns else ""
    return Function(f"{owner}.{node.name}".lstrip("."), node.lineno, tuple(found), returns, owner, static)


def _parameter(one: ast.arg, default: ast.expr | None, kind: str) -> Parameter:
    annotation = ast.unparse(one.annotation) if one.annotation else ""
    return Parameter(one.arg, annotation, ast.unparse(default) if default is not None else "", kind)


def touched(text: str, lines: Iterable[int]) -> list[Function]:
    """The functions in which some of the lines lie, in the order of the file."""
    wanted = set(lines)
    return [one for one, first, last in functions(text) if wanted & set(range(first, last + 1))]


def bodies(text: str) -> set[int]:
    """Lines that run only when a function is called: statements of functions, without the lines that define them."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return set()
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, Definition):
            for one in node.body:
                found |= set(range(one.lineno, (one.end_lineno or one.lineno) + 1))
    return found


def module_of(path: str) -> str:
    """The name by which a file is imported, seen from the folder in which its package lies."""
    parts = list(PurePosixPath(path).with_suffix("").parts)
    if len(parts) > 1 and parts[0] in _ROOTS:
        parts = parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
