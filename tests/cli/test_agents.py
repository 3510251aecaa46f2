"""`ctxopt agents`: a row for each agent, what they share is computed once, and the store ends with the command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import hf_ctxopt
from tests.cli.conftest import Ctxopt
from tests.cli.tiny import tiny_tokenizer

SYSTEM = "Answer in one word. " * 6


@pytest.fixture
def system(tmp_path: Path) -> Path:
    path = tmp_path / "system.txt"
    path.write_text(SYSTEM, encoding="utf-8")
    return path


def test_agents_share_their_system_prompt(ctxopt: Ctxopt, folder: Path, system: Path, tmp_path: Path) -> None:
    file = tmp_path / "out" / "agents.json"
    options = ("--agents", "3", "--turns", "2", "-n", "4", "--page-size", "16", "--system-file", system)
    others = set(hf_ctxopt.stores())
    result = ctxopt("agents", "-m", folder, *options, "--json", file)
    assert result.code == 0
    assert result.out.endswith("\n")
    found = json.loads(file.read_text(encoding="utf-8"))
    turns = found["turns"]
    assert [(turn["agent"], turn["turn"]) for turn in turns] == [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (3, 2)]
    rendered = tiny_tokenizer()(f"<|im_start|>system\n{SYSTEM.strip()}<|im_end|>\n").input_ids
    assert turns[0]["reused_tokens"] == 0
    for turn in turns[1:3]:
        assert turn["reused_tokens"] >= len(rendered)
    for turn, before in zip(turns[3:], turns[:3], strict=True):
        assert turn["reused_tokens"] >= before["prompt_tokens"] - 16
        assert turn["prompt_tokens"] > before["prompt_tokens"]
    assert all(turn["first_token_s"] > 0 and turn["bytes_used"] > 0 for turn in turns)
    store = found["store"]
    assert store["prompt_tokens"] == sum(turn["prompt_tokens"] for turn in turns)
    assert store["reused_tokens"] == sum(turn["reused_tokens"] for turn in turns)
    assert turns[-1]["hit_rate"] == store["hit_rate"]
    for head in ("agent", "turn", "prompt", "reused", "hit rate", "bytes", "first token"):
        assert head in result.out
    assert len(re.findall(r"^ +[123] +2 .* ms", result.out, re.MULTILINE)) == 3
    assert f"{store['reused_tokens']:,} of {store['prompt_tokens']:,} prompt tokens reused" in result.err
    assert set(hf_ctxopt.stores()) == others


def test_a_small_store_and_the_host(ctxopt: Ctxopt, folder: Path, system: Path, tmp_path: Path) -> None:
    options = ("--agents", "3", "--turns", "2", "-n", "2", "--page-size", "8", "--system-file", system)
    counts = {}
    for name, extra in (("small", ()), ("host", ("--cpu-budget", "4MiB"))):
        file = tmp_path / f"{name}.json"
        result = ctxopt("agents", "-m", folder, *options, "--store-budget", "320", *extra, "--json", file)
        assert result.code == 0
        counts[name] = json.loads(file.read_text(encoding="utf-8"))["store"]
    assert counts["small"]["evicted_pages"] > 0
    assert counts["host"]["brought_back_pages"] > 0
    assert counts["host"]["hit_rate"] > counts["small"]["hit_rate"]


@pytest.mark.parametrize(
    ("options", "told"),
    [(("--store-budget", "much"), "budget='much'"), (("--cpu-budget", "3 pages"), "cpu_budget='3 pages'"),
     (("--page-size", "5"), "page_size=5"), (("--kv-bits", "k8"), "kv_bits"),
     (("--system-file", "/no/such/file"), "file="), (("--json", "{folder}"), "json=")],
)  # fmt: skip
def test_bad_options_are_one_clean_line(ctxopt: Ctxopt, folder: Path, options: tuple[str, ...], told: str) -> None:
    result = ctxopt("agents", "-m", folder, *(option.format(folder=folder) for option in options))
    assert result.code == 2
    assert told in result.err
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1


def test_without_chat_template(ctxopt: Ctxopt, folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.suffix != ".jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    result = ctxopt("agents", "-m", tmp_path)
    assert result.code == 2
    assert "chat template" in result.err


def test_a_conversation_longer_than_the_model_is_told(ctxopt: Ctxopt, folder: Path) -> None:
    result = ctxopt("agents", "-m", folder, "-n", "400")
    assert result.code == 2
    assert "max_context" in result.err
