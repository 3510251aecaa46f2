"""`ctxopt chat`: turns share one cache, which holds exactly the tokens of the conversation."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_ctxopt.cli import chat
from hf_ctxopt.cli.turns import Conversation
from hf_ctxopt.errors import CacheFullError
from tests.cli.conftest import Ctxopt
from tests.cli.tiny import tiny_tokenizer

CACHES = ("dynamic", "ctx_paged", "ctx_sink")


def replies(folder: Path, questions: list[str], new_tokens: int) -> list[str]:
    """The same conversation without any cache kept between turns."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids, found = [], []
    for question in questions:
        opening = "<|im_end|>\n" if ids and ids[-1] != tokenizer.eos_token_id else "\n" if ids else ""
        turn = f"{opening}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        ids += tokenizer(turn, add_special_tokens=False).input_ids
        inputs = torch.tensor([ids])
        output = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=new_tokens, do_sample=False
        )
        new = output[0, len(ids) :].tolist()
        ids += new
        found.append(tokenizer.decode(new, skip_special_tokens=True))
    return found


@pytest.mark.parametrize("route", ["--fused", "--dense"])
@pytest.mark.parametrize("cache", CACHES)
def test_turns_equal_generation_from_scratch(ctxopt: Ctxopt, folder: Path, cache: str, route: str) -> None:
    questions = ["one", "two words", "three"]
    result = ctxopt("chat", "-m", folder, "-c", cache, route, "-n", "6", stdin="\n".join(questions) + "\n/exit\n")
    assert result.code == 0
    assert result.out == "".join(reply + "\n" for reply in replies(folder, questions, 6))
    seen = [int(number) for number in re.findall(r"seen (\d+) tokens", result.err)]
    assert len(seen) == 3
    assert seen == sorted(set(seen))


def test_end_of_input_and_empty_lines(ctxopt: Ctxopt, folder: Path) -> None:
    result = ctxopt("chat", "-m", folder, "-c", "dynamic", "-n", "3", stdin="\n\nhello")
    assert result.code == 0
    assert result.err.count("seen") == 1


def test_reset_starts_over(ctxopt: Ctxopt, folder: Path) -> None:
    result = ctxopt("chat", "-m", folder, "-c", "dynamic", "-n", "5", stdin="hello\n/reset\nhello\n")
    first, second = re.findall(r"seen (\d+) tokens", result.err)
    assert first == second


@pytest.mark.parametrize("person", [True, False])
def test_a_full_cache_ends_the_conversation_only(monkeypatch: pytest.MonkeyPatch, person: bool) -> None:
    done: list[str] = []

    class Full:
        def turn(self, text: str) -> None:
            done.append(text)
            if text == "long":
                raise CacheFullError(96, 64, "raise `budget`")

        def reset(self) -> None:
            done.append("reset")

    lines = iter(["long", "short", "/exit"])
    monkeypatch.setattr(chat.sys, "stdin", SimpleNamespace(isatty=lambda: person, readline=lambda: next(lines)))
    monkeypatch.setattr("builtins.input", lambda _prompt: next(lines))
    if not person:
        with pytest.raises(CacheFullError):
            chat.talk(Full())  # type: ignore[arg-type]
        return
    chat.talk(Full())  # type: ignore[arg-type]
    assert done == ["long", "reset", "short"]


def test_system_message_is_read(ctxopt: Ctxopt, folder: Path) -> None:
    counts = []
    for extra in ((), ("--system", "be brief")):
        result = ctxopt("chat", "-m", folder, "-c", "dynamic", "-n", "2", *extra, stdin="hello\n")
        counts.append(int(re.findall(r"seen (\d+) tokens", result.err)[0]))
    assert counts[1] - counts[0] == len("<|system\nbe brief|>\n") - 2


def test_memory_stays_bounded(ctxopt: Ctxopt, folder: Path) -> None:
    options = ("--window", "64", "--sinks", "4", "--page-size", "8")
    result = ctxopt("chat", "-m", folder, "-n", "8", *options, stdin="some words to read\n" * 8)
    held = re.findall(r"held (\d+) tokens, ([\d.]+ \w+)", result.err)
    assert len(held) == 8
    assert held[-1] == held[-2] == held[-3]
    assert held[-1][0] == "68"


def test_without_chat_template(ctxopt: Ctxopt, folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.suffix != ".jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    result = ctxopt("chat", "-m", tmp_path, "-c", "dynamic", stdin="hello\n")
    assert result.code == 2
    assert "no chat template" in result.err


def test_template_that_rewrites_history_is_read_anew() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"
    )
    conversation = Conversation(tokenizer)
    assert conversation.ask("one")
    conversation.answer(tokenizer("reply").input_ids)
    assert not conversation.ask("two")
    assert tokenizer.decode(conversation.token_ids) == "3<|im_start|>one<|im_start|>reply<|im_start|>two"


@pytest.mark.parametrize("ended", [True, False])
def test_end_of_turn_comes_once(ended: bool) -> None:
    tokenizer = tiny_tokenizer()
    conversation = Conversation(tokenizer)
    conversation.ask("one")
    conversation.answer(tokenizer("reply" + "<|im_end|>" * ended).input_ids)
    assert conversation.ask("two")
    turns = "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nreply<|im_end|>\n"
    assert (
        tokenizer.decode(conversation.token_ids) == turns + "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"
    )
