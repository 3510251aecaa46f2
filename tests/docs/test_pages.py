"""Generated parts of the documentation are what their sources make, and the reference names all that is public."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

import hf_ctxopt

ROOT = Path(__file__).resolve().parents[2]
PARTS = re.findall(
    r"^<!-- ([\w.-]+) -->$", "\n".join(p.read_text() for p in (ROOT / "docs").glob("*.md")), re.MULTILINE
)


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The generator, which finds its parts beside itself as a script does."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("docs_pages")


@pytest.mark.parametrize("part", PARTS)
def test_part_is_what_its_source_makes(pages: ModuleType, part: str) -> None:
    page, maker = next((page, makers[part]) for page, makers in pages.PAGES.items() if part in makers)
    assert pages.shown(page, part) == maker(), f"docs/{page} is old: run python benchmarks/docs_pages.py"


def test_every_part_is_on_its_page(pages: ModuleType) -> None:
    assert sorted(PARTS) == sorted(part for makers in pages.PAGES.values() for part in makers)


def test_a_part_without_markers_is_an_error(pages: ModuleType) -> None:
    with pytest.raises(ValueError, match="0 pairs of markers"):
        pages.shown("index.md", "settings-Llama-2-7B")


def test_settings_cover_every_card_once_for_each_goal(pages: ModuleType) -> None:
    from hf_ctxopt.planner.profiles import PROFILES

    for part in (part for part in PARTS if part.startswith("settings-")):
        text = pages.shown("settings.md", part)
        cards = [name for row in re.findall(r"^\| ([a-z][^|]*) \|", text, re.MULTILINE) for name in row.split(", ")]
        assert sorted(card for card in cards if card != "cards") == sorted(3 * list(PROFILES))


def test_reference_names_all_that_is_public() -> None:
    named = re.findall(r"^::: hf_ctxopt\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert len(named) == len(set(named))
    assert set(named) == set(hf_ctxopt.__all__) - {"__version__"}


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    there = [str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").glob("**/*.md")]
    assert sorted(listed) == sorted(there)
