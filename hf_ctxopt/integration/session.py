"""One agent's conversation over a shared prefix store."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, TextIteratorStreamer

from ..caches.options import PrefixOptions
from ..errors import ConfigError, CtxoptError
from ..planner.plan import STORE
from .compat import cache_in
from .messages import Message, priorities_from_messages, render


class Session:
    """A conversation whose earlier turns, and whatever it shares with other sessions, are computed once.

    The pages belong to the store, and stay in it by priority; a session holds only its messages.

    Args:
        model: a transformers model.
        tokenizer: its tokenizer, with a chat template.
        store: name of the prefix store that sessions share.
        salt: sessions of another salt share nothing.
        priorities: role → priority of its messages, e.g. `{"system": 90, "tool": 60}`.
        max_context: most tokens of a prompt with its answer; where a conversation grows past it, the oldest turns
            go, message by message, never a system message. `None` for what the model has learned.
        max_new_tokens: most tokens of an answer.
        cache_config: further options of `ctx_prefix`.
        **generation: further arguments of `generate`.

    Raises:
        ConfigError: an option is out of range, or the tokenizer has no chat template.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        store: str = STORE,
        salt: str = "",
        priorities: Mapping[str, int] | None = None,
        max_context: int | None = None,
        max_new_tokens: int = 256,
        cache_config: Mapping[str, Any] | None = None,
        **generation: Any,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError("tokenizer", type(tokenizer).__name__, "one with a chat template")
        self.priorities = dict(priorities or {})
        self.cache_config = {**(cache_config or {}), "store": store, "salt": salt}
        PrefixOptions.parse(self.cache_config)
        learned = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        self.max_context = max_context if max_context is not None else learned
        self.max_new_tokens, self.generation = max_new_tokens, generation
        for field, value in (("max_context", self.max_context), ("max_new_tokens", max_new_tokens)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(field, value, "a number of tokens >= 1")
        self.messages: list[dict[str, Any]] = []
        self.shifted = 0
        self.last: dict[str, Any] = {}
        self._closed = False

    def send(self, messages: str | Message | Sequence[Message]) -> str:
        """Add messages to the conversation and return the answer, which is added too.

        Args:
            messages: a message, several, or the text of one from the user.

        Raises:
            ConfigError: even without earlier turns the conversation is longer than `max_context`.
        """
        conversation, ids = self._prepared(messages)
        text = self._generate(conversation, ids, None)
        self.messages = [*conversation, {"role": "assistant", "content": text}]
        return text

    def stream(self, messages: str | Message | Sequence[Message]) -> Iterator[str]:
        """Like `send`, piece by piece. The answer is added once it is complete.

        Whoever closes the stream before its end stops the model at the next token, and nothing is added.
        """
        conversation, ids = self._prepared(messages)
        stop = _Stop()
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failures: list[BaseException] = []
        texts: list[str] = []

        def run() -> None:
            try:
                texts.append(self._generate(conversation, ids, streamer, stop))
            except BaseException as error:  # handed to the caller's thread
                failures.append(error)
                streamer.end()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            stop.asked = True
            thread.join()
        if failures:
            raise failures[0]
        self.messages = [*conversation, {"role": "assistant", "content": texts[0]}]

    def fork(self) -> Session:
        """Another session that goes on from here. What both have said so far is shared, not copied."""
        self._require_open()
        config = {key: value for key, value in self.cache_config.items() if key not in ("store", "salt")}
        twin = Session(
            self.model, self.tokenizer, store=self.cache_config["store"], salt=self.cache_config["salt"],
            priorities=self.priorities, max_context=self.max_context, max_new_tokens=self.max_new_tokens,
            cache_config=config, **self.generation,
        )  # fmt: skip
        twin.messages, twin.shifted = [dict(message) for message in self.messages], self.shifted
        return twin

    def close(self) -> None:
        """End the session. Its pages stay in the store for others, until their turn comes."""
        self._closed = True
        self.messages = []

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- one turn

    def _require_open(self) -> None:
        if self._closed:
            raise CtxoptError("the session is closed")

    def _prepared(self, messages: str | Message | Sequence[Message]) -> tuple[list[dict[str, Any]], list[int]]:
        """The conversation with the new messages, shortened at a message's boundary if need be, and its tokens."""
        self._require_open()
        given: Any = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        given = [given] if isinstance(given, Mapping) else given
        if not isinstance(given, Sequence) or not given or not all(isinstance(one, Mapping) for one in given):
            raise ConfigError("messages", messages, "a text, a message (role and content), or a list of them")
        conversation = [*self.messages, *map(dict, given)]
        ids = render(self.tokenizer, conversation, generate=True)
        shifted = 0
        while self.max_context is not None and len(ids) + self.max_new_tokens > self.max_context:
            shorter = _without_oldest_turn(conversation, keep=len(given))
            if shorter is None:
                allowed = f"at most {self.max_context - self.max_new_tokens} tokens (max_context - max_new_tokens)"
                raise ConfigError("messages", f"{len(ids)} tokens", allowed)
            shifted += len(conversation) - len(shorter)
            conversation, ids = shorter, render(self.tokenizer, shorter, generate=True)
        self.shifted += shifted
        return conversation, ids

    def _generate(
        self, conversation: list[dict[str, Any]], ids: list[int], streamer: Any, stop: _Stop | None = None
    ) -> str:
        config = dict(self.cache_config)
        if self.priorities:
            config["priorities"] = priorities_from_messages(self.tokenizer, conversation, self.priorities)
        generation = dict(self.generation)
        if stop is not None:
            generation["stopping_criteria"] = [*(generation.get("stopping_criteria") or ()), stop]
        device = self.model.device
        prompt = torch.tensor([ids], device=device)
        out = self.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), cache_implementation="ctx_prefix", cache_config=config,
            max_new_tokens=self.max_new_tokens, return_dict_in_generate=True, streamer=streamer, **generation,
        )  # fmt: skip
        cache = cache_in(out)
        self.last = cache.stats()["prefix"]
        cache.release()
        text: str = self.tokenizer.decode(out.sequences[0, len(ids) :], skip_special_tokens=True)
        return text


class _Stop(StoppingCriteria):
    """Ends generation after the current token once it is asked to."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        """One flag per row of `input_ids` `(batch, seq)`: whether to stop."""
        return torch.full((input_ids.shape[0],), self.asked, device=input_ids.device, dtype=torch.bool)  # type: ignore[return-value]


def _without_oldest_turn(conversation: list[dict[str, Any]], keep: int) -> list[dict[str, Any]] | None:
    """The conversation without its oldest message that is no system message, and what answers it."""
    start = next((at for at, message in enumerate(conversation) if message.get("role") != "system"), None)
    if start is None or start >= len(conversation) - keep:
        return None
    stop = start + 1
    while stop < len(conversation) - keep and conversation[stop].get("role") not in ("user", "system"):
        stop += 1
    return conversation[:start] + conversation[stop:]
