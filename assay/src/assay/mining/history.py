"""Commits of a repository as facts: their words, files and lines. git reads them; nothing of a tree is run."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from assay.contract.patterns import BUILDS, MEASURES, matches
from assay.repository import store
from assay.repository.lines import Lines, parsed

_FORMAT = "%x1e%H%x1f%P%x1f%cI%x1f%s%x1f%b%x1f"
_PLAIN = ("--no-ext-diff", "--no-textconv", "--no-color", "--no-renames")
_TRAILER = re.compile(r"^[A-Z][A-Za-z-]*-[Bb]y: ")
_NO_SOURCE = (".md", ".rst", ".txt", ".toml", ".cfg", ".ini", ".yml", ".yaml", ".json", ".lock", ".svg", ".png", "")
_DOCUMENTS = ("doc/**", "docs/**", "**/docs/**", "changelog/**", "newsfragments/**", "examples/**", ".*/**")
COMPILED = (".c", ".cc", ".cpp", ".cxx", ".cu", ".cuh", ".h", ".hpp", ".pyx", ".pxd", ".rs", ".f90", ".f")
_BENCHMARK = re.compile(r"(?:^|[/_.-])bench(?:mark)?s?(?:[/_.-]|$)|(?:^|/)asv")


@dataclass(frozen=True)
class Commit:
    """One commit, compared with its first parent."""

    name: str
    parents: tuple[str, ...]
    date: str
    subject: str
    body: str
    """Without the trailers that name people."""
    files: dict[str, tuple[int, int]]
    """Lines added and removed, by path; 0 of a binary file."""

    @property
    def parent(self) -> str:
        """The first parent; "" of a root."""
        return self.parents[0] if self.parents else ""


def commits(
    repository: Path, revisions: Sequence[str] = ("HEAD",), *, since: str = "", paths: Sequence[str] = (), most: int = 0
) -> list[Commit]:
    """Commits of the main line, newest first; a merge counts as all that it brought in. GitError in git's words."""
    given = ["-C", str(repository), "-c", "log.showSignature=false", "log", f"--format={_FORMAT}", "--numstat"]
    given += [*_PLAIN, "--no-mailmap", "--first-parent", "-m"]
    given += [f"--since={since}"] if since else []
    given += [f"--max-count={most}"] if most else []
    text = store.run([*given, *revisions, "--", *paths]).decode(errors="replace")
    return [_read(one) for one in text.split("\x1e")[1:]]


def commit(repository: Path, revision: str) -> Commit:
    """One commit. GitError if there is none."""
    (found,) = commits(repository, (store.resolved(repository, revision),), most=1)
    return found


def _read(text: str) -> Commit:
    name, parents, date, subject, body, rest = text.split("\x1f", 5)
    files = {}
    for line in rest.strip().splitlines():
        added, removed, path = line.split("\t", 2)
        files[path] = tuple(int(number) if number.isdigit() else 0 for number in (added, removed))
    kept = [line for line in body.strip().splitlines() if not _TRAILER.match(line)]
    return Commit(name, tuple(parents.split()), date, subject, "\n".join(kept).strip(), files)  # type: ignore[arg-type]


def lines(repository: Path, before: str, after: str, paths: Sequence[str] = ()) -> dict[str, Lines]:
    """What differs between two commits, line by line. A root is compared with nothing."""
    given = ["-C", str(repository), "diff-tree", "-r", "-p", "-U0", "--no-commit-id", *_PLAIN]
    names = [before, after] if before else ["--root", after]
    return parsed(store.run([*given, *names, "--", *paths]).decode(errors="replace"))


def text(repository: Path, commit: str, path: str) -> str:
    """A file's text in a commit; "" if it is not there."""
    try:
        return store.run(["-C", str(repository), "cat-file", "blob", f"{commit}:{path}"]).decode(errors="replace")
    except store.GitError:
        return ""


def paths(repository: Path, commit: str) -> list[str]:
    """Every file of a commit."""
    found = store.run(["-C", str(repository), "ls-tree", "-r", "-z", "--name-only", "--full-tree", commit])
    return [name for name in found.decode(errors="replace").split("\0") if name]


def is_test(path: str) -> bool:
    """Whether a path is a test's, by its name."""
    return matches(path, MEASURES) and not is_benchmark(path)


def is_benchmark(path: str) -> bool:
    """Whether a path is a benchmark's, by its name."""
    return bool(_BENCHMARK.search(path))


def is_source(path: str) -> bool:
    """Whether a path is code that callers run: no test, benchmark, build file or document."""
    if is_test(path) or is_benchmark(path) or matches(path, (*BUILDS, *_DOCUMENTS)):
        return False
    return PurePosixPath(path).suffix.lower() not in _NO_SOURCE
