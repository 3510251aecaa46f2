"""Bytes really held: flat where tokens are evicted, as the formula says, and given back when they should be.

The prefill is bounded too: generate reads prompts that are longer than what the cache will hold in chunks.
"""

from __future__ import annotations

import gc
import types
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import hf_ctxopt
from tests.families import SLIDING, VOCAB, build
from tests.feeding import feed, pad_left, routed
from tests.integration.test_patch import image_model

TEXT = torch.randint(2, VOCAB, (66_000,), generator=torch.Generator().manual_seed(4))
NEWEST = tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (5, 23)


def tiny(**changes: Any) -> nn.Module:
    """One layer that reads 64 k tokens in a second."""
    shape: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512, "eos_token_id": None,
        "pad_token_id": 0,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**shape, **changes})).eval()


def page_bytes(model: nn.Module, page_size: int, layers: int | None = None) -> int:
    """Bytes of one page of K and V over the layers, in float32."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = config.num_hidden_layers if layers is None else layers
    return layers * 2 * page_size * config.num_key_value_heads * head_dim * 4


def pages(sinks: int, window: int, page_size: int) -> int:
    """Pages of one row: those of the sinks, and those that a window may touch at any alignment."""
    return -(-sinks // page_size) + -(-(window - 1) // page_size) + 1


def tensors(root: Any) -> Iterator[torch.Tensor]:
    """Every tensor reachable from an object, except those of modules: found by the garbage collector's own links."""
    known, waiting = set(), [root]
    while waiting:
        thing = waiting.pop()
        if id(thing) in known or isinstance(thing, (type, types.ModuleType, nn.Module)):
            continue
        known.add(id(thing))
        if isinstance(thing, torch.Tensor):
            yield thing
        elif isinstance(thing, types.FunctionType):
            waiting.extend(thing.__closure__ or ())
        else:
            waiting.extend(gc.get_referents(thing))


def walked(cache: Any) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(cache)}
    return sum(storages.values())


# ---- flat


@pytest.mark.parametrize(("sinks", "window", "page_size"), [(4, 508, 32), (5, 99, 8), (0, 128, 16)])
@pytest.mark.parametrize("route", ["dense", "fused"])
def test_bytes_are_flat_at_1k_4k_and_64k_tokens(route: str, sinks: int, window: int, page_size: int) -> None:
    """However the tokens came: in chunks smaller and larger than the window, and one by one around each goal."""
    model = tiny()
    options = {"sinks": sinks, "window": window, "page_size": page_size}
    expected = pages(sinks, window, page_size) * page_bytes(model, page_size)
    seen = 0
    with routed(route, model, "ctx_sink", **options):
        cache = hf_ctxopt.make_cache(model, "ctx_sink", **options)
        for goal, chunk in ((1_000, window // 2), (4_000, 2_500), (64_000, 3 * window // 2)):
            feed(model, TEXT[None, seen:goal], cache, chunk)
            assert cache.nbytes == expected, goal
            for at in range(goal, goal + page_size + 2):
                feed(model, TEXT[None, at : at + 1], cache, 1)
                assert cache.nbytes == expected, at
            seen = goal + page_size + 2
        assert walked(cache) == expected
    assert cache.stats()["tokens_held"] == sinks + window
    assert cache.stats()["bytes_held"] == expected
    cache.check_integrity()


@pytest.mark.parametrize("route", ["dense", "fused"])
def test_rows_of_unequal_length(route: str) -> None:
    model, options = tiny(), {"sinks": 4, "window": 60, "page_size": 8}
    ids, mask = pad_left([TEXT[:2_000], TEXT[:1_377], TEXT[:1_990]])
    expected = 3 * pages(4, 60, 8) * page_bytes(model, 8)
    with routed(route, model, "ctx_sink", **options):
        cache = hf_ctxopt.make_cache(model, "ctx_sink", attention_mask=mask, **options)
        feed(model, ids, cache, 200, mask=mask)
        assert cache.nbytes == expected
        for _ in range(20):
            ids, mask = torch.cat([ids, ids[:, -1:]], 1), torch.cat([mask, mask[:, -1:]], 1)
            with torch.no_grad():
                places = (mask.cumsum(-1) - 1)[:, -1:]
                model(ids[:, -1:], attention_mask=mask, position_ids=places, past_key_values=cache)
            assert cache.nbytes == walked(cache) == expected
    assert cache.stats()["tokens_held"] == 3 * 64


def test_generate_holds_no_more_than_a_manual_loop() -> None:
    model, options = tiny(), {"sinks": 4, "window": 60, "page_size": 8}
    caches = []
    for prompt, new in ((70, 5), (70, 300), (2_000, 20)):
        out = model.generate(
            TEXT[None, :prompt], max_new_tokens=new, cache_implementation="ctx_sink", cache_config=options,
            return_dict_in_generate=True,
        )  # fmt: skip
        caches.append(out.past_key_values)
    assert {cache.nbytes for cache in caches} == {pages(4, 60, 8) * page_bytes(model, 8)}


def test_a_text_of_known_length_takes_no_more_pages_than_it_fills() -> None:
    model = tiny()
    for name in ("ctx_paged", "ctx_sink"):
        out = model.generate(
            TEXT[None, :70], max_new_tokens=30, cache_implementation=name, cache_config={"page_size": 8},
            return_dict_in_generate=True,
        )  # fmt: skip
        assert out.past_key_values.nbytes == -(-100 // 8) * page_bytes(model, 8)


# ---- freed


@pytest.mark.parametrize("route", ["dense", "fused"])
def test_sink_frees_what_paged_keeps(route: str) -> None:
    model = tiny()
    held = {}
    for name, options in (("ctx_paged", {}), ("ctx_sink", {"window": 100})):
        with routed(route, model, name, **options):
            cache = hf_ctxopt.make_cache(model, name, **options)
            feed(model, TEXT[None, :5_000], cache, 500)
            held[name] = walked(cache)
    assert held["ctx_paged"] >= -(-5_000 // 32) * page_bytes(model, 32)
    assert held["ctx_paged"] <= 1.2 * -(-5_000 // 32) * page_bytes(model, 32)
    assert held["ctx_sink"] < 0.05 * held["ctx_paged"]


@pytest.mark.parametrize("family", ["gemma3", "mistral", "gpt_oss"])
@pytest.mark.parametrize("name", ["ctx_paged", "ctx_sink"])
@pytest.mark.parametrize("route", ["dense", "fused"])
def test_sliding_layers_drop_their_own_pages(route: str, name: str, family: str) -> None:
    model = build(family)
    sliding = [i for i, kind in enumerate(_kinds(model)) if kind == "sliding_attention"]
    options: dict[str, Any] = {"page_size": 4} | ({"window": 40} if name == "ctx_sink" else {})
    with routed(route, model, name, **options):
        cache = hf_ctxopt.make_cache(model, name, **options)
        feed(model, TEXT[None, :150], cache, 13)
        feed(model, TEXT[None, 150:160], cache, 1)
    groups = {tuple(group["layers"]): group for group in cache.stats()["groups"]}
    own = groups[tuple(sliding)]
    assert own["tokens_held"] == SLIDING
    assert own["bytes_held"] == pages(0, SLIDING, 4) * page_bytes(model, 4, len(sliding))
    full = [group for layers, group in groups.items() if layers != tuple(sliding)]
    assert [group["tokens_held"] for group in full] == [160 if name == "ctx_paged" else 44] * len(full)
    assert len(full) == (family != "mistral")
    assert cache.nbytes == walked(cache) == sum(group["bytes_held"] for group in groups.values())


def _kinds(model: nn.Module) -> list[str]:
    return getattr(model.config, "layer_types", None) or ["sliding_attention"] * model.config.num_hidden_layers


@pytest.mark.parametrize("name", ["ctx_paged", "ctx_sink"])
def test_memory_goes_with_the_cache_without_waiting_for_the_garbage_collector(name: str) -> None:
    """As with DynamicCache: on a GPU the next call needs that memory now."""
    model = tiny()
    gc.collect()
    gc.disable()
    try:
        for drop in ("del", "reset"):
            cache = hf_ctxopt.make_cache(model, name)
            feed(model, TEXT[None, :100], cache, 50)
            held = [weakref.ref(t) for t in tensors(cache)]
            assert held
            if drop == "reset":
                cache.reset()
                assert cache.nbytes == 0
            else:
                del cache
            assert all(ref() is None for ref in held)
    finally:
        gc.enable()


def test_a_model_goes_without_waiting_for_the_garbage_collector() -> None:
    model = hf_ctxopt.patch_model(tiny(), "ctx_sink", window=16)
    model.generate(TEXT[None, :40], max_new_tokens=2)
    cache = hf_ctxopt.make_cache(model, "ctx_sink", window=16)
    feed(model, TEXT[None, :40], cache, 5)
    gc.collect()
    gc.disable()
    try:
        held = weakref.ref(model.model.layers[0])
        del model
        assert held() is None
    finally:
        gc.enable()
    assert cache.get_seq_length() == 40


# ---- prefill


def _lengths(model: nn.Module, prompt: Any, **options: Any) -> list[int]:
    """Number of tokens of each forward pass of a call of generate."""
    found: list[int] = []

    def count(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        found.append(given.shape[1])

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        model.generate(**({"max_new_tokens": 3, "do_sample": False} | prompt | options))
    finally:
        hook.remove()
    return found


SMALL = {"window": 16, "sinks": 4, "page_size": 4}


@pytest.mark.parametrize(
    ("tokens", "options", "expected"),
    [
        (100, {}, [16] * 6 + [4, 1, 1]),
        (21, {}, [16, 5, 1, 1]),
        (20, {}, [20, 1, 1]),
        (100, {"prefill_chunk_size": 30}, [30, 30, 30, 10, 1, 1]),
        (100, {"cache_implementation": "ctx_paged", "cache_config": None}, [100, 1, 1]),
        (100, {"cache_config": {"window": 500}}, [100, 1, 1]),
        (100, {"num_beams": 2}, [16] * 6 + [4, 1, 1]),
    ],
    ids=str,
)
def test_long_prompts_are_read_in_chunks(tokens: int, options: dict[str, Any], expected: list[int]) -> None:
    model = tiny()
    named = {"cache_implementation": "ctx_sink", "cache_config": SMALL} | options
    ones = torch.ones(1, tokens, dtype=torch.long)
    for mask in ({}, {"attention_mask": ones}):
        assert _lengths(model, {"input_ids": TEXT[None, :tokens], **mask}, **named) == expected
    if not options:
        with hf_ctxopt.patched(model, "ctx_sink", **SMALL):
            assert _lengths(model, {"input_ids": TEXT[None, :tokens]}) == expected


def test_long_padded_prompts_are_read_in_chunks() -> None:
    ids, mask = pad_left([TEXT[:60], TEXT[:40]])
    lengths = _lengths(tiny(), {"input_ids": ids, "attention_mask": mask}, cache_implementation="ctx_sink",
                       cache_config=SMALL)  # fmt: skip
    assert lengths == [16, 16, 16, 12, 1, 1]


def test_a_long_second_turn_is_read_in_chunks() -> None:
    """transformers before 5.23 would feed the first turn again: there the second one is read at once, and right."""
    model = tiny()
    with hf_ctxopt.patched(model, "ctx_sink", **SMALL):
        first = model.generate(TEXT[None, :30], max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, TEXT[None, 100:150]], 1)
        cache = first.past_key_values
        lengths = _lengths(model, {"input_ids": ids, "past_key_values": cache})
    assert lengths == ([16, 16, 16, 3, 1, 1] if NEWEST else [51, 1, 1])
    assert cache.get_seq_length() == 30 + 4 + 50 + 2


def test_prompts_given_as_embeddings() -> None:
    """transformers splits `input_ids` into chunks, which are empty here."""
    model = tiny()
    states = model.model.embed_tokens(TEXT[None, :60]).detach()
    named = {"cache_implementation": "ctx_sink", "cache_config": SMALL, "max_new_tokens": 6, "do_sample": False}
    with hf_ctxopt.patched(model, "ctx_sink", **SMALL):
        expected = model.generate(TEXT[None, :60], **named)[:, 60:]
        assert torch.equal(model.generate(inputs_embeds=states, **named), expected)


@pytest.mark.parametrize("name", ["dynamic", "ctx_paged", "ctx_sink"])
def test_images_in_a_long_prompt_are_not_lost(name: str) -> None:
    """Chunked prefill drops images (5.17), or refuses most models' (5.23): it must not be switched on there."""
    model = image_model()
    ids = torch.cat([TEXT[None, :60].clamp(min=10), torch.tensor([[6, 5, 5, 5, 5, 7, 9, 10]])], 1)
    named = {"cache_implementation": name, "cache_config": SMALL if name == "ctx_sink" else None}
    logits = []
    for image in torch.randn(2, 1, 3, 16, 16):
        out = model.generate(
            ids, pixel_values=image, token_type_ids=(ids == 5).long(), max_new_tokens=1, output_logits=True,
            return_dict_in_generate=True, **named,
        )  # fmt: skip
        logits.append(out.logits[0])
    assert float((logits[0] - logits[1]).abs().max()) > 1e-3


class Live(TorchDispatchMode):
    """Largest number of bytes alive at once in storages that operators made while the mode was on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.peak, self._alive = 0, {}
        self._old = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def alive(self) -> int:
        """Bytes alive now."""
        self._alive = {ref: size for ref, size in self._alive.items() if not ref.expired()}
        return sum(self._alive.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._old:
                    self._alive[StorageWeakRef(storage)] = storage.nbytes()
        self.peak = max(self.peak, self.alive())
        return out


@pytest.mark.parametrize("route", ["dense", "fused", "eager"])
def test_the_peak_of_a_long_prefill(route: str) -> None:
    """A prompt of 16 k tokens takes hardly more than one of 1 k: what grows is only the prompt itself."""
    model = tiny(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2)
    if route == "eager":
        model.set_attn_implementation("eager")
    options = {"sinks": 4, "window": 512}
    peaks = {}
    for tokens in (1_024, 16_384):
        with routed("fused" if route == "fused" else "dense", model, "ctx_sink", **options), Live(model) as live:
            model.generate(
                TEXT[None, :tokens], max_new_tokens=1, cache_implementation="ctx_sink", cache_config=options
            )  # fmt: skip
        peaks[tokens] = live.peak
    assert peaks[16_384] < 1.25 * peaks[1_024], peaks
    with Live(model) as live:
        model.generate(TEXT[None, :4_096], max_new_tokens=1)
    assert live.peak > 1.25 * peaks[16_384], "the measure sees nothing"
