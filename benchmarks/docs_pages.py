"""The generated parts of the documentation: settings by the planner, figures from JSON, the reference of commands.

`python benchmarks/docs_pages.py` writes them between their markers in `docs/`; `tests/docs/` holds page and source
together.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path

from docs_commands import commands
from docs_figures import FIGURES, made
from docs_settings import MODELS, settings

DOCS = Path(__file__).resolve().parents[1] / "docs"
Maker = Callable[[], str]

PAGES: dict[str, dict[str, Maker]] = {
    "settings.md": {f"settings-{name}": functools.partial(settings, name) for name in MODELS},
    "benchmarks.md": {name: functools.partial(made, name) for name in FIGURES},
    "commands.md": {"commands": commands},
}


def block(name: str) -> re.Pattern[str]:
    """What stands between the markers of `name`, in group 1."""
    return re.compile(rf"<!-- {re.escape(name)} -->\n(.*?)\n<!-- /{re.escape(name)} -->", re.DOTALL)


def shown(page: str, name: str) -> str:
    """What the page has between the markers of `name`.

    Raises:
        ValueError: the markers are not there exactly once.
    """
    found: list[str] = block(name).findall((DOCS / page).read_text(encoding="utf-8"))
    if len(found) != 1:
        raise ValueError(f"docs/{page} has {len(found)} pairs of markers of {name}, not one")
    return found[0]


def write() -> None:
    """Make every generated part anew."""
    for page, makers in PAGES.items():
        for name, maker in makers.items():
            shown(page, name)
            new = f"<!-- {name} -->\n{maker()}\n<!-- /{name} -->"
            text = (DOCS / page).read_text(encoding="utf-8")
            (DOCS / page).write_text(block(name).sub(lambda _, new=new: new, text), encoding="utf-8")


if __name__ == "__main__":
    write()
