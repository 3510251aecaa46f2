"""Which tokens belong to which message, with templates that render a conversation's beginning differently."""

from __future__ import annotations

from typing import Any

import pytest

import hf_ctxopt
from hf_ctxopt.errors import ConfigError
from hf_ctxopt.integration.messages import message_spans

TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "<think>hmm, hmm, hmm</think>yes"},
    {"role": "user", "content": "more"},
]


class Letters:
    """A tokenizer of letters; earlier answers lose their reasoning (Qwen3), and a user must begin (Mistral)."""

    def __init__(self, drops_reasoning: bool = True, needs_a_user: bool = False, counts: bool = False) -> None:
        self.drops_reasoning, self.needs_a_user, self.counts = drops_reasoning, needs_a_user, counts

    def apply_chat_template(self, messages: list[dict[str, Any]], **_: Any) -> list[int]:
        if self.needs_a_user and not any(message["role"] == "user" for message in messages):
            raise ValueError("conversation roles must alternate")
        text = f"{len(messages)}" * 20 if self.counts else ""
        for at, message in enumerate(messages):
            content = message["content"]
            if self.drops_reasoning and at < len(messages) - 1 and "</think>" in content:
                content = content.split("</think>")[1]
            text += f"<{message['role'][0]}>{content};"
        return [ord(letter) for letter in text]


def pieces(tokenizer: Letters) -> list[str]:
    whole = tokenizer.apply_chat_template(TALK)
    spans = message_spans(tokenizer, TALK)
    assert [start for start, _ in spans[1:]] == [end for _, end in spans[:-1]]
    assert (spans[0][0], spans[-1][1]) == (0, len(whole))
    return ["".join(map(chr, whole[start:end])) for start, end in spans]


def test_every_message_has_its_own_tokens() -> None:
    plain = Letters(drops_reasoning=False)
    assert pieces(plain) == ["<s>be brief;", "<u>hi;", "<a><think>hmm, hmm, hmm</think>yes;", "<u>more;"]


def test_reasoning_that_a_template_leaves_out_later() -> None:
    """What follows the answer shows where it ends: behind the next message's header."""
    assert pieces(Letters()) == ["<s>be brief;", "<u>hi;", "<a>yes;<u>", "more;"]
    given = hf_ctxopt.priorities_from_messages(Letters(), TALK, {"system": 90, "assistant": 20})
    assert given == [[0, 12, 90], [18, 28, 20]]


def test_a_template_that_refuses_a_system_message_alone() -> None:
    assert pieces(Letters(needs_a_user=True))[0] == "<s>be brief;<u>"


def test_a_template_that_changes_the_beginning_is_refused() -> None:
    with pytest.raises(ConfigError, match="chat template"):
        message_spans(Letters(counts=True), [*TALK[:3], {"role": "user", "content": None}])
