"""What mkdocs calls while it builds the site: links that leave docs/ lead into the repository."""

import os
import re
import tomllib
from pathlib import Path
from typing import Any

_LINK = re.compile(r"(\]\()(?!https?:|#)([^)\s#]+)")


def on_config(config: Any) -> Any:
    """The repository's address is that of pyproject.toml."""
    project = Path(config.config_file_path).with_name("pyproject.toml")
    config.repo_url = tomllib.loads(project.read_text())["project"]["urls"]["Repository"]
    config.repo_name = config.site_name
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """A page whose links to files of the repository outside docs/ are absolute."""
    docs = Path(config.docs_dir)
    root, folder = docs.parent, (docs / page.file.src_uri).parent

    def link(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(folder / match[2]))
        if target.is_relative_to(docs):
            return match[0]
        if not target.exists():
            raise ValueError(f"{page.file.src_uri}: expected a file of the repository, got {match[2]}")
        return f"{match[1]}{config.repo_url}/blob/main/{target.relative_to(root)}"

    return _LINK.sub(link, markdown)
