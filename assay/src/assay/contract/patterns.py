"""Path patterns of a task: `*` and `?` stay inside a folder, `**` crosses them, `[...]` is one character.

Also the patterns of files that test, measure or build.
"""

import re
from collections.abc import Iterable
from functools import cache


@cache
def _expression(pattern: str) -> re.Pattern[str]:
    parts, i = [], 0
    while i < len(pattern):
        if pattern.startswith("**/", i):
            parts.append("(?:[^/]+/)*")
            i += 3
        elif pattern.startswith("**", i):
            parts.append(".*")
            i += 2
        elif pattern[i] == "*":
            parts.append("[^/]*")
            i += 1
        elif pattern[i] == "?":
            parts.append("[^/]")
            i += 1
        elif pattern[i] == "[":
            end = pattern.find("]", i + 2)
            if end < 0:
                raise ValueError(f"expected a ']' after '[', got {pattern!r}")
            inside = pattern[i + 1 : end].replace("\\", r"\\").replace("[", r"\[")
            parts.append(f"(?!/)[{'^' + inside[1:] if inside[0] == '!' else inside}]")
            i = end + 1
        else:
            parts.append(re.escape(pattern[i]))
            i += 1
    try:
        return re.compile("".join(parts), re.DOTALL)
    except re.error as problem:
        raise ValueError(f"expected a pattern, got {pattern!r}: {problem}") from None


def checked(pattern: str) -> str:
    """Itself, if it is a pattern of paths inside a tree; ValueError says why not."""
    if not pattern:
        raise ValueError("expected a pattern, got an empty one")
    if pattern.startswith("/") or "\\" in pattern or ".." in pattern.split("/") or "." in pattern.split("/"):
        raise ValueError(f"expected a pattern relative to the tree, with / and without . or .., got {pattern!r}")
    _expression(pattern)
    return pattern


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns matches the whole path."""
    return any(_expression(pattern).fullmatch(path) for pattern in patterns)


MEASURES = (
    *("tests/**", "test/**", "**/tests/**", "**/test_*.py", "**/*_test.py", "**/conftest.py", "**/.coveragerc"),
    *("**/test.py", "**/tests.py", "**/pytest.toml", "**/.pytest.ini", "**/.pytest.toml", "**/.coveragerc.toml"),
    *("benchmarks/**", "benchmark/**", "bench/**", "**/pytest.ini", "**/tox.ini", "**/noxfile.py", "**/asv.conf.json"),
)
BUILDS = (
    *("**/setup.py", "**/setup.cfg", "**/pyproject.toml", "**/requirements*.txt", "**/MANIFEST.in"),
    *("**/CMakeLists.txt", "**/*.cmake", "**/Makefile", "**/meson.build", ".github/**", ".ci/**", "**/.gitignore"),
    *("**/.gitattributes", "**/GNUmakefile", "**/makefile", "**/*.mk", "**/meson.options", "**/meson_options.txt"),
    *("**/configure", "**/configure.ac", "**/build.rs", "**/Cargo.toml", "**/Cargo.lock", "**/*.lock", "**/setup_*.py"),
    *("**/build.ninja", "**/BUILD", "**/BUILD.bazel", "**/WORKSPACE", "**/hatch.toml", "**/Dockerfile", "**/*.pth"),
)
CHECKS = (*MEASURES, *BUILDS)
"""Files that test, measure or build: they are put back as in base, unless a task names them."""
UNASKED = ("**/sitecustomize.py", "**/usercustomize.py")
"""Python imports these by itself, before anything that was asked for."""
