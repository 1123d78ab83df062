"""What callers rely on, in two trees: Python signatures, torch operator schemas, C prototypes. Nothing is imported.

`python -m assay.judgement.api BASE CANDIDATE` reads the task's part as JSON from stdin and prints the breaks as JSON.
The judge runs it as a process of its own, since parsing somebody's files may take long or end badly.
"""

import fnmatch
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from assay.contract.patterns import matches

_KEPT = 200
"""Breaks that are told at most."""
_NO_BREAK = ("ATTRIBUTE_CHANGED_VALUE", "RETURN_CHANGED_TYPE", "ATTRIBUTE_CHANGED_TYPE")
"""Values and annotations promise nothing that a caller's code depends on."""


def broken(api: dict[str, Any], base: Path, candidate: Path) -> list[str]:
    """What callers of base can no longer do, `name: words` each, without the names that the task allows.

    ValueError if base itself lacks a package.
    """
    found = [
        *(pair for package in api["packages"] for pair in _python(package, api["paths"], base, candidate)),
        *_compared(_operators(base, api["native"]), _operators(candidate, api["native"]), _extends),
        *_compared(_prototypes(base, api["native"]), _prototypes(candidate, api["native"]), str.__eq__),
    ]
    allowed = [name for name in api["allow"] if "*" in name], {name for name in api["allow"] if "*" not in name}
    return [
        f"{name}: {words}"
        for name, words in found
        if name not in allowed[1] and not any(fnmatch.fnmatchcase(name, pattern) for pattern in allowed[0])
    ]


def _python(package: str, paths: Sequence[str], base: Path, candidate: Path) -> Iterator[tuple[str, str]]:
    import griffe

    trees = []
    for tree in (base, candidate):
        folders = [tree / path for path in paths if (tree / path).is_dir()]
        try:
            found = griffe.load(
                package, search_paths=folders, try_relative_path=False, allow_inspection=False, resolve_aliases=True
            )
        except (ImportError, griffe.GriffeError) as problem:
            if tree == base:
                raise ValueError(f"api.packages: expected a package of base, got {package}: {problem}") from None
            yield package, "the package is no longer found, or cannot be read"
            return
        trees.append(found)
    for one in griffe.find_breaking_changes(*trees):
        if one.kind.name not in _NO_BREAK:
            was, now = (_short(value) for value in (one.old_value, one.new_value))
            yield one.obj.path, f"{one.kind.value}: {was} -> {now}" if was or now else one.kind.value


def _short(value: Any) -> str:
    """A value of a break in words; nothing for what has no short form."""
    name = getattr(value, "name", None)
    text = str(name if isinstance(name, str) else value)
    default = getattr(value, "default", None)
    if isinstance(name, str) and default is not None:
        text += f" = {default}"
    return "" if value is None or "\n" in text or "<" in text else text[:60]


def _texts(tree: Path, wanted: Sequence[str]) -> Iterator[str]:
    for path in sorted(tree.rglob("*")):
        name = path.relative_to(tree).as_posix()
        if path.is_file() and not path.is_symlink() and matches(name, wanted):
            yield path.read_text(errors="replace")


_NAMESPACE = re.compile(
    r"""TORCH_LIBRARY(?:_FRAGMENT|_EXPAND)?\s*\(\s*(?P<c>\w+)"""
    r"""|(?:\w+\.)*Library\s*\(\s*["'](?P<py>\w+)["']\s*,\s*["'](?:DEF|FRAGMENT)["']"""
    r"""|\bdef(?:ine)?\s*\(\s*(?P<schema>(?:[rR]?(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')\s*)+)"""
)
_STRING = re.compile(r""""((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)'""")


def _operators(tree: Path, patterns: Sequence[str]) -> dict[str, str]:
    """Operator schemas by `torch:namespace::op`, as texts, from C++ and Python registrations."""
    found = {}
    for text in _texts(tree, patterns):
        namespace = ""
        for match in _NAMESPACE.finditer(_without_comments(text)):
            if match["c"] or match["py"]:
                namespace = match["c"] or match["py"]
                continue
            schema = _joined("".join(one or other for one, other in _STRING.findall(match["schema"])))
            name, parenthesis, _ = schema.partition("(")
            name = name if "::" in name else f"{namespace}::{name}"
            if parenthesis and namespace + name != f"::{name}":
                found[f"torch:{name.strip()}"] = schema.partition("(")[1] + schema.partition("(")[2]
    return found


def _extends(schema: str, other: str) -> bool:
    """Whether calls that fit the first schema fit the second: equal but for further arguments with defaults."""
    (old, old_result), (new, new_result) = (_arguments(text) for text in (schema, other))
    return (
        old_result == new_result and new[: len(old)] == old and all("=" in one or one == "*" for one in new[len(old) :])
    )


def _arguments(schema: str) -> tuple[list[str], str]:
    inside, _, result = schema.rpartition("->")
    inside = inside.strip().removeprefix("(").removesuffix(")")
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(inside):
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            parts.append(inside[start:i].strip())
            start = i + 1
    last = inside[start:].strip()
    return [*parts, *([last] if last else [])], result.strip()


_PROTOTYPE = re.compile(r"^[ \t]*((?:[\w:<>,]+[ \t*&]+)+)(\w+)\s*\(([^(){};]*)\)\s*(?:noexcept\s*)?[;{]", re.MULTILINE)
_NO_TYPE = re.compile(r"\b(?:return|else|static|new|delete|throw|typedef|using|goto|case)\b")


def _prototypes(tree: Path, patterns: Sequence[str]) -> dict[str, str]:
    """C prototypes by `c:name`, as texts without comments and parameter spacing; overloads one after another."""
    found: dict[str, list[str]] = {}
    for text in _texts(tree, [pattern for pattern in patterns if not pattern.endswith(".py")]):
        plain = re.sub(r"^\s*#(?:.*\\\n)*.*$", "", _without_comments(text), flags=re.MULTILINE)
        plain = plain.replace('extern "C"', "")
        for before, name, parameters in _PROTOTYPE.findall(plain):
            if not _NO_TYPE.search(before):
                found.setdefault(f"c:{name}", []).append(_joined(f"{before} {name}({parameters})"))
    return {name: "; ".join(sorted(set(texts))) for name, texts in found.items()}


def _compared(base: dict[str, str], candidate: dict[str, str], fits: Any) -> Iterator[tuple[str, str]]:
    for name, text in base.items():
        if name not in candidate:
            yield name, "is gone"
        elif not fits(text, candidate[name]):
            yield name, f"was {text}, is {candidate[name]}"


def _without_comments(text: str) -> str:
    return re.sub(r"/\*.*?\*/|//[^\n]*", " ", text, flags=re.DOTALL)


def _joined(text: str) -> str:
    """One space where there was any; none around punctuation of types."""
    return re.sub(r"\s*([*&,()])\s*", r"\1", " ".join(text.split())).strip()


def main() -> int:
    """Prints {"broken": [...]} or {"error": words}."""
    base, candidate = (Path(name) for name in sys.argv[1:3])
    found: dict[str, Any] = {}
    try:
        found["broken"] = broken(json.load(sys.stdin), base, candidate)[:_KEPT]
    except ValueError as problem:
        found["error"] = str(problem)
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
