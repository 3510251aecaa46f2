"""Which tokens of a rendered conversation belong to which message, and priorities by role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError
from ..pages.radix_node import same_tokens
from ..policies.priority import check_priority

Message = Mapping[str, Any]


def priorities_from_messages(
    tokenizer: Any,
    messages: Sequence[Message],
    by_role: Mapping[str, int],
    *,
    default: int | None = None,
    **template: Any,
) -> list[list[int]]:
    """Priorities for `cache_config`, by the role of each message.

    Args:
        tokenizer: its chat template renders the conversation.
        messages: the conversation.
        by_role: role → priority, 0 to 100.
        default: of messages with other roles; `None` leaves them without one of their own.
        **template: further arguments of `apply_chat_template` (`tools` …).

    Returns:
        `[start, end, priority]` for each message that has one, in tokens of
        `tokenizer.apply_chat_template(messages, tokenize=True)`.

    Raises:
        ConfigError: a priority is out of range, or the template renders a message differently once others follow, so
            that no tokens are its own.
    """
    for role, priority in by_role.items():
        check_priority(f"by_role[{role!r}]", priority)
    if default is not None:
        check_priority("default", default)
    found: list[list[int]] = []
    for message, (start, end) in zip(messages, message_spans(tokenizer, messages, **template), strict=True):
        role = str(message.get("role"))
        worth = by_role.get(role, default)
        if worth is not None and start < end:
            if found and found[-1][1:] == [start, worth]:
                found[-1][1] = end
            else:
                found.append([start, end, worth])
    return found


def message_spans(tokenizer: Any, messages: Sequence[Message], **template: Any) -> list[tuple[int, int]]:
    """Tokens `[start, end)` of each message; together they are all tokens of the rendered conversation.

    Raises:
        ConfigError: the template does not render the beginning of a conversation as it begins the whole, and not only
            because the last message looks otherwise than one that others follow.
    """
    whole = render(tokenizer, messages, **template)
    spans, start = [], 0
    for count in range(1, len(messages) + 1):
        end = len(whole) if count == len(messages) else _end(tokenizer, messages, count, start, whole, template)
        spans.append((start, max(start, end)))
        start = max(start, end)
    return spans


def render(tokenizer: Any, messages: Sequence[Message], generate: bool = False, **template: Any) -> list[int]:
    """Token ids of a conversation."""
    ids = tokenizer.apply_chat_template(
        list(messages), tokenize=True, add_generation_prompt=generate, return_dict=False, **template
    )
    return [int(token) for token in ids]


def _end(
    tokenizer: Any, messages: Sequence[Message], count: int, start: int, whole: list[int], template: Mapping[str, Any]
) -> int:
    """Where the first `count` messages end in the whole; the last of them begins at `start`."""
    try:
        part = render(tokenizer, messages[:count], **template)
    except Exception as error:  # templates are programs of others: some refuse conversations that end so
        return _until_next(tokenizer, messages, count, whole, template, str(error))
    same = same_tokens(part, whole)
    # A template may close what is open at the end (a newline, an end mark): that alone may differ.
    if len(part) - same <= _CLOSING and not (count == 1 and _elsewhere(tokenizer, messages, same, whole, template)):
        return same
    why = f"within the whole it parts after {same} of {len(part)} tokens"
    if same < start:
        raise _refused(count, why)
    return _until_next(tokenizer, messages, count, whole, template, why)  # only what comes last looks otherwise


_CLOSING = 4  # tokens that a template may add at the end of a conversation
_MARK = "\u241e "


def _elsewhere(
    tokenizer: Any, messages: Sequence[Message], end: int, whole: list[int], template: Mapping[str, Any]
) -> bool:
    """Whether the first message stands behind its own end: some templates put a system text into the next message."""
    other = _changed(tokenizer, messages, 0, template)
    return other is not None and same_tokens(other, whole) >= end


def _until_next(
    tokenizer: Any, messages: Sequence[Message], count: int, whole: list[int], template: Mapping[str, Any], why: str
) -> int:
    """Where the text of the next message begins: where another text would part from the whole."""
    other = _changed(tokenizer, messages, count, template)
    if other is None:
        raise _refused(count, why)
    return same_tokens(other, whole)


def _changed(tokenizer: Any, messages: Sequence[Message], at: int, template: Mapping[str, Any]) -> list[int] | None:
    """The conversation with another text in one message; `None` where that has none."""
    content = messages[at].get("content")
    if not isinstance(content, str):
        return None
    return render(tokenizer, [*messages[:at], {**messages[at], "content": _MARK + content}, *messages[at + 1 :]],
                  **template)  # fmt: skip


def _refused(count: int, why: str) -> ConfigError:
    allowed = f"a conversation whose beginning the chat template renders as it does within the whole ({why})"
    return ConfigError("messages", f"the first {count}", allowed)
