"""git as a store of bytes: a git directory of our own, plumbing only, and nobody's configuration.

git runs programs that a repository names (fsmonitor, external diffs, filters, hooks) and believes what its index says
(assume-unchanged). So it is never run where the candidate's .git could be found. Files go into the store through
fast-import and out of it through cat-file, byte by byte: no attributes, no filters, no index of anybody else.
"""

import errno
import hashlib
import os
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SYMLINK, SUBMODULE = "120000", "160000"
ABSENT = "000000"
_NO_CONFIGURATION = [
    word
    for name, value in {
        "core.attributesFile": os.devnull,
        "core.excludesFile": os.devnull,
        "core.hooksPath": os.devnull,
        "core.fsmonitor": "false",
        "core.quotePath": "false",
        "protocol.allow": "never",
        "safe.directory": "*",
    }.items()
    for word in ("-c", f"{name}={value}")
]
MOST_FILE = 1 << 30
"""Bytes of a file above which it is not read."""


_MACHINE = {os.strerror(code): code for code in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENOMEM)}
"""In words that git passes on, what is the machine's fault and nobody else's."""


class GitError(ValueError):
    """git refused; its own words."""


def _refused(what: str, words: str) -> Exception:
    """GitError, or OSError where the machine failed."""
    for said, code in _MACHINE.items():
        if said in words:
            return OSError(code, f"{said}, git {what}")
    return GitError(f"git {what}: {words}")


@dataclass(frozen=True)
class Entry:
    """A file of a tree: its mode as git writes it, and the name of its content."""

    mode: str
    blob: str


@dataclass(frozen=True)
class Change:
    """How a path differs between two trees; mode ABSENT where it is not there."""

    path: str
    before: Entry
    after: Entry


@dataclass(frozen=True)
class Content:
    """What a folder held: its tree in the store, and what could not be taken into it, a line of words each."""

    tree: str
    refused: tuple[str, ...]


@dataclass(frozen=True)
class Pointer:
    """What git holds of a file that Git LFS keeps elsewhere."""

    text: bytes
    digest: str
    """SHA-256 of the content, hexadecimal."""

    @classmethod
    def read(cls, text: bytes) -> "Pointer | None":
        """From a file's text, by version 1 of the specification of Git LFS; None if it is none."""
        found = _POINTER.match(text)
        return cls(text, found[1].decode()) if found else None

    def stands_for(self, content: bytes) -> bool:
        """Whether it is that content's."""
        return hashlib.sha256(content).hexdigest() == self.digest


_POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\n(?:[^\n]+\n)*?oid sha256:([0-9a-f]{64})\n")
_MOST_POINTER = 1024
"""Bytes: a longer file is no pointer."""


def environment(**more: str) -> dict[str, str]:
    """All that git is told."""
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": "/nonexistent",
        "LC_ALL": "C",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_OPTIONAL_LOCKS": "0",
        "GIT_NO_REPLACE_OBJECTS": "1",
        **more,
    }


def run(arguments: Sequence[str], stdin: bytes = b"", ok: Sequence[int] = (0,), **more: str) -> bytes:
    """What git prints. GitError with its first line if it ends with a status that is not `ok`.

    OSError if that is the machine's fault: its disk is full, say.
    """
    command = ["git", *_NO_CONFIGURATION, *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, env=environment(**more), check=False)
    if done.returncode not in ok:
        words = done.stderr.decode(errors="replace").strip()
        first = words.splitlines()[0] if words else f"status {done.returncode}"
        raise _refused(arguments[0], words if any(said in words for said in _MACHINE) else first)
    return done.stdout


def resolved(repository: Path, revision: str) -> str:
    """The full name of a commit in a trusted repository. rev-parse runs nothing that its configuration names."""
    name = f"{revision}^{{commit}}"
    given = ["-C", str(repository), "rev-parse", "--verify", "--quiet", "--end-of-options", name]
    try:
        return run(given).decode().strip()
    except GitError:
        raise GitError(f"expected a commit of {repository}, got {revision!r}") from None


class Store:
    """Trees in a git directory of our own."""

    def __init__(self, folder: Path, repository: Path | None = None) -> None:
        """A store in an empty or missing folder, which also sees the objects of `repository`. Made once, kept after."""
        self.folder = folder
        if not (folder / "HEAD").exists():
            run(["init", "--quiet", "--bare", "--template=", str(folder)])
        if repository is not None:
            objects = run(["-C", str(repository), "rev-parse", "--path-format=absolute", "--git-path", "objects"])
            (folder / "objects" / "info").mkdir(exist_ok=True)
            (folder / "objects" / "info" / "alternates").write_bytes(objects)

    def git(self, arguments: Sequence[str], stdin: bytes = b"", ok: Sequence[int] = (0,), **more: str) -> bytes:
        """git on this store."""
        return run(arguments, stdin, ok, GIT_DIR=str(self.folder), **more)

    def tree_of(self, commit: str) -> str:
        """The tree of a commit."""
        return self.git(["rev-parse", "--verify", "--quiet", f"{commit}^{{tree}}"]).decode().strip()

    def take(
        self,
        folder: Path,
        skipped: Iterable[str] = (),
        *,
        without: Collection[str] = (),
        base: Mapping[str, Entry] | None = None,
    ) -> Content:
        """A folder's files as they are now: no link is followed, no .git is looked into, `skipped` names are not seen.

        Whatever is neither a file nor a link, or is too large, is refused in words.

        Args:
            folder: what is taken.
            skipped: names of files and folders that are not seen, wherever they lie.
            without: paths of folders that are not looked into.
            base: entries of the tree that `folder` was checked out from. A folder in place of a submodule is taken as
                that submodule, and a file in place of a pointer of Git LFS as the pointer, if its digest is the one
                that the pointer names.
        """
        refused: list[str] = []
        names, base = frozenset(skipped) | {".git"}, base or {}
        modules = {path: entry for path, entry in base.items() if entry.mode == SUBMODULE and (folder / path).is_dir()}
        pointers = self._pointers(base)
        with tempfile.TemporaryFile() as stream:
            stream.write(b"commit refs/assay/taken\ncommitter assay <> 0 +0000\ndata 0\n")
            for path, mode, data in _files(folder, names, refused, {*without, *modules}):
                pointer = pointers.get(os.fsdecode(path))
                taken = pointer.text if pointer is not None and pointer.stands_for(data) else data
                stream.write(b'M %s inline "%s"\ndata %d\n' % (mode.encode(), _quoted(path), len(taken)))
                stream.write(taken + b"\n")
            for name, entry in modules.items():
                stream.write(b'M %s %s "%s"\n' % (SUBMODULE.encode(), entry.blob.encode(), _quoted(os.fsencode(name))))
            stream.seek(0)
            command = ["git", *_NO_CONFIGURATION, f"--git-dir={self.folder}", "fast-import", "--quiet", "--force"]
            done = subprocess.run(command, stdin=stream, capture_output=True, env=environment(), check=False)
        if done.returncode:
            raise _refused("fast-import", done.stderr.decode(errors="replace").strip()[:500])
        return Content(self.tree_of("refs/assay/taken"), tuple(refused))

    def _pointers(self, entries: Mapping[str, Entry]) -> dict[str, "Pointer"]:
        """Pointers of Git LFS among a tree's files, by path."""
        small = [(path, entry) for path, entry in entries.items() if entry.mode in ("100644", "100755")]
        names = list(dict.fromkeys(entry.blob for _, entry in small))
        found = {}
        for blob, size in zip(names, self._sizes(names), strict=True):
            if size <= _MOST_POINTER:
                found[blob] = size
        texts = dict(zip(found, self.contents(list(found)), strict=True))
        pointers = {blob: pointer for blob, text in texts.items() if (pointer := Pointer.read(text)) is not None}
        return {path: pointers[entry.blob] for path, entry in small if entry.blob in pointers}

    def _sizes(self, blobs: Sequence[str]) -> list[int]:
        """Bytes of every blob, in turn; of one that the store lacks, more than any has."""
        given = "".join(f"{blob}\n" for blob in blobs).encode()
        lines = self.git(["cat-file", "--batch-check=%(objectsize)"], given).decode().splitlines()
        return [int(line) if line.isdigit() else sys.maxsize for line in lines]

    def changes(self, before: str, after: str) -> list[Change]:
        """What differs between two trees, by path; a renamed file is one gone and one new."""
        given = ["diff-tree", "-r", "-z", "--raw", "--no-renames", "--full-index", "--no-ext-diff", before, after]
        fields = self.git(given).split(b"\0")
        found = []
        for head, path in zip(fields[:-1:2], fields[1::2], strict=True):
            mode, mode_after, blob, blob_after, _ = head.decode()[1:].split()
            found.append(Change(os.fsdecode(path), Entry(mode, blob), Entry(mode_after, blob_after)))
        return found

    def patch(self, before: str, after: str) -> bytes:
        """The differences of two trees as one patch, whatever attributes, drivers or converters the trees name."""
        given = ["diff-tree", "-r", "-p", "--binary", "--full-index", "--no-renames", "--no-ext-diff", "--no-textconv"]
        return self.git([*given, "--no-color", before, after])

    def applied(self, tree: str, patch: bytes) -> str:
        """The tree after a patch, which has to fit exactly. GitError if it does not."""
        with tempfile.TemporaryDirectory(prefix="assay-") as folder:
            index = str(Path(folder) / "index")
            self.git(["read-tree", tree], GIT_INDEX_FILE=index)
            self.git(["apply", "--cached", "--whitespace=nowarn", "-"], patch, GIT_INDEX_FILE=index)
            return self.git(["write-tree"], GIT_INDEX_FILE=index).decode().strip()

    def with_entries(self, tree: str, entries: Iterable[tuple[str, Entry]]) -> str:
        """The tree with some paths set, or removed where the mode is ABSENT."""
        lines = b"".join(f"{entry.mode} {entry.blob}\t".encode() + os.fsencode(path) + b"\0" for path, entry in entries)
        with tempfile.TemporaryDirectory(prefix="assay-") as folder:
            index = str(Path(folder) / "index")
            self.git(["read-tree", tree], GIT_INDEX_FILE=index)
            self.git(["update-index", "-z", "--index-info"], lines, GIT_INDEX_FILE=index)
            return self.git(["write-tree"], GIT_INDEX_FILE=index).decode().strip()

    def ignored(self, folder: Path, paths: Sequence[str]) -> set[str]:
        """Which paths the ignore rules of `folder` leave out; nobody else's rules count."""
        if not paths:
            return set()
        given = ["check-ignore", "--no-index", "-z", "--stdin"]
        text = b"".join(os.fsencode(path) + b"\0" for path in paths)
        return {
            os.fsdecode(path) for path in self.git(given, text, (0, 1), GIT_WORK_TREE=str(folder)).split(b"\0") if path
        }

    def ignored_folders(self, folder: Path, base: Path, entries: Iterable[str], skipped: Collection[str]) -> list[str]:
        """Folders, by path, that base has no file in and that its ignore rules leave out whole.

        Args:
            folder: what is looked at; no link is followed.
            base: base's files, whose rules count.
            entries: paths of base's files.
            skipped: names that are not seen.
        """
        known = {"/".join(parts[:i]) for parts in (path.split("/") for path in entries) for i in range(1, len(parts))}
        found = []
        for place, folders, _ in os.walk(folder, followlinks=False):
            start = "" if place == str(folder) else f"{os.path.relpath(place, folder)}/"
            new = [name for name in folders if start + name not in known and name not in skipped]
            found += [start + name for name in new if not (Path(place) / name).is_symlink()]
            folders[:] = [name for name in folders if start + name in known]
        ignored = self.ignored(base, [f"{path}/" for path in found])
        return [path for path in found if f"{path}/" in ignored]

    def contents(self, blobs: Sequence[str]) -> Iterator[bytes]:
        """The content of every blob, in turn."""
        command = ["git", *_NO_CONFIGURATION, f"--git-dir={self.folder}", "cat-file", "--batch"]
        with tempfile.TemporaryFile() as names:
            names.write("".join(f"{blob}\n" for blob in blobs).encode())
            names.seek(0)
            reader = subprocess.Popen(command, stdin=names, stdout=subprocess.PIPE, env=environment())
        with reader:
            assert reader.stdout is not None
            for blob in blobs:
                head = reader.stdout.readline().split()
                if len(head) != 3:
                    raise GitError(f"git cat-file: expected {blob}, got {b' '.join(head).decode(errors='replace')}")
                data = reader.stdout.read(int(head[2]) + 1)
                yield data[:-1]

    def entries(self, tree: str) -> dict[str, Entry]:
        """Every file of a tree, by path."""
        found = {}
        for line in self.git(["ls-tree", "-r", "-z", "--full-tree", tree]).split(b"\0")[:-1]:
            head, _, path = line.partition(b"\t")
            mode, _, blob = head.decode().split()
            found[os.fsdecode(path)] = Entry(mode, blob)
        return found

    def write(self, tree: str, folder: Path) -> None:
        """Writes a tree's files into a missing or empty folder, byte by byte; submodules stay away."""
        folder.mkdir(parents=True, exist_ok=True)
        files = {path: entry for path, entry in self.entries(tree).items() if entry.mode != SUBMODULE}
        contents = self.contents([entry.blob for entry in files.values()])
        links = []
        for (path, entry), data in zip(files.items(), contents, strict=True):
            to = folder / path
            if entry.mode == SYMLINK:
                links.append((to, data))
                continue
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(data)
            to.chmod(0o755 if entry.mode == "100755" else 0o644)
        for to, data in links:  # last, so that no file is ever written through one
            to.parent.mkdir(parents=True, exist_ok=True)
            to.symlink_to(os.fsdecode(data))


def _quoted(path: bytes) -> bytes:
    """A path inside quotes, for fast-import."""
    return path.replace(b"\\", b"\\\\").replace(b'"', b'\\"').replace(b"\n", b"\\n")


def _files(
    folder: Path, skipped: frozenset[str], refused: list[str], without: Collection[str] = ()
) -> Iterator[tuple[bytes, str, bytes]]:
    """(path, mode, content) of every file and link, in the order of names; descriptors, so that no link is followed.

    `skipped` are names, `without` paths of folders.
    """
    root = str(folder).rstrip("/")
    for place, folders, names, where in os.fwalk(root, follow_symlinks=False):
        links = [name for name in folders if stat.S_ISLNK(os.lstat(name, dir_fd=where).st_mode)]
        prefix = place[len(root) :].lstrip("/")
        start = f"{prefix}/" if prefix else ""
        folders[:] = sorted(
            name for name in folders if name not in skipped and name not in links and start + name not in without
        )
        for name in sorted({*names, *links} - skipped):
            path = start + name
            found = os.lstat(name, dir_fd=where)
            if stat.S_ISLNK(found.st_mode):
                yield os.fsencode(path), SYMLINK, os.fsencode(os.readlink(name, dir_fd=where))
            elif not stat.S_ISREG(found.st_mode):
                refused.append(f"{path}: expected a file, got something that is neither file, folder nor link")
            elif found.st_size > MOST_FILE:
                refused.append(f"{path}: expected at most {MOST_FILE >> 20} MiB, got {found.st_size >> 20}")
            else:
                file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=where)
                with os.fdopen(file, "rb") as stream:
                    yield os.fsencode(path), "100755" if found.st_mode & 0o111 else "100644", stream.read()
