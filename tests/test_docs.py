"""Every ```python block of the README and of docs/ runs, with `model`, `tokenizer` and `inputs` as a reader has them.

The model is a tiny random Llama, and so is that in the folder `my-model`: that the code runs is tested, not what the
model says. Lines of `ctxopt` in ```bash blocks run if they are about `my-model` or about no model; others are parsed.
"""

from __future__ import annotations

import copy
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

import hf_ctxopt
from hf_ctxopt.cli import app
from tests.cli.conftest import Ctxopt, ctxopt  # noqa: F401  (a fixture)
from tests.cli.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCKS = [
    pytest.param(page, match.start(), match[1], id=f"{page.relative_to(ROOT)}:{number}")
    for page in PAGES
    for number, match in enumerate(BLOCK.finditer(page.read_text(encoding="utf-8")), 1)
]
SHELL = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = [
    pytest.param(shlex.split(line, comments=True)[1:], id=f"{page.relative_to(ROOT)}:{line.split('#')[0].strip()}")
    for page in PAGES
    for block in SHELL.findall(page.read_text(encoding="utf-8"))
    for line in block.splitlines()
    if line.startswith("ctxopt ")
]
MODEL = tiny_model(positions=2048)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `my-model`, as the documentation's setup has it."""
    folder = tmp_path_factory.mktemp("reader")
    copy.deepcopy(MODEL).save_pretrained(folder / "my-model")
    tiny_tokenizer().save_pretrained(folder / "my-model")
    return folder


@pytest.mark.parametrize(("page", "start", "code"), BLOCKS)
def test_block_runs(
    page: Path, start: int, code: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
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


@pytest.mark.parametrize("arguments", COMMANDS)
def test_command_runs(
    arguments: list[str],
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    ctxopt: Ctxopt,  # noqa: F811
) -> None:
    monkeypatch.chdir(place)
    command: Any = typer.main.get_command(app).commands[arguments[0]]  # type: ignore[attr-defined]
    command.make_context(arguments[0], arguments[1:])  # raises for an unknown option or a bad value
    if "my-model" in arguments or arguments[0] == "env":
        result = ctxopt(*arguments, stdin="/exit\n")
        assert result.code == 0, result.err
        assert result.out.strip() or arguments[0] == "chat"  # which writes answers only, and was told to leave


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
