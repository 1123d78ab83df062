"""Arms' cache folders, which hold before every block what they held before the first one.

What a build and one run that does not count have left there stays: compiled kernels, say. What a block leaves is taken
away, so that nothing is carried from one block's inputs to another's.
"""

import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path


class Caches:
    """The folders, by arm, and a copy of each beside it."""

    def __init__(self, folders: Mapping[str, Path], name: str) -> None:
        """`name` is that of the copies. Where there are some already, of a series that was cut, folders become them."""
        self._copies = {folder: folder.with_name(f"{folder.name}.{name}") for folder in folders.values()}
        self._seen: dict[Path, list[tuple[str, int, int]]] = {}
        if all(copy.is_dir() for copy in self._copies.values()):
            self.restore()

    def keep(self) -> None:
        """From now on the folders are restored to what they hold."""
        for folder, copy in self._copies.items():
            emptied(copy)
            _copied(folder, copy)
            self._seen[folder] = list(_files(folder))

    def restore(self) -> None:
        """Every folder becomes its copy; nothing is done to one that nobody has written to."""
        for folder, copy in self._copies.items():
            if self._seen.get(folder) != list(_files(folder)):
                emptied(folder)
                _copied(copy, folder)
                self._seen[folder] = list(_files(folder))


def emptied(folder: Path) -> None:
    """Makes a folder, or removes whatever is in it. The folder itself stays: a sandbox may have it mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    for place, _, _ in os.walk(folder):
        Path(place).chmod(0o700)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _copied(source: Path, to: Path) -> None:
    """Folders, files and links; whatever else somebody has made there is not kept."""
    for place, folders, names in os.walk(source):
        here = to / Path(place).relative_to(source)
        here.mkdir(exist_ok=True)
        for name in [*folders, *names]:
            path, state = Path(place, name), Path(place, name).lstat()
            if stat.S_ISLNK(state.st_mode):
                (here / name).symlink_to(path.readlink())
            elif stat.S_ISREG(state.st_mode):
                shutil.copy2(path, here / name)


def _files(folder: Path) -> Iterator[tuple[str, int, int]]:
    """All that is in a folder, with what changes when it is written to and cannot be set back: its inode and ctime."""
    for place, folders, names in os.walk(folder):
        for name in sorted([*folders, *names]):
            state = Path(place, name).lstat()
            yield str(Path(place, name)), state.st_ino, state.st_ctime_ns
