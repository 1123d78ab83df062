"""Which files of a tree could run when a function is called: names are followed through the text, nothing is imported.

An object's method is followed with its class, which must be named where the object is made. So what no name leads to
is not called, as long as no name is made of text at run time.
"""

import ast
import re
from dataclasses import dataclass, field
from pathlib import Path

from assay.mining import functions, history
from assay.mining.functions import Function
from assay.mining.script import Call, Import, Script, exports

_MOST = 20_000
"""Names that are followed."""
_ROOTS = ("", "src/", "python/", "lib/")
_DEFINED = re.compile(r"^(?![\s#/])[^\n(=]*?\b(\w+)\s*\(|\b(?:def|impl)\(\s*\"(\w+)", re.MULTILINE)


@dataclass(frozen=True)
class Module:
    """What a file binds."""

    definitions: dict[str, ast.AST]
    imports: dict[str, str]
    """Name -> file of the tree."""


@dataclass
class Tree:
    """A commit's files, read as they are asked for."""

    repository: Path
    commit: str
    there: frozenset[str] = frozenset()
    texts: dict[str, str] = field(default_factory=dict)
    modules: dict[str, Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.there = frozenset(history.paths(self.repository, self.commit))

    def text(self, path: str) -> str:
        """A file's text."""
        if path not in self.texts:
            self.texts[path] = history.text(self.repository, self.commit, path)
        return self.texts[path]

    def file(self, module: str) -> str:
        """The file of a module; "" if it is not the tree's."""
        path = module.replace(".", "/")
        ends = [f"{root}{path}{end}" for root in _ROOTS for end in (".py", "/__init__.py")]
        return next((end for end in ends if end in self.there), "")

    def module(self, path: str) -> Module:
        """What a file of Python binds; nothing if it cannot be read."""
        if path not in self.modules:
            self.modules[path] = self._read(path)
        return self.modules[path]

    def _read(self, path: str) -> Module:
        try:
            parsed = ast.parse(self.text(path))
        except (SyntaxError, ValueError):
            return Module({}, {})
        name = functions.module_of(path)
        package = name if path.endswith("__init__.py") else name.rpartition(".")[0]
        found = Module({}, {})
        for node in ast.walk(parsed):
            if isinstance(node, ast.Import | ast.ImportFrom):
                found.imports.update(self._bound(node, package))
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.definitions[node.name] = node
            elif isinstance(node, ast.Assign):
                for one in node.targets:
                    if isinstance(one, ast.Name):
                        found.definitions.setdefault(one.id, node)
        return found

    def _bound(self, node: ast.Import | ast.ImportFrom, package: str) -> dict[str, str]:
        """Names that an import binds, with the file of the tree in which they are looked for."""
        found = {}
        for alias in node.names:
            if isinstance(node, ast.Import):
                file = self.file(alias.name)
            else:
                parts = package.split(".")
                above = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
                module = ".".join(part for part in (above, node.module or "") if part)
                file = self.file(f"{module}.{alias.name}") or self.file(module)
            if file:
                found[alias.asname or alias.name.split(".")[0]] = file
        return found


def module_called(tree: Tree, one: Import) -> str:
    """The file that a name, taken from a package, is a module of, if the package itself binds no such name."""
    package, file = tree.file(one.module), tree.file(f"{one.module}.{one.name}")
    return file if file and package and not exports(tree.text(package), one.name) else ""


def function_of(tree: Tree, script: Script, call: Call) -> tuple[str, Function] | None:
    """The file and the function that a script's call means, also where it takes a module for its function."""
    head, _, rest = call.name.partition(".")
    for one in script.imports:
        if one.bound != head:
            continue
        name = rest.rpartition(".")[2] or one.name
        for module in (f"{one.module}.{one.name}" if one.name else one.module, one.module):
            path = tree.file(module)
            for each, _, _ in functions.functions(tree.text(path)) if path else ():
                if each.name == name:
                    return path, each
    return None


def reached(tree: Tree, script: Script) -> tuple[set[str], set[str]]:
    """Files in which names are defined that a script's calls could lead to, and all the names."""
    todo: list[tuple[str, str]] = []
    for one in script.imports:
        used = {call.name.rpartition(".")[2] for call in script.calls if call.name.split(".")[0] == one.bound}
        for module in (one.module, f"{one.module}.{one.name}"):
            if path := tree.file(module):
                todo += [(path, name) for name in used | {one.name}]
    files, names, seen = set(), set(), set(todo)
    while todo and len(seen) < _MOST:
        path, name = todo.pop()
        bound = tree.module(path)
        names.add(name)
        more = [(bound.imports[name], name)] if name in bound.imports else []
        if name in bound.definitions:
            files.add(path)
            more += _used(bound.definitions[name], path, bound, names)
        new = [pair for pair in more if pair not in seen]
        seen.update(new)
        todo += new
    return files, names


def _used(node: ast.AST, path: str, module: Module, names: set[str]) -> list[tuple[str, str]]:
    """Where the names of a definition are looked for next. What is called on something else is a name alone."""
    found = []
    for one in ast.walk(node):
        if isinstance(one, ast.Name):
            found.append((path, one.id))
        elif isinstance(one, ast.Attribute):
            names.add(one.attr)
            if isinstance(one.value, ast.Name) and one.value.id in module.imports:
                found.append((module.imports[one.value.id], one.attr))
    return found


def defines(text: str, names: set[str]) -> bool:
    """Whether a compiled source defines or registers one of the names, which is how a caller would reach it."""
    return any(set(found) & names for found in _DEFINED.findall(text))
