"""`ctxopt run`: the text is that of a plain `generate`, wherever the prompt comes from."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cli.conftest import Ctxopt

PROMPT = "the quick brown fox"
CACHES = ("dynamic", "ctx_paged", "ctx_sink", "ctx_auto")


def expected(folder: Path, prompt: str, new_tokens: int) -> str:
    """What transformers' own generate says, greedily."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("route", ["--fused", "--dense"])
@pytest.mark.parametrize("cache", CACHES)
def test_text_is_that_of_plain_generate(ctxopt: Ctxopt, folder: Path, cache: str, route: str) -> None:
    result = ctxopt("run", PROMPT, "-m", folder, "--cache", cache, route, "-n", "12")
    assert result.code == 0
    assert result.out == expected(folder, PROMPT, 12) + "\n"
    assert "seen 30 tokens" in result.err


@pytest.mark.parametrize("source", ["argument", "file", "stdin"])
def test_prompt_sources_agree(ctxopt: Ctxopt, folder: Path, tmp_path: Path, source: str) -> None:
    options = ("-m", folder, "-c", "dynamic", "-n", "5", "--quiet")
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT, encoding="utf-8")
    given = {"argument": (PROMPT,), "file": ("--file", file), "stdin": ()}[source]
    result = ctxopt("run", *given, *options, stdin=PROMPT if source == "stdin" else "")
    assert result.out == expected(folder, PROMPT, 5) + "\n"
    assert result.err == ""


def test_file_then_prompt_and_chat_template(ctxopt: Ctxopt, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("a text", encoding="utf-8")
    result = ctxopt("run", "a question", "-f", file, "--instruct", "-m", folder, "-c", "dynamic", "-n", "4")
    wrapped = "<|im_start|>user\na text\n\na question<|im_end|>\n<|im_start|>assistant\n"
    assert result.out == expected(folder, wrapped, 4) + "\n"


def test_sink_holds_only_sinks_and_window(ctxopt: Ctxopt, folder: Path) -> None:
    result = ctxopt("run", "x" * 200, "-m", folder, "--window", "32", "--sinks", "2", "--page-size", "8", "-n", "20")
    assert result.code == 0
    assert "seen 219 tokens | held 34 tokens" in result.err


def test_only_a_window_passes_the_trained_length_in_silence(ctxopt: Ctxopt, folder: Path) -> None:
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("transformers.generation.stopping_criteria")
    log.addHandler(handler)
    try:
        for cache, reminders in (("ctx_sink", 0), ("ctx_paged", 1)):
            type(log).warning_once.cache_clear()  # type: ignore[attr-defined]
            assert ctxopt("run", "a" * 520, "-m", folder, "-c", cache, "-n", "2").code == 0
            assert sum("predefined maximum length" in text for text in told) == reminders
    finally:
        log.removeHandler(handler)


def test_sampling_depends_on_the_seed_only(ctxopt: Ctxopt, folder: Path) -> None:
    def sample(seed: int) -> str:
        options = ("-m", folder, "-c", "dynamic", "-n", "16", "--temperature", "1.5", "--top-k", "50")
        return ctxopt("run", PROMPT, *options, "--seed", seed).out

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
