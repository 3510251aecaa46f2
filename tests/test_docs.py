"""Every ```python block of the README and of docs/ runs, with `model`, `tokenizer` and `inputs` as a reader has them.

The model is a tiny random Llama: that the code runs is tested, not what the model says.
"""

from __future__ import annotations

import copy
import importlib.util
import re
from pathlib import Path

import pytest

import hf_ctxopt
from tests.cli.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCKS = [
    pytest.param(page, match.start(), match[1], id=f"{page.relative_to(ROOT)}:{number}")
    for page in PAGES
    for number, match in enumerate(BLOCK.finditer(page.read_text(encoding="utf-8")), 1)
]
MODEL = tiny_model(positions=2048)


@pytest.mark.parametrize(("page", "start", "code"), BLOCKS)
def test_block_runs(page: Path, start: int, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny_tokenizer()
    inputs = tokenizer("A text that is long enough to be worth keeping in pages.", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    names = {"__name__": "__main__", "model": copy.deepcopy(MODEL), "tokenizer": tokenizer, "inputs": inputs}
    # The line numbers of a traceback are then those of the page.
    line = page.read_text(encoding="utf-8")[:start].count("\n") + 1
    try:
        exec(compile("\n" * line + code, str(page), "exec"), names)
    finally:
        hf_ctxopt.register()  # a block may have shown unregister()


def test_readme_has_blocks_and_one_demo_table() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(BLOCK.findall(readme)) >= 4
    assert readme.count("<!-- demo-table -->") == readme.count("<!-- /demo-table -->") == 1


def test_tables_of_figures_are_those_of_the_json() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert tables.filled(readme) == readme


def test_links_to_files_of_this_repository_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"
