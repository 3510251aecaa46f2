"""`patch_model` and its undo, and what must go on working around a patched model.

Copies, files, threads, pipelines, adapters and offloading. The hook of `ctx_sink` is in `test_rope.py`.
"""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload, dispatch_model
from torch import nn
from transformers import pipeline
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

import hf_ctxopt
from tests.cli.tiny import tiny_model, tiny_tokenizer
from tests.families import VOCAB, build
from tests.feeding import feed, routed

IDS = torch.randint(2, VOCAB, (2, 20), generator=torch.Generator().manual_seed(11))
LONG = torch.randint(2, VOCAB, (1, 90), generator=torch.Generator().manual_seed(12))
SINK = {"window": 16, "sinks": 2, "page_size": 4}
NEW = 8


def image_model() -> PreTrainedModel:
    """A text decoder with a vision tower: several configs, of which attention is switched in each."""
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config={**shape, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": VOCAB, "num_hidden_layers": 2},
        vision_config={**shape, "image_size": 16, "patch_size": 8},
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
        eos_token_id=None,
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # zeros in a fresh model
    return model


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that patching may touch, compared by value or by identity."""
    parts = dict(model.named_modules())
    configs = {name: part.config for name, part in parts.items() if isinstance(part, PreTrainedModel)}
    inner = {f"{name}.{key}": getattr(config, key) for name, config in configs.items() for key in config.sub_configs}
    return {
        "attributes": {name: sorted(vars(part)) for name, part in parts.items()},
        "hooks": {name: list(part._forward_pre_hooks) + list(part._forward_hooks) for name, part in parts.items()},
        "forward": {name: vars(part).get("forward") for name, part in parts.items()},
        "attention": {name: vars(c)["_attn_implementation_internal"] for name, c in {**configs, **inner}.items()},
        "configs": {name: sorted(vars(config)) for name, config in configs.items()},
        "generation": None if model.generation_config is None else model.generation_config.to_dict(),
        "functions": dict(AttentionInterface._global_mapping),
        "masks": dict(AttentionMaskInterface._global_mapping),
        "names": transformers.generation.configuration_utils.ALL_CACHE_IMPLEMENTATIONS,
    }


def tokens(model: Any, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **options)


def cache_of(model: Any, ids: torch.Tensor = IDS, **options: Any) -> Any:
    out = model.generate(ids, max_new_tokens=2, do_sample=False, return_dict_in_generate=True, **options)
    return out.past_key_values


# ---- patch, unpatch, patch again


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_oss", "falcon", "bart", "image"])
def test_unpatching_leaves_no_trace(family: str) -> None:
    model = image_model() if family == "image" else build(family)
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if family == "bart" else {})
    with torch.no_grad():
        before, expected = state(model), model(**inputs).logits
        assert hf_ctxopt.patch_model(model, "ctx_sink", **SINK) is model
        assert type(cache_of(model)).__name__ in ("SinkCache", "EncoderDecoderCache")
        assert state(model) != before
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-4, rtol=0)
        assert hf_ctxopt.unpatch_model(model) is model
        assert state(model) == before
        assert torch.equal(model(**inputs).logits, expected)
        hf_ctxopt.unpatch_model(model)
        assert state(model) == before


@pytest.mark.parametrize("route", ["dense", "fused"])
@pytest.mark.parametrize("name", ["ctx_paged", "ctx_sink"])
def test_images_see_all_of_themselves(route: str, name: str) -> None:
    """Gemma 3 lets the tokens of an image attend to each other in both directions."""
    model = image_model()
    ids = torch.tensor([[2, 6, 5, 5, 5, 5, 7, 9, 10]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16), "token_type_ids": (ids == 5).long()}
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "output_logits": True}
    expected = model.generate(**inputs, **options, return_dict_in_generate=True)
    with routed(route, model, name):
        got = model.generate(**inputs, **options, cache_implementation=name, return_dict_in_generate=True)
    assert got.past_key_values.stats()["steps"][route] > 0
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), atol=1e-4, rtol=0)


def test_a_second_patch_replaces_the_first() -> None:
    model = build("llama")
    before = state(model)
    hf_ctxopt.patch_model(model, "ctx_sink", **SINK)
    hf_ctxopt.patch_model(model, "ctx_paged", page_size=8)
    cache = cache_of(model)
    assert cache.name == "ctx_paged"
    assert cache.options.page_size == 8
    hf_ctxopt.unpatch_model(model)
    assert state(model) == before


@pytest.mark.parametrize("stop", [None, KeyboardInterrupt, ValueError])
def test_patched_brings_the_earlier_patch_back(stop: type[BaseException] | None) -> None:
    model = hf_ctxopt.patch_model(build("llama"), "ctx_sink", **SINK)
    before = state(model)

    def inside() -> None:
        with hf_ctxopt.patched(model, "ctx_paged") as same, hf_ctxopt.patched(model, "ctx_sink", window=99):
            assert same is model
            assert cache_of(model).options.window == 99
            if stop is not None:
                raise stop

    if stop is None:
        inside()
    else:
        with pytest.raises(stop):
            inside()
    assert state(model) == before
    assert cache_of(model).options.window == SINK["window"]
    hf_ctxopt.unpatch_model(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("bad", [{"cache": "ctx_nothing"}, {"windw": 3}, {"cache": "ctx_sink", "window": 0}])
def test_a_refused_patch_changes_nothing(bad: dict[str, Any]) -> None:
    model = hf_ctxopt.patch_model(build("llama"), "ctx_sink", **SINK)
    before = state(model)
    for attempt in (hf_ctxopt.patch_model, lambda m, **options: hf_ctxopt.patched(m, **options).__enter__()):
        with pytest.raises(hf_ctxopt.ConfigError):
            attempt(model, **bad)
        assert state(model) == before
    assert cache_of(model).options.window == SINK["window"]


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), object(), None])
def test_only_models_that_generate_are_patched(thing: Any) -> None:
    for call in (hf_ctxopt.patch_model, lambda it: hf_ctxopt.make_cache(it, "ctx_paged")):
        with pytest.raises(hf_ctxopt.UnsupportedModelError):
            call(thing)


# ---- copies and files


def test_a_copy_of_a_patched_model_stands_alone() -> None:
    model = hf_ctxopt.patch_model(build("llama"), "ctx_sink", **SINK)
    expected, twin = tokens(model), copy.deepcopy(model)
    hf_ctxopt.unpatch_model(twin)
    assert twin.config._attn_implementation == "sdpa"
    assert cache_of(model).stats()["steps"]["fused"] > 0
    again = copy.deepcopy(model)
    hf_ctxopt.unpatch_model(model)
    assert cache_of(again).stats()["steps"]["fused"] > 0
    assert torch.equal(tokens(again), expected)
    assert type(cache_of(twin)).__name__ == type(cache_of(model)).__name__ == "DynamicCache"


def test_nothing_of_ours_is_saved(tmp_path: Path) -> None:
    model = build("llama")
    expected = tokens(model)
    hf_ctxopt.patch_model(model, "ctx_sink", **SINK)
    tokens(model)
    model.save_pretrained(tmp_path)
    texts = [file.read_text() for file in tmp_path.glob("*.json")]
    assert texts
    assert not any("ctx" in text.replace("max_ctx", "") for text in texts)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(cache_of(loaded)).__name__ == "DynamicCache"
    assert torch.equal(tokens(loaded), expected)


def test_loading_straight_onto_the_fused_route(tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="ctxopt")
    before = state(loaded)
    assert torch.equal(tokens(loaded), tokens(model))
    cache = cache_of(loaded, cache_implementation="ctx_paged")
    assert cache.stats()["steps"] == {"fused": 2, "dense": 0}
    assert cache.stats()["fallbacks"] == {}
    hf_ctxopt.unpatch_model(hf_ctxopt.patch_model(loaded))
    assert state(loaded) == before


# ---- several models, several threads


def test_two_models_with_different_caches_in_turns() -> None:
    first, second = build("llama"), build("qwen2")
    with hf_ctxopt.patched(second, "ctx_sink", **SINK):
        expected = [tokens(first), tokens(second, LONG)]
    hf_ctxopt.patch_model(first, "ctx_paged", page_size=4)
    hf_ctxopt.patch_model(second, "ctx_sink", **SINK)
    for _ in range(2):
        assert torch.equal(tokens(first), expected[0])
        assert torch.equal(tokens(second, LONG), expected[1])
    caches = [hf_ctxopt.make_cache(model, "ctx_sink", **SINK) for model in (first, second)]
    alone = [feed(m, LONG, hf_ctxopt.make_cache(m, "ctx_sink", **SINK), 7) for m in (first, second)]
    steps: list[list[torch.Tensor]] = [[], []]
    for at in range(0, LONG.shape[1], 7):
        for model, cache, out in zip((first, second), caches, steps, strict=True):
            out.append(feed(model, LONG[:, at : at + 7], cache, 7))
    for out, logits in zip(steps, alone, strict=True):
        torch.testing.assert_close(torch.cat(out, 1), logits, atol=1e-5, rtol=0)


def in_threads(jobs: list[Callable[[], None]]) -> None:
    """Run all at once; the first failure is raised here."""
    failures: list[BaseException] = []
    start = threading.Barrier(len(jobs))

    def work(job: Callable[[], None]) -> None:
        try:
            start.wait()
            job()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("patch", [False, True], ids=["dense", "fused"])
def test_threads(count: int, patch: bool) -> None:
    """Four threads generate with every kind of cache, on one model or on two."""
    models = [build("llama", max_position_embeddings=64 + i) for i in range(count)]
    ways: list[dict[str, Any]] = [
        {"cache_implementation": "ctx_sink", "cache_config": SINK},
        {"cache_implementation": "ctx_paged"},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "ctx_sink", "cache_config": {**SINK, "window": 24}},
    ]
    for model in models if patch else []:
        hf_ctxopt.patch_model(model)
    expected = [tokens(models[0], LONG, **way) for way in ways]

    def job(number: int) -> None:
        for turn in range(5):
            way = (number + turn) % len(ways)
            assert torch.equal(tokens(models[number % count], LONG, **ways[way]), expected[way])

    in_threads([lambda number=number: job(number) for number in range(4)])
    gc.collect()
    assert not any(part._forward_pre_hooks for model in models for part in model.modules())


@pytest.mark.parametrize("patch", [False, True], ids=["dense", "fused"])
def test_a_cache_may_outlive_its_model(patch: bool) -> None:
    """Model and cache copied together, or a model loaded anew: the weights are the same, the objects are not."""
    model = hf_ctxopt.patch_model(build("llama"), "ctx_sink", **SINK) if patch else build("llama")
    cache = hf_ctxopt.make_cache(model, "ctx_sink", **SINK)
    feed(model, LONG[:, :50], cache, 1)
    pair = copy.deepcopy((model, cache))
    expected = feed(model, LONG[:, 50:], cache, 1)
    del model, cache
    gc.collect()
    assert torch.equal(feed(pair[0], LONG[:, 50:], pair[1], 1), expected)


@pytest.mark.parametrize("name", ["ctx_paged", "ctx_sink"])
@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
def test_a_cache_goes_on_outside_inference_mode(name: str, first: Any) -> None:
    """As DynamicCache does: one turn under `torch.inference_mode()`, the next one inside plain generate."""
    model = build("llama")
    options = SINK if name == "ctx_sink" else {"page_size": 4}
    expected = feed(model, LONG, hf_ctxopt.make_cache(model, name, **options), 1)
    cache = hf_ctxopt.make_cache(model, name, **options)
    with first():
        feed(model, LONG[:, :30], cache, 1)
    with torch.no_grad() if first is torch.inference_mode else torch.inference_mode():
        logits = feed(model, LONG[:, 30:], cache, 1)
    assert torch.equal(logits, expected[:, 30:])


# ---- pipelines, adapters, offloading


def test_text_generation_pipeline() -> None:
    make = pipeline("text-generation", model=tiny_model(), tokenizer=tiny_tokenizer())
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "return_full_text": False}
    texts = ["an old story", "a much longer story about the sea"]
    expected = make(texts, **options, batch_size=2)
    for name in ("ctx_paged", "ctx_sink"):
        assert make(texts, **options, batch_size=2, cache_implementation=name) == expected
        with hf_ctxopt.patched(make.model, name):
            assert make(texts, **options, batch_size=2) == expected
    short = make(texts[1], **options, cache_implementation="ctx_sink", cache_config={**SINK, "window": 4})
    with hf_ctxopt.patched(make.model, "ctx_sink", **{**SINK, "window": 4}):
        assert make(texts[1], **options) == short


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_models(family: str) -> None:
    peft = pytest.importorskip("peft")
    layers = ["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(build(family), config).eval()
    expected = model.generate(input_ids=IDS, max_new_tokens=NEW)
    before = state(model)
    for name in ("ctx_paged", "ctx_sink"):
        assert torch.equal(model.generate(input_ids=IDS, max_new_tokens=NEW, cache_implementation=name), expected)
        assert hf_ctxopt.patch_model(model, name) is model
        assert torch.equal(model.generate(input_ids=IDS, max_new_tokens=NEW), expected)
        cache = hf_ctxopt.make_cache(model, name)
        feed(model, IDS, cache, 5)
        assert cache.stats()["steps"]["fused"] > 0
        del cache
        hf_ctxopt.unpatch_model(model)
    assert state(model) == before


@pytest.mark.parametrize("how", ["cpu_offload", "dispatch_model"])
@pytest.mark.parametrize("name", ["ctx_paged", "ctx_sink"])
def test_accelerate_offloading(how: str, name: str) -> None:
    """Weights live on the meta device between forward passes, and every layer has a hook that moves its arguments."""
    config: dict[str, Any] = SINK if name == "ctx_sink" else {"page_size": 4}
    named: dict[str, Any] = {"cache_implementation": name, "cache_config": config}
    dense = tokens(build("llama"), LONG, **named)
    with hf_ctxopt.patched(build("llama"), name, **config) as stays:
        fused = tokens(stays, LONG)
    model = build("llama")  # one that nobody has asked about its positions yet
    if how == "cpu_offload":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        places = {"lm_head": "cpu", "model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
        places |= {f"model.layers.{i}": "cpu" for i in range(model.config.num_hidden_layers)}
        dispatch_model(model, places, main_device="cpu", force_hooks=True)
    assert torch.equal(tokens(model, LONG, **named), dense)
    with hf_ctxopt.patched(model, name, **config):
        assert torch.equal(tokens(model, LONG), fused)
        assert cache_of(model).stats()["steps"]["fused"] > 0
