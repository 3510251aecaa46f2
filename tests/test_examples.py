"""Every example runs as a user would run it, on tiny random weights, and says what it promises to show."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FAMILIES = ("llama", "qwen", "mistral", "gemma", "phi", "smollm")
OPTIONS = ("--model", "--prompt", "--window", "--sinks", "--max-new-tokens", "--plan", "--tiny")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs an example in this process, with nothing to reach the Hub by, and returns what it printed."""

    def run_example(name: str, *arguments: str) -> str:
        path = EXAMPLES / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return run_example


@pytest.mark.parametrize("name", FAMILIES)
def test_example_is_short_and_has_the_common_options(name: str) -> None:
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 70
    assert ast.get_docstring(ast.parse(source))
    for option in OPTIONS:
        assert f'"{option}"' in source


@pytest.mark.parametrize("name", FAMILIES)
def test_example_honours_its_options(name: str, run) -> None:
    sizes = ("--window", "16", "--sinks", "2", "--max-new-tokens", "5", "--prompt", "a prompt of some length")
    assert run(name, "--tiny", *sizes)


@pytest.mark.parametrize("name", FAMILIES)
def test_example_runs_as_planned(name: str, run) -> None:
    out = run(name, "--tiny", "--plan", "auto", "--max-new-tokens", "5")
    assert re.search(r"^weights: +loaded$", out, re.MULTILINE)
    # The tiny Phi's prompt is longer than what it was trained on; everything else is kept whole.
    assert re.search(rf"^cache: +{'ctx_sink' if name == 'phi' else 'ctx_paged'}$", out, re.MULTILINE)


def test_llama_keeps_one_cache_over_the_turns(run) -> None:
    turns = ("--prompt", "one two three", "--prompt", "four five")
    out = run("llama", "--tiny", "--window", "12", "--max-new-tokens", "6", *turns)
    stats = ast.literal_eval(out.splitlines()[-1])
    # Both prompts and both answers were seen; the very last token is never fed.
    assert stats["tokens_seen"] == len("one two three") + 6 + len("four five") + 6 - 1
    assert stats["tokens_held"] <= 12 + 4
    assert stats["tokens_evicted"] == stats["tokens_seen"] - stats["tokens_held"]


def test_qwen_rows_are_as_if_alone(run) -> None:
    out = run("qwen", "--tiny", "--window", "16", "--prompt", "ab", "--prompt", "abcdefghijklmnopqrstuvwxyz")
    assert re.findall(r"same as alone: (\w+)", out) == ["True", "True"]
    assert out.startswith("24 pads")


def test_mistral_sliding_layers_drop_their_pages_in_both_caches(run) -> None:
    few = run("mistral", "--tiny", "--max-new-tokens", "64")
    many = run("mistral", "--tiny", "--max-new-tokens", "128")
    held = [re.findall(r"(\d+) bytes held", out) for out in (few, many)]
    assert held[0] == held[1]
    assert len(held[0]) == 2


def test_gemma_shows_both_kinds_of_layers(run) -> None:
    out = run("gemma", "--tiny")
    assert "5 sliding layers of 24 tokens, 1 full layers" in out
    assert len(re.findall(r"^group", out, re.MULTILINE)) == 2


def test_phi_reads_a_prompt_longer_than_its_context(run) -> None:
    out = run("phi", "--tiny")
    seen, held = (int(n) for n in re.search(r"(\d+) tokens seen, (\d+) held", out).groups())
    assert "rope longrope, 75% of each head rotated" in out
    assert seen > 256
    assert held <= 64 + 4


def test_smollm_reports_what_is_held(run) -> None:
    out = run("smollm", "--tiny", "--window", "8")
    seen, held = (int(n) for n in re.search(r"(\d+) tokens seen, (\d+) held", out).groups())
    assert held == 8 + 4 < seen
