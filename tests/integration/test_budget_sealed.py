"""A byte budget holds from the first sealed page on, whatever was fed before."""

from __future__ import annotations

import pytest
import torch

import hf_ctxopt
from hf_ctxopt.errors import CacheFullError
from tests.families import VOCAB, build
from tests.feeding import feed

TEXT = torch.randint(2, VOCAB, (1, 300), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("first", [6, 40])
@pytest.mark.parametrize("bits", [8, 2])
def test_a_short_turn_and_a_long_one(first: int, bits: int) -> None:
    model = build("llama")
    free = hf_ctxopt.make_cache(model, "ctx_paged", page_size=8, kv_bits=bits)
    feed(model, TEXT[:, :100], free, 100)
    limit = free.nbytes
    cache = hf_ctxopt.make_cache(model, "ctx_paged", page_size=8, kv_bits=bits, budget=f"{limit}B")
    feed(model, TEXT[:, :first], cache, first)
    storage = cache.groups[0].storages[0]
    assert storage.sealed_bytes == free.groups[0].storages[0].sealed_bytes > 0
    with pytest.raises(CacheFullError):
        feed(model, TEXT[:, first:], cache, 300)
    feed(model, TEXT[:, first : first + 30], cache, 30)
    assert cache.nbytes <= limit
    cache.check_integrity()
