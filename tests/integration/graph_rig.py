"""What the tests of decode graphs share: runs with and without graphs, on the stand-in of `tests/device.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import hf_ctxopt
from hf_ctxopt.integration.compat import cache_in
from tests.device import pretend_gpu
from tests.families import VOCAB

IDS = torch.randint(2, VOCAB, (2, 20), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(IDS)
MASK[0, :6] = 0
SINK = {"cache": "ctx_sink", "window": 12, "sinks": 3, "page_size": 8}
PAGED = {"cache": "ctx_paged", "page_size": 8}
GREEDY = {"attention_mask": MASK, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-in for a GPU."""
    with pretend_gpu(monkeypatch):
        yield


def both(model: nn.Module, options: dict[str, Any], **call: Any) -> tuple[Any, Any]:
    """`generate` with and without graphs."""
    outputs = []
    for graph in (False, True):
        with hf_ctxopt.patched(model, graph=graph, **options), torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            outputs.append(model.generate(IDS, **{**GREEDY, "max_new_tokens": 24, **call}))
    return outputs[0], outputs[1]


def graph_stats(output: Any) -> dict[str, int]:
    """The graph's counters of the cache that `generate` returned."""
    found: dict[str, int] = cache_in(output).stats()["graph"]
    return found
