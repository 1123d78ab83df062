"""README as an index page shows it: its relative links and pictures become absolute, below the repository's address."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)")


def absolute(text: str, repository: str) -> str:
    """Text with pictures from `repository`/raw/main and links to `repository`/blob/main; code is left alone."""

    def link(match: re.Match[str]) -> str:
        picture, words, path = match.groups()
        return f"{picture}[{words}]({repository}/{'raw' if picture else 'blob'}/main/{path})"

    parts = re.split(r"(```.*?```)", text, flags=re.DOTALL)
    return "".join(part if part.startswith("```") else _LINK.sub(link, part) for part in parts)


class AbsoluteLinks(MetadataHookInterface):
    """Hatchling calls it for `dynamic = ["readme"]`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Adds the readme to the metadata."""
        text = (Path(self.root) / "README.md").read_text()
        repository = self.config.get("repository") or metadata["urls"]["Repository"]
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute(text, repository)}
