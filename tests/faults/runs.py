"""Greedy runs that may be stopped anywhere and are then continued on the same cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

import hf_ctxopt
from hf_ctxopt.caches.base import PageCache
from tests.families import VOCAB, model_for
from tests.feeding import routed


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A model, a route, a cache and a prompt.

    Attributes:
        name: test id.
        family: key of `tests.families.FAMILIES`.
        route: "dense" or "fused".
        cache: name of the cache.
        options: its options.
        prompt: tokens of the prompt.
        new: tokens to generate.
        first_call: options of a first call of `generate` that leaves the last 8 tokens to a second one.
    """

    name: str
    family: str = "llama"
    route: str = "fused"
    cache: str = "ctx_paged"
    options: dict[str, Any] = field(default_factory=dict)
    prompt: int = 10
    new: int = 14
    first_call: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> Any:
        """The process-wide model of the family."""
        return model_for(self.family, "faults")

    @property
    def ids(self) -> Tensor:
        """The prompt, `(1, prompt)`; it repeats itself, so that prompt lookup finds candidates."""
        some = torch.randint(2, VOCAB, (1, 7), generator=torch.Generator().manual_seed(5))
        return some.repeat(1, self.prompt // 7 + 1)[:, : self.prompt]

    def routed(self) -> AbstractContextManager[Any]:
        """Context in which the model takes the scene's route."""
        return routed(self.route, self.model, self.cache, **self.options)

    def make_cache(self) -> PageCache:
        """A fresh cache."""
        return hf_ctxopt.make_cache(self.model, self.cache, **self.options)

    def run(self, cache: PageCache, stream: Collector | None = None) -> Tensor:
        """The whole run from the prompt on, `(1, prompt + new)`."""
        ids = self.ids
        if self.first_call:
            ids = self.extend(cache, ids, self.new - 8, stream, **self.first_call)
        return self.extend(cache, ids, self.new, stream)

    def extend(self, cache: PageCache, ids: Tensor, new: int, stream: Collector | None = None, **more: Any) -> Tensor:
        """`ids` with as many tokens more as make `prompt + new`."""
        out: Tensor = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, do_sample=False, streamer=stream,
            max_new_tokens=self.prompt + new - ids.shape[1], **more,
        )  # fmt: skip
        return out

    def resume(self, cache: PageCache, ids: Tensor) -> Tensor:
        """Continues greedily after a failure (transformers' assisted decoding goes wrong on any cache with content).

        A pass that had gone through every layer is taken back first: nobody has seen the token it gave.
        """
        cache.settle()
        cache.check_integrity()
        if cache.get_seq_length() >= ids.shape[1]:
            cache.crop(ids.shape[1] - 1 - cache.get_seq_length())
        out = self.extend(cache, ids, self.new)
        cache.check_integrity()
        return out


class Collector(BaseStreamer):
    """Keeps every token it was given. A second call begins by giving the whole text so far again.

    Args:
        prompt: what there is before the first token.
        fail_at: raise `StreamBroken` when the `fail_at`-th call comes.
    """

    def __init__(self, prompt: Tensor, fail_at: int | None = None) -> None:
        self.prompt, self.fail_at, self.calls, self.tokens = prompt, fail_at, 0, list[int]()

    def put(self, value: Tensor) -> None:
        given = value.flatten().tolist()
        again = len(given) >= len(self.tokens) and given[: len(self.tokens)] == self.tokens
        self.tokens = given if again else self.tokens + given
        self.calls += 1
        if self.calls == self.fail_at:
            raise StreamBroken(f"call {self.calls}")

    def end(self) -> None:
        """Nothing to close."""

    @property
    def ids(self) -> Tensor:
        """The text so far, `(1, seq)`."""
        return torch.tensor([self.tokens]) if self.tokens else self.prompt


class StreamBroken(ConnectionError):
    """What the failing streamer raises, as a closed socket would."""


@contextmanager
def stopped_in(layer: nn.Module, call: int, error: BaseException) -> Iterator[None]:
    """The `call`-th forward of the layer's MLP raises `error`: its attention has run, later layers have not."""
    calls = [0]

    def hook(*_: object) -> None:
        calls[0] += 1
        if calls[0] == call:
            raise error

    handle = layer.mlp.register_forward_hook(hook)  # type: ignore[union-attr]
    try:
        yield
    finally:
        handle.remove()


LONG_SINK = {"sinks": 2, "window": 12, "page_size": 4}
SCENES = [
    Scene(name="paged_dense", route="dense", options={"page_size": 4}),
    Scene(name="paged_fused", options={"page_size": 2}),
    Scene(name="sink_dense", route="dense", cache="ctx_sink", options=LONG_SINK),
    Scene(name="sink_fused_long_prompt", cache="ctx_sink", options=LONG_SINK, prompt=40),
    Scene(name="sink_shift", cache="ctx_sink", options={**LONG_SINK, "n_discard": 0}, new=20),
    Scene(name="sink_lookup", cache="ctx_sink", options={**LONG_SINK, "page_size": 1},
          first_call={"prompt_lookup_num_tokens": 6}, new=24),
    Scene(name="paged_int8", options={"page_size": 2, "kv_bits": 8}),
    Scene(name="sink_int4_dense", route="dense", cache="ctx_sink", options={**LONG_SINK, "kv_bits": 4}, prompt=40),
    Scene(name="gemma3_paged", family="gemma3", options={"page_size": 4}),
    Scene(name="gemma3_sink_dense", family="gemma3", route="dense", cache="ctx_sink", options=LONG_SINK, prompt=7),
]  # fmt: skip
BY_NAME = {scene.name: scene for scene in SCENES}
