"""Trees by the names that people give them: a directory, or a commit of the repository here, written out whole."""

import os
import shutil
from pathlib import Path

from assay.repository.store import GitError, Store, resolved, run


def top(folder: Path) -> Path | None:
    """The repository's own folder that a folder lies in; None if it lies in none."""
    try:
        return Path(run(["-C", str(folder), "rev-parse", "--show-toplevel"]).decode().rstrip("\n"))
    except GitError:
        return None


def tree(name: str, given: str, folder: Path, here: Path) -> Path:
    """A directory as it is, else a commit's files in a folder of their own below `folder`.

    Nothing of the repository is changed: no worktree is noted in it, and no filter or hook runs. Submodules stay away.

    Args:
        name: of the argument, for errors.
        given: a directory, or a revision as git understands it. A directory is taken first.
        folder: where commits are written to.
        here: where relative names and the repository are looked for.

    Raises ValueError for what is neither.
    """
    if (here / given).is_dir():
        return here / given
    return commit(name, given, folder, here, "a directory or a commit of the repository here")


def commit(name: str, given: str, folder: Path, here: Path, expected: str = "a commit of the repository here") -> Path:
    """A commit's files in a folder of their own; arguments and errors as of `tree`."""
    repository = top(here)
    if repository is None:
        raise ValueError(f"{name}: expected {expected}, got {given}; {here.resolve()} lies in no repository")
    try:
        found = resolved(repository, given)
    except GitError:
        raise ValueError(f"{name}: expected {expected}, got {given}") from None
    return written(repository, found, folder)


def working(repository: Path, folder: Path) -> Path:
    """The working tree of a trusted repository, copied: tracked files as they are now, and new ones it does not ignore.

    Returns `folder`, which must not be there yet.
    """
    listed = run(
        ["-C", str(repository), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate"]
    )
    for name in filter(None, listed.split(b"\0")):
        place = repository / os.fsdecode(name)
        to = folder / os.fsdecode(name)
        if place.is_symlink() or place.is_file():
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(place, to, follow_symlinks=False)
    return folder


def clone(repository: Path, commit: str, folder: Path) -> Path:
    """A repository of its own at `folder`, which shares the objects of another one, with a commit's files in it.

    Configuration, hooks and filters of the other one are not taken over.
    """
    store = Store(folder / ".git", repository)
    store.git(["config", "core.bare", "false"])
    store.git(["update-ref", "--no-deref", "HEAD", commit])
    store.write(store.tree_of(commit), folder)
    return folder


def written(repository: Path, commit: str, folder: Path) -> Path:
    """The files of a commit, by its full name, in a folder of their own; written once."""
    place = folder / commit
    if not place.exists():
        store = Store(folder / "git", repository)
        part = folder / f"{commit}.part"
        store.write(store.tree_of(commit), part)
        part.rename(place)
    return place
