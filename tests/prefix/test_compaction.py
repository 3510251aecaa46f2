"""Memory of a store really comes back: pages are moved together under whoever reads them."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from hf_ctxopt import make_cache
from hf_ctxopt.caches import slot
from hf_ctxopt.integration.compat import cache_in, generate_argument
from hf_ctxopt.pages.storage import LayerStorage
from hf_ctxopt.planner.actions import drop_prefixes
from tests.families import build
from tests.faults.test_allocation import ERRORS
from tests.prefix.rig import STORE, draw, reused, same, say, store


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama")


TEXTS = [draw(60, seed) for seed in range(4)]


def go_on(model: Any, out: Any) -> Any:
    """More of an answer, from the cache that it came with."""
    ids = out.sequences
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, return_dict_in_generate=True,
        output_logits=True, **{generate_argument(): cache_in(out)},
    )  # fmt: skip


@pytest.mark.parametrize("bits", [16, 8])
def test_dropped_prefixes_give_memory_back_under_a_living_cache(model: Any, bits: int) -> None:
    config = {"kv_bits": bits}
    want = [say(model, text, {**config, "store": None}) for text in TEXTS]
    goes_on = go_on(model, want[3])
    kept = [say(model, text, config) for text in TEXTS][3]  # its pages lie behind the others
    gc.collect()
    action, held = drop_prefixes(lambda: [store()], share=2), [store().nbytes]
    while freed := action.act():
        held.append(store().nbytes)
        assert held[-2] - held[-1] == freed
        store().check_integrity()
    assert store().nbytes == store().stats()["bytes_used"] < held[0] / 2
    assert 0 < store().stats()["pages"] == store().stats()["locked_pages"]
    same(go_on(model, kept), goes_on)
    cache_in(kept).check_integrity()
    again = say(model, TEXTS[3], config)
    assert reused(again) > 48
    assert torch.equal(again.sequences, want[3].sequences)
    if bits == 16:  # what is reused is read as it is stored
        same(again, want[3])


def test_nothing_moves_while_a_step_is_under_way(model: Any) -> None:
    say(model, TEXTS[0], {})
    done: list[int] = []
    layer = model.get_decoder().layers[0]
    hook = layer.register_forward_hook(lambda *_: done.append(drop_prefixes(lambda: [store()], share=1).act()))
    try:
        out = say(model, TEXTS[1], {})
    finally:
        hook.remove()
    assert set(done) == {0}
    assert store().stats()["pages"] > 8  # a drop that frees nothing would only cost what is computed again
    same(out, say(model, TEXTS[1]))


def test_no_memory_to_cut_storages_off(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in TEXTS[:2]:
        say(model, text, {})
    gc.collect()
    action, before = drop_prefixes(lambda: [store()], share=2), store().nbytes

    def fails(storage: LayerStorage, *_: Any) -> None:
        raise ERRORS["cpu"]()

    with monkeypatch.context() as patch:
        patch.setattr(LayerStorage, "resize", fails)
        assert action.act() == 0
    store().check_integrity()
    assert store().nbytes == before
    same(say(model, TEXTS[2], {}), say(model, TEXTS[2]))
    gc.collect()
    assert action.act() > 0
    same(say(model, TEXTS[2], {}), say(model, TEXTS[2]))


@pytest.mark.parametrize("kind", ["tokens", "bytes"])
def test_a_budget_that_falls_is_kept(model: Any, kind: str) -> None:
    for text in TEXTS:
        say(model, text, {})
    gc.collect()
    before = store().nbytes
    page = sum(arena.page_bytes for arena in store().arenas)
    least = {"tokens": 80, "bytes": f"{10 * page}B"}[kind]
    out = say(model, TEXTS[0], {"budget": least})
    same(out, say(model, TEXTS[0]))
    assert store().nbytes <= 10 * page < before / 2
    store().check_integrity()


def test_a_lease_does_not_keep_its_cache_alive(model: Any) -> None:
    out = say(model, TEXTS[0], {})
    cache = weakref.ref(cache_in(out))
    del out
    gc.collect()
    assert cache() is None
    assert store().movable


def test_a_budget_that_falls_while_a_prompt_is_looked_up() -> None:
    """The caller with the smaller budget evicts before it looks for its prefix, not between looking and taking."""
    sliding = build("gemma3")
    small = make_cache(sliding, "ctx_prefix", page_size=8, store=STORE, budget=120)
    text = draw(60, 1)
    say(sliding, text, {})  # without a budget
    for seed in range(10, 15):
        say(sliding, draw(60, seed), {"priorities": [[0, 60, 90]], "decode_priority": 90})
    gc.collect()
    ids = torch.tensor([text[:48] + draw(30, 5)])
    got = sliding.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, return_dict_in_generate=True,
        output_logits=True, **{generate_argument(): small},
    )  # fmt: skip
    same(got, say(sliding, ids[0].tolist()))
    store().check_integrity()


def test_a_host_without_memory_drops_pages(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"cpu_budget": "1MiB"}
    for text in TEXTS[:3]:
        say(model, text, config)
    gc.collect()

    def failing(*args: Any) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(slot, "_copy", failing)
    assert drop_prefixes(lambda: [store()]).act() > 0
    same(say(model, TEXTS[3], {**config, "budget": 80}), say(model, TEXTS[3]))
    assert store().counts["host_refusals"] > 0
    assert store().host_bytes == 0
    store().check_integrity()


def test_another_failure_of_the_host_goes_through(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in TEXTS[:2]:
        say(model, text, {"cpu_budget": "1MiB"})
    gc.collect()

    def failing(*args: Any) -> None:
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(slot, "_copy", failing)
    with pytest.raises(RuntimeError, match="device-side"):
        drop_prefixes(lambda: [store()]).act()
