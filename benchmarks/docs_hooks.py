"""mkdocs hooks: files of the repository that pages link to (`../benchmarks/results/...`) become part of the site."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PLACE = "repository"
_LINK = re.compile(r"(\]\()((?:\.\./)+[^)#\s]+)")


def _outside(source: str, target: str) -> str | None:
    """Path in the repository of a link that leaves `docs/`; `None` for one that stays inside."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(source), target))
    return None if path.startswith("docs/") else path


def on_files(files: Any, config: Any) -> Any:
    """Add every file outside of `docs/` that a page links to."""
    for page in list(files.documentation_pages()):
        for _, target in _LINK.findall(page.content_string):
            path = _outside(page.src_uri, target)
            if path is None or files.get_file_from_path(f"{PLACE}/{path}"):
                continue
            files.append(File.generated(config, f"{PLACE}/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point those links at their copies."""
    source = page.file.src_uri

    def inside(match: re.Match[str]) -> str:
        path = _outside(source, match[2])
        if path is None:
            return match[0]
        return match[1] + posixpath.relpath(f"{PLACE}/{path}", posixpath.dirname(source) or ".")

    return _LINK.sub(inside, markdown)
