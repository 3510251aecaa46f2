"""Turns of a conversation as tokens, so that each turn feeds only what the cache has not seen.

The chat template is text in, text out. A later turn's text is rendered whole and the part after the last reply is cut
out of it; where a template rewrites what came before, the whole conversation is read anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from hf_ctxopt.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "(ctxopt reply)"
"""Stands for a reply where only the template's text around it is wanted."""


def encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> torch.Tensor:
    """Returns the tokens of a text, shape `(1, seq)`; `special` adds the tokenizer's own first and last tokens."""
    ids: torch.Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=special).input_ids
    return ids


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], reply_follows: bool) -> str:
    """Returns the conversation in the model's chat template.

    Raises:
        UnsupportedModelError: if the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise UnsupportedModelError("the tokenizer has no chat template; `ctxopt run --raw` continues plain text")
    text: Any = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply_follows)
    return str(text)


def first_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Returns a single user message in the model's chat template."""
    return render(tokenizer, [{"role": "user", "content": text}], True)


@dataclass
class Conversation:
    """What was said, as messages and as the very tokens that the model saw or wrote.

    Attributes:
        tokenizer: renders and encodes the turns.
        messages: role and content of every message so far.
        token_ids: every token of the conversation so far, in order.
    """

    tokenizer: PreTrainedTokenizerBase
    messages: list[dict[str, str]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    def ask(self, text: str) -> bool:
        """Adds a user message and the tokens up to where the reply begins.

        Returns:
            True if the tokens before stayed as they were, so that a cache of them can be used on.
        """
        fresh = not self.token_ids
        tail = None if fresh else self._tail(text)
        self.messages.append({"role": "user", "content": text})
        if tail is not None:
            self.token_ids.extend(tail)
            return True
        self.token_ids = encode(self.tokenizer, render(self.tokenizer, self.messages, True), False)[0].tolist()
        return fresh

    def answer(self, token_ids: list[int]) -> None:
        """Adds the reply as the tokens that the model wrote."""
        self.token_ids.extend(token_ids)
        reply: Any = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": str(reply)})

    def _tail(self, text: str) -> list[int] | None:
        """Returns the tokens that follow the last reply when `text` is asked, None if they cannot be cut out."""
        before = render(self.tokenizer, self.messages, False)
        after = render(self.tokenizer, [*self.messages, {"role": "user", "content": text}], True)
        # What the template puts behind a reply, whatever the reply is.
        marked = render(self.tokenizer, [*self.messages[:-1], {"role": "assistant", "content": MARK}], False)
        closing = marked.rpartition(MARK)[2]
        if MARK not in marked or not before.endswith(closing) or not after.startswith(before):
            return None
        tail: list[int] = encode(self.tokenizer, after[len(before) - len(closing) :], False)[0].tolist()
        # The reply's end-of-turn token is in the template too; it must not come twice.
        return tail[1:] if tail[:1] == self.token_ids[-1:] else tail
