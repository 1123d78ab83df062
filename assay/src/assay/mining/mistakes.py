"""What a task names and is not there: functions, modules, programs. Read from files; nothing of a tree is run.

It says only what is certain. A module that sets names at run time, one that a build makes, and a class with bases may
have what is asked for.
"""

import ast
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from assay.contract.positions import line_of
from assay.contract.task import Read, functions_of
from assay.contract.workload import Workload
from assay.mining import history

Place = tuple[str | int, ...]
_PROGRAMS = ("/usr/local/bin", "/usr/bin", "/bin")
_PACKAGE = "__init__.py"


def mistakes(read: Read, python: str) -> list[str]:
    """A line per mistake, with file and line of the task; [] if there is none that can be seen.

    `python`: the interpreter of arms, beside which its programs lie.
    """
    tree = _Tree(read)
    found = [*_functions(read, tree), *_programs(read, tree, python)]
    return [f"{read.file}:{line_of(read.text, place)}: {_dotted(place)}: {words}" for place, words in found]


class _Tree:
    """Base's files, from its commit or from the directory."""

    def __init__(self, read: Read) -> None:
        self.read = read
        self.builds = bool(read.task.commands.setup or read.task.commands.build)

    @cached_property
    def paths(self) -> frozenset[str]:
        if self.read.base:
            return frozenset(history.paths(self.read.repository, self.read.base))
        root = self.read.repository
        return frozenset(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())

    def text(self, path: str) -> str:
        if self.read.base:
            return history.text(self.read.repository, self.read.base, path)
        return (self.read.repository / path).read_text(errors="replace")

    def holds(self, prefix: str) -> bool:
        return any(path.startswith(prefix) for path in self.paths)


def _functions(read: Read, tree: _Tree) -> Iterator[tuple[Place, str]]:
    for place, name, _ in functions_of(read.task):
        kind, index, *_ = place
        run = read.task.workload[int(index)].run if kind == "workload" else Workload("call")
        script = place[-1] == "target" and run.kind in ("pyperf", "pytest")
        if words := _missing(read, tree, name, run, script=script):
            yield place, words


def _missing(read: Read, tree: _Tree, name: str, run: Workload, *, script: bool) -> str:
    """What is wrong with `module:function` or `file.py:function`; "" if nothing is certain."""
    where, _, attribute = name.partition(":")
    own = read.own(name)
    if own is not None:
        text = own.read_text(errors="replace")
    elif where.endswith(".py"):
        if where not in tree.paths:
            return "" if tree.builds else f"expected a file of the task or of base, got {where}"
        text = tree.text(where)
    else:
        more = read.task.sandbox.environment.get("PYTHONPATH", "").split(os.pathsep)
        path = _module(tree, where, (*run.paths, *more))
        if path is None:
            return _not_found(tree, where, run)
        if not path or (path.endswith(_PACKAGE) and tree.holds(path.removesuffix(_PACKAGE) + attribute.split(".")[0])):
            return ""
        text = tree.text(path)
    return "" if script else _lacks(text, where, attribute)


def _module(tree: _Tree, name: str, folders: Iterable[str]) -> str | None:
    """The file of a module in a tree; "" if something else is there under its name; None if nothing is."""
    below = name.replace(".", "/")
    for folder in dict.fromkeys(folders):
        start = "" if folder in ("", ".") else f"{PurePosixPath(folder).as_posix()}/"
        for file in (f"{start}{below}/{_PACKAGE}", f"{start}{below}.py"):
            if file in tree.paths:
                return file
        if tree.holds(f"{start}{below}/") or tree.holds(f"{start}{below}."):
            return ""
    return None


def _not_found(tree: _Tree, name: str, run: Workload) -> str:
    top = name.partition(".")[0]
    inside = _module(tree, top, run.paths)
    if tree.builds or run.python or (inside is None and _installed(top)):
        return ""
    return f"expected a module of base in {', '.join(run.paths)} or one that is installed, got {name}"


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _lacks(text: str, where: str, attribute: str) -> str:
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError) as problem:
        return f"expected Python in {where}, got {type(problem).__name__}: {problem}"
    for part in attribute.split("."):
        names, open_ = _bound(body)
        if open_:
            return ""
        if part not in names:
            near = ", ".join(sorted(names)[:8]) or "nothing"
            return f"expected a name that {where} defines ({near}), got {part!r}"
        owner = names[part]
        if not isinstance(owner, ast.ClassDef) or owner.bases or owner.keywords or owner.decorator_list:
            return ""
        body = owner.body
    return ""


def _bound(body: Sequence[ast.stmt]) -> tuple[dict[str, ast.AST], bool]:
    """Names that statements bind, without what is bound inside functions and classes; whether there may be others."""
    names: dict[str, ast.AST] = {}
    waiting: list[ast.AST] = list(body)
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names[node.name] = node
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            for one in node.names:
                if one.name == "*":
                    return names, True
                names[one.asname or one.name.partition(".")[0]] = node
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names[node.id] = node
        elif isinstance(node, ast.Name) and node.id in ("globals", "setattr", "exec", "vars", "sys"):
            return names, True
        if not isinstance(node, ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return names, "__getattr__" in names


def _programs(read: Read, tree: _Tree, python: str) -> Iterator[tuple[Place, str]]:
    task = read.task
    given: list[tuple[Place, Sequence[str], bool]] = []
    given += [(("commands", "setup", i), one, i > 0) for i, one in enumerate(task.commands.setup)]
    given += [(("commands", "build", i), one, True) for i, one in enumerate(task.commands.build)]
    given += [(("tests", "command"), task.tests.command, tree.builds)] if task.tests.command else []
    for i, timed in enumerate(task.workload):
        python_ = (timed.run.python,) if timed.run.python else ()
        started = timed.run.command if timed.run.kind == "command" else python_
        given += [(("workload", i, "run"), started, tree.builds)] if started else []
    for place, command, built in given:
        if words := _unknown(read, tree, command, python, built):
            yield place, words


def _unknown(read: Read, tree: _Tree, command: Sequence[str], python: str, built: bool) -> str:
    """What is wrong with a command; `built`: whether setup and build have made files that base does not have."""
    program = command[0]
    if "/" in program:
        there = Path(program).exists() if program.startswith("/") else built or program.removeprefix("./") in tree.paths
        return "" if there else f"expected a program, got {program}, which is not there"
    own = read.task.sandbox.environment.get("PATH", "")
    path = os.pathsep.join([str(Path(python).parent), own, *_PROGRAMS, os.environ.get("PATH", "")])
    found = shutil.which(program, path=path)
    if found is None:
        return f"expected a program, got {program!r}, which is not found"
    first, *rest = [*command[1:], ""]
    if Path(found).parent != Path(python).parent or not program.startswith("python") or built:
        return ""
    if first == "-m" and rest[0]:
        top = rest[0].partition(".")[0]
        there = _module(tree, top, (".", *_pythonpath(read))) is not None or _installed(top)
        return "" if there else f"expected a module that {program} can run, got {rest[0]}, which is not installed"
    if first.endswith(".py") and not first.startswith(("-", "/")) and first.removeprefix("./") not in tree.paths:
        return f"expected a file of base, got {first}, which is not there"
    return ""


def _pythonpath(read: Read) -> list[str]:
    return read.task.sandbox.environment.get("PYTHONPATH", "").split(os.pathsep)


def _dotted(place: Place) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
