"""What a script imports and calls, read from its text; nothing of it is run."""

import ast
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from assay.mining.functions import Function


@dataclass(frozen=True)
class Import:
    """A name that the script binds: `from module import name as bound`, or `import module`."""

    module: str
    name: str
    bound: str
    line: int


@dataclass(frozen=True)
class Call:
    """A call of a name that was imported."""

    name: str
    line: int
    positional: tuple[str, ...]
    """Arguments as they are written."""
    keywords: tuple[str, ...]


@dataclass
class Script:
    """Facts of a script; lines are those of the file that holds it."""

    imports: list[Import] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    problem: str = ""
    """Why it is no Python, with its line; then nothing else is known."""
    line: int = 1


def read(text: str, first: int = 1) -> Script:
    """The facts of a script that begins on line `first` of a file."""
    found = Script(line=first)
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as problem:
        found.problem, found.line = str(problem), first + (getattr(problem, "lineno", 1) or 1) - 1
        return found
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.imports += [
                Import(one.name, "", one.asname or one.name, node.lineno + first - 1) for one in node.names
            ]
        elif isinstance(node, ast.ImportFrom) and node.module:
            line = node.lineno + first - 1
            found.imports += [Import(node.module, one.name, one.asname or one.name, line) for one in node.names]
    bound = {one.bound for one in found.imports}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (name := ast.unparse(node.func)).split(".")[0] in {
            one.split(".")[0] for one in bound
        }:
            positional = tuple(ast.unparse(one) for one in node.args)
            keywords = tuple(one.arg or "**" for one in node.keywords)
            found.calls.append(Call(name, node.lineno + first - 1, positional, keywords))
    return found


def candidates(one: Import) -> list[str]:
    """Files that an import may mean, as ends of paths: module and package of it, and of the name taken from it."""
    names = [one.module, *([f"{one.module}.{one.name}"] if one.name else [])]
    paths = [name.replace(".", "/") for name in names]
    return [f"{path}{end}" for path in paths for end in (".py", "/__init__.py")]


def meant(one: Import, paths: Iterable[str]) -> list[str]:
    """Those of some paths that an import may mean."""
    ends = candidates(one)
    return [path for path in paths if any(path == end or path.endswith(f"/{end}") for end in ends)]


def submodule(one: Import, paths: Sequence[str]) -> str:
    """The file which shows that a name, taken from a package, is a module of it; "" if none of the paths does."""
    end = f"{one.module}.{one.name}".replace(".", "/") + ".py"
    return next((path for path in paths if path == end or path.endswith(f"/{end}")), "")


def exports(text: str, name: str) -> bool:
    """Whether a module binds a name: by an import, a definition or an assignment. True if its text is no Python."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return True
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            for alias in node.names:
                if (alias.asname or alias.name) in (name, "*"):
                    return True
        elif (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == name) or (
            isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id == name
        ):
            return True
    return False


def swapped(call: Call, function: Function) -> list[str]:
    """Arguments that are named like another parameter than the one they are passed for, in words."""
    places = [one.name for one in function.parameters if one.kind == "positional"]
    return [
        f"{given} is passed for {places[i]}"
        for i, given in enumerate(call.positional[: len(places)])
        if given in places and given != places[i]
    ]
