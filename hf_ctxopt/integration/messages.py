"""Which tokens of a rendered conversation belong to which message, and priorities by role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError
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
        worth = by_role[role] if role in by_role else default
        if worth is not None and start < end:
            if found and found[-1][1:] == [start, worth]:
                found[-1][1] = end
            else:
                found.append([start, end, worth])
    return found


def message_spans(tokenizer: Any, messages: Sequence[Message], **template: Any) -> list[tuple[int, int]]:
    """Tokens `[start, end)` of each message; together they are all tokens of the rendered conversation.

    Raises:
        ConfigError: the template does not render the beginning of a conversation as it begins the whole.
    """
    whole = render(tokenizer, messages, **template)
    spans, start = [], 0
    for count in range(1, len(messages) + 1):
        end = len(whole) if count == len(messages) else _end(tokenizer, messages, count, whole, template)
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
    tokenizer: Any, messages: Sequence[Message], count: int, whole: list[int], template: Mapping[str, Any]
) -> int:
    """Where the first `count` messages end in the whole."""
    try:
        part = render(tokenizer, messages[:count], **template)
    except Exception as error:  # templates are programs of others: some refuse conversations that end so
        found = _where_others_differ(tokenizer, messages, count, whole, template)
        if found is None:
            raise ConfigError("messages", f"the first {count}", f"what the chat template renders: {error}") from error
        return found
    same = _common(part, whole)
    # A template may close what is open at the end (a newline, an end mark): that alone may differ.
    if same < len(part) and len(part) - same > _CLOSING:
        # Some templates (Qwen3) leave the reasoning out of every answer but the last one.
        found = _where_others_differ(tokenizer, messages, count, whole, template)
        if found is not None:
            return found
        raise ConfigError(
            "messages", f"the first {count}", "a conversation whose beginning the chat template renders as it does "
            f"within the whole; they part after {same} of {len(part)} tokens",
        )  # fmt: skip
    return same


_CLOSING = 4  # tokens that a template may add at the end of a conversation


def _where_others_differ(
    tokenizer: Any, messages: Sequence[Message], count: int, whole: list[int], template: Mapping[str, Any]
) -> int | None:
    """Where another text in message `count` first shows: its own header counts to the messages before it, then.

    `None` if it does not show, or the message has no text.
    """
    following = dict(messages[count])
    if not isinstance(following.get("content"), str):
        return None
    following["content"] = "\u241e " + following["content"]
    other = render(tokenizer, [*messages[:count], following, *messages[count + 1 :]], **template)
    same = _common(other, whole)
    return same if same < len(whole) else None


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
