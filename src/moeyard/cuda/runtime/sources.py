"""The CUDA sources of this package, read once when this module is first imported.

A process keeps the texts that it began with: files that an upgrade replaces under it never meet older ones.
"""

import re
from pathlib import Path


def texts_in(folder: Path) -> dict[str, str]:
    """Name -> text of the sources and headers in the folders of a folder, which may hold cubins, too."""
    return {path.name: path.read_text() for path in sorted(folder.glob("*/*")) if path.suffix in (".cu", ".cuh")}


_TEXTS = texts_in(Path(__file__).parents[1])
SOURCES = {name: text for name, text in _TEXTS.items() if name.endswith(".cu")}
"""Name -> text of what is compiled."""
HEADERS = {name: text for name, text in _TEXTS.items() if name.endswith(".cuh")}
"""Name -> text of what sources include; names are unique over all folders."""
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def headers_of(text: str) -> dict[str, str]:
    """The headers that a text includes, directly or through others, in the order of first mention."""
    found: dict[str, str] = {}
    waiting = [text]
    while waiting:
        for name in _INCLUDE.findall(waiting.pop(0)):
            if name in HEADERS and name not in found:
                found[name] = HEADERS[name]
                waiting.append(HEADERS[name])
    return found
