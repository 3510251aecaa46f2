"""What `run`, `chat`, `agents` and `bench` share while a model generates: text out, bars, Ctrl-C, figures."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria, TextStreamer

import hf_ctxopt
from hf_ctxopt.cli import console
from hf_ctxopt.cli.options import DYNAMIC, CacheChoice

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a cache holds.

    Attributes:
        tokens_seen: tokens fed so far.
        tokens_held: tokens that attention can still reach.
        bytes_held: bytes of the storages that are really allocated.
    """

    tokens_seen: int
    tokens_held: int
    bytes_held: int


def figures(cache: Any) -> Figures:
    """Returns the figures of one of our caches, or of one of transformers' own."""
    if hasattr(cache, "stats"):
        stats = cache.stats()
        return Figures(**{name: int(stats[name]) for name in ("tokens_seen", "tokens_held", "bytes_held")})
    storages: dict[int, int] = {}
    held = 0
    for layer in cache.layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if isinstance(tensor, torch.Tensor):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                held = max(held, tensor.shape[-2])
    return Figures(tokens_seen=int(cache.get_seq_length()), tokens_held=held, bytes_held=sum(storages.values()))


@contextmanager
def cache_scope(model: PreTrainedModel, choice: CacheChoice) -> Iterator[dict[str, Any]]:
    """Makes the model generate with the chosen cache inside the block.

    Yields:
        the arguments that the first call of `generate` needs; a later call passes the cache instead.
    """
    with _without_reminder() if choice.name == "ctx_sink" else nullcontext():
        yield from _arguments(model, choice)


def _arguments(model: PreTrainedModel, choice: CacheChoice) -> Iterator[dict[str, Any]]:
    if choice.fused:
        with hf_ctxopt.patched(model, cache=choice.name, **choice.options):
            yield {}
    elif choice.name == DYNAMIC:
        yield {"cache_implementation": DYNAMIC}
    else:
        config = {"cache_config": dict(choice.options)} if choice.options else {}
        yield {"cache_implementation": choice.name, **config}


@contextmanager
def _without_reminder() -> Iterator[None]:
    """Leaves out transformers' reminder of the trained length: no position of a window goes beyond it."""
    log = logging.getLogger("transformers.generation.stopping_criteria")

    def others(record: logging.LogRecord) -> bool:
        return "predefined maximum length" not in record.getMessage()

    log.addFilter(others)
    try:
        yield
    finally:
        log.removeFilter(others)


class Echo(TextStreamer):
    """Hands on text as it is generated, and remembers the tokens and when each came.

    Args:
        tokenizer: decodes the tokens.
        write: called with each piece of text that is complete.

    Attributes:
        token_ids: the generated tokens.
        times: `time.perf_counter()` at each of them, seconds.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.token_ids: list[int] = []
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt `(1, seq)` first, then the new tokens `(1,)` of each step."""
        if not self.next_tokens_are_prompt:
            self.token_ids.extend(value.flatten().tolist())
            self.times.append(time.perf_counter())
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by the streamer with text that later tokens cannot change any more."""
        self.write(text)

    @property
    def rate(self) -> float:
        """Tokens per second, counted from the first token on (so without reading the prompt); 0 before two tokens."""
        span = self.times[-1] - self.times[0] if len(self.times) > 1 else 0.0
        return (len(self.times) - 1) / span if span > 0 else 0.0


@contextmanager
def whole_lines(echo: Echo) -> Iterator[None]:
    """Ends the line of the text that comes inside the block, also where an error cuts it off."""
    try:
        yield
    finally:
        if echo.token_ids:
            echo.end()  # type: ignore[no-untyped-call]  # what the streamer holds back until its word is whole; nothing after a text that ended
            console.write("\n")


@contextmanager
def count_tokens(model: PreTrainedModel, advance: Callable[[int], None]) -> Iterator[None]:
    """Calls `advance` with the number of tokens of every forward pass of the model inside the block."""

    def hook(_module: Any, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        ids = kwargs.get("input_ids")
        if ids is not None:
            advance(int(ids.shape[-1]))

    handle = model.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class Interrupt(StoppingCriteria):
    """Ends generation after the current token on Ctrl-C, so that the cache stays whole and can be used again."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        """Returns one flag per row of `input_ids` `(batch, seq)`: whether to stop."""
        return torch.full((input_ids.shape[0],), self.asked, device=input_ids.device, dtype=torch.bool)  # type: ignore[return-value]

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catches Ctrl-C inside the block; elsewhere than in the main thread signals cannot be caught."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(_number: int, _frame: Any) -> None:
            if self.asked:  # a second Ctrl-C does not wait for the token
                raise KeyboardInterrupt
            self.asked = True

        before = signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


class FirstToken(StoppingCriteria):
    """Among the stopping criteria, which are asked after every token: takes the time to the first one, never stops."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begins to count."""
        self._begin, self.seconds = time.perf_counter(), 0.0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        """Returns one flag per row of `input_ids` `(batch, seq)`: go on."""
        self.seconds = self.seconds or time.perf_counter() - self._begin
        return torch.zeros(input_ids.shape[0], device=input_ids.device, dtype=torch.bool)  # type: ignore[return-value]
