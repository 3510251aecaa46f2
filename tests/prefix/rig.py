"""Agents that share a beginning, and what they should say: `generate` without a store."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

import hf_ctxopt
from hf_ctxopt.caches.store import PrefixStore
from hf_ctxopt.integration.compat import cache_in

STORE = "test"


def draw(count: int, seed: int) -> list[int]:
    """Random tokens of the tiny families' vocabulary."""
    rng = random.Random(seed)
    return [rng.randrange(3, 90) for _ in range(count)]


def left_padded(texts: list[list[int]]) -> dict[str, Tensor]:
    """A batch, right-aligned."""
    width = max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    return {"input_ids": ids, "attention_mask": mask}


def say(model: Any, inputs: dict[str, Tensor] | list[int], config: dict[str, Any] | None = None, **call: Any) -> Any:
    """Greedy output with logits; `config` chooses ctx_prefix, on the store `STORE` unless it names another."""
    if isinstance(inputs, list):
        inputs = {"input_ids": torch.tensor([inputs])}
    ours: dict[str, Any] = {}
    if config is not None:
        ours = {"cache_implementation": "ctx_prefix", "cache_config": {"page_size": 8, "store": STORE, **config}}
    call = {"max_new_tokens": 8, "do_sample": False, **call}
    return model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **ours, **call)


def same(got: Any, want: Any) -> None:
    """Tokens are equal, and the distributions of every step to 1e-6 nats."""
    assert torch.equal(got.sequences, want.sequences)
    one, other = torch.stack(want.logits).log_softmax(-1), torch.stack(got.logits).log_softmax(-1)
    kl = (one.exp() * (one - other)).sum(-1)
    assert float(kl.abs().max()) < 1e-6


def reused(out: Any) -> int:
    """Prompt tokens of an output's cache that were not computed."""
    return int(cache_in(out).stats()["prefix"]["reused_tokens"])


def store() -> PrefixStore:
    """The store of the tests."""
    return hf_ctxopt.stores()[STORE]
