"""Priorities by role: spans that cover the rendered conversation, for chat templates of several habits."""

from __future__ import annotations

from typing import Any

import pytest

import hf_ctxopt
from hf_ctxopt.errors import ConfigError
from hf_ctxopt.integration.messages import message_spans, render
from tests.cli.tiny import TEMPLATE, tiny_tokenizer

TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a page?"},
    {"role": "assistant", "content": "Some tokens."},
    {"role": "tool", "content": "32"},
    {"role": "user", "content": "How many?"},
]
ROLE = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}" + ROLE + "{% endfor %}"
)
ENDS_WITH_NO_SYSTEM = (
    "{% if messages[-1]['role'] == 'system' %}{{ raise_exception('a system message cannot be the last') }}{% endif %}"
    "{% for m in messages %}" + ROLE + "{% endfor %}"
)
ALTERNATING = (
    "{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.first %}{{ first }}{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
COUNTED = "{{ messages | length }} {% for m in messages %}" + ROLE + "{% endfor %}"
LAST_THINKS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if loop.last and m['role'] == 'assistant' %}"
    "<think>nothing</think>{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
TOOLS = (
    "{% if tools %}<|im_start|>system\nTools: {% for t in tools %}{{ t['function']['name'] }} {% endfor %}<|im_end|>\n"
    "{% endif %}{% for m in messages %}" + ROLE + "{% endfor %}"
)


def spoken(template: str, talk: list[dict[str, Any]], **extra: Any) -> list[str]:
    """The text of each message's span; all of them, one after the other, are the rendered conversation."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    ids = render(tokenizer, talk, **extra)
    spans = message_spans(tokenizer, talk, **extra)
    assert [start for start, _ in spans] == [0, *(end for _, end in spans[:-1])]
    assert spans[-1][1] == len(ids)
    return [tokenizer.decode(ids[start:end]) for start, end in spans]


def chatml(message: dict[str, Any]) -> str:
    return f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"


def test_each_message_has_the_tokens_of_its_own_text() -> None:
    assert spoken(TEMPLATE, TALK) == [chatml(message) for message in TALK]
    assert spoken(TEMPLATE, TALK[:1]) == [chatml(TALK[0])]


def test_a_default_system_prompt_goes_with_the_first_message() -> None:
    first, *others = spoken(DEFAULT_SYSTEM, TALK[1:])
    assert first == "<|im_start|>system\nYou help.<|im_end|>\n" + chatml(TALK[1])
    assert others == [chatml(message) for message in TALK[2:]]
    assert spoken(DEFAULT_SYSTEM, TALK) == [chatml(message) for message in TALK]


def test_a_template_that_refuses_to_end_with_a_system_message() -> None:
    """The system message then reaches up to where another question would differ."""
    first, second, *others = spoken(ENDS_WITH_NO_SYSTEM, TALK)
    assert first == chatml(TALK[0]) + "<|im_start|>user\n"
    assert first + second == chatml(TALK[0]) + chatml(TALK[1])
    assert others == [chatml(message) for message in TALK[2:]]
    late = [*TALK[1:3], TALK[0], TALK[4]]
    assert "".join(spoken(ENDS_WITH_NO_SYSTEM, late)) == "".join(map(chatml, late))


def test_a_template_that_puts_the_system_text_into_the_first_question() -> None:
    first, second, third = spoken(ALTERNATING, TALK[:3])
    assert first == "<|im_start|>user\nBe brief.\n\n"
    assert second == "What is a page?<|im_end|>\n"
    assert third == chatml(TALK[2])


def test_roles_that_the_template_refuses_are_its_own_error() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = ALTERNATING
    with pytest.raises(Exception, match="alternate"):
        message_spans(tokenizer, [TALK[1], TALK[1]])


def test_an_answer_that_looks_otherwise_once_others_follow() -> None:
    """Templates that strip the thoughts of earlier answers: the answer reaches up to the next question's text."""
    texts = spoken(LAST_THINKS, [TALK[1], TALK[2], TALK[4]])
    assert texts == [chatml(TALK[1]), chatml(TALK[2]) + "<|im_start|>user\n", "How many?<|im_end|>\n"]


def test_a_beginning_that_is_rendered_otherwise_later_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = COUNTED
    with pytest.raises(ConfigError, match="messages"):
        hf_ctxopt.priorities_from_messages(tokenizer, TALK, {"system": 90})


def test_a_message_without_a_text_cannot_say_where_one_before_it_ends() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = ENDS_WITH_NO_SYSTEM
    with pytest.raises(ConfigError, match="the first 1"):
        message_spans(tokenizer, [TALK[0], {"role": "user", "content": None}, TALK[2]])


def test_tools_reach_the_template() -> None:
    tools = [{"type": "function", "function": {"name": "count", "description": "", "parameters": {}}}]
    first, *others = spoken(TOOLS, TALK, tools=tools)
    assert first == "<|im_start|>system\nTools: count <|im_end|>\n" + chatml(TALK[0])
    assert others == [chatml(message) for message in TALK[1:]]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TOOLS
    ranked = hf_ctxopt.priorities_from_messages(tokenizer, TALK, {"system": 90}, tools=tools)
    assert ranked == [[0, len(tokenizer(first).input_ids), 90]]


def test_priorities_by_role() -> None:
    tokenizer = tiny_tokenizer()
    spans = message_spans(tokenizer, TALK)
    ranked = hf_ctxopt.priorities_from_messages(tokenizer, TALK, {"system": 90, "tool": 60})
    assert ranked == [[*spans[0], 90], [*spans[3], 60]]
    everything = hf_ctxopt.priorities_from_messages(tokenizer, TALK, {"system": 90, "tool": 60}, default=20)
    assert everything == [[*spans[0], 90], [spans[1][0], spans[2][1], 20], [*spans[3], 60], [*spans[4], 20]]
    assert hf_ctxopt.priorities_from_messages(tokenizer, TALK, {}) == []
    assert hf_ctxopt.priorities_from_messages(tokenizer, TALK, {}, default=7) == [[0, spans[-1][1], 7]]


@pytest.mark.parametrize(
    ("by_role", "default", "field"),
    [({"system": 101}, None, "by_role"), ({"system": -1}, None, "by_role"), ({"user": 1.5}, None, "by_role"),
     ({}, 200, "default"), ({}, True, "default")],
)  # fmt: skip
def test_priorities_out_of_range(by_role: dict[str, Any], default: Any, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        hf_ctxopt.priorities_from_messages(tiny_tokenizer(), TALK, by_role, default=default)


def test_the_ranges_are_options_of_the_caches() -> None:
    from hf_ctxopt.caches.options import PrefixOptions, PriorityOptions

    ranked = hf_ctxopt.priorities_from_messages(tiny_tokenizer(), TALK, {"system": 90, "user": 10}, default=50)
    for options in (PrefixOptions(priorities=ranked), PriorityOptions(priorities=ranked)):
        assert options.retention.of_token(0, 1000) == (90, None)
