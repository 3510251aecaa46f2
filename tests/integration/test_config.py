"""Bad options are refused by name, value and range, before any forward pass and before any allocation.

Good ones survive every way in which transformers stores a generation config.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache, GenerationConfig

import hf_ctxopt
from hf_ctxopt import ConfigError
from hf_ctxopt.pages.group import LayerGroup
from hf_ctxopt.pages.storage import LayerStorage
from tests.families import VOCAB, build

IDS = torch.randint(2, VOCAB, (1, 24), generator=torch.Generator().manual_seed(2))

Call = Callable[[nn.Module, str, Any], Any]
ENTRANCES: dict[str, Call] = {
    "generate": lambda model, name, options: model.generate(
        IDS, max_new_tokens=4, cache_implementation=name, cache_config=options
    ),
    "make_cache": lambda model, name, options: hf_ctxopt.make_cache(model, name, **options),
    "patch_model": lambda model, name, options: hf_ctxopt.patch_model(model, name, **options),
    "patched": lambda model, name, options: hf_ctxopt.patched(model, name, **options).__enter__(),
}
INTEGER = "an integer"
BAD: list[tuple[str, dict[str, Any], str, str]] = [
    # cache, options, field that is named, a piece of the range that is told
    ("ctx_sink", {"window": 0}, "window", ">= 1"),
    ("ctx_sink", {"window": -512}, "window", ">= 1"),
    ("ctx_sink", {"window": 16.0}, "window", INTEGER),
    ("ctx_sink", {"window": "512"}, "window", INTEGER),
    ("ctx_sink", {"window": None}, "window", INTEGER),
    ("ctx_sink", {"window": True}, "window", INTEGER),
    ("ctx_sink", {"window": [512]}, "window", INTEGER),
    ("ctx_sink", {"sinks": -1}, "sinks", ">= 0"),
    ("ctx_sink", {"sinks": 4.5}, "sinks", INTEGER),
    ("ctx_sink", {"sinks": "4"}, "sinks", INTEGER),
    ("ctx_sink", {"n_discard": -1}, "n_discard", ">= 0"),
    ("ctx_sink", {"n_discard": 0.5}, "n_discard", INTEGER),
    ("ctx_sink", {"n_discard": True}, "n_discard", INTEGER),
    ("ctx_sink", {"n_discard": 1, "window": 3}, "window", "at least 4"),
    ("ctx_sink", {"budget": 100}, "budget", "sinks + window"),
    ("ctx_paged", {"page_size": 0}, "page_size", "1 to 1024"),
    ("ctx_paged", {"page_size": 48}, "page_size", "power of two"),
    ("ctx_paged", {"page_size": 2048}, "page_size", "1 to 1024"),
    ("ctx_paged", {"page_size": -8}, "page_size", "1 to 1024"),
    ("ctx_paged", {"page_size": "32"}, "page_size", INTEGER),
    ("ctx_sink", {"page_size": 32.0}, "page_size", INTEGER),
    ("ctx_paged", {"kv_bits": 0}, "kv_bits", "16"),
    ("ctx_paged", {"kv_bits": 3}, "kv_bits", "16"),
    ("ctx_paged", {"kv_bits": 4.0}, "kv_bits", "16"),
    ("ctx_paged", {"kv_bits": True}, "kv_bits", "16"),
    ("ctx_sink", {"kv_bits": {"k": 8, "v": "4"}}, "kv_bits", '"v"'),
    ("ctx_paged", {"seal_sinks": 1}, "seal_sinks", "True or False"),
    ("ctx_paged", {"seal_sinks": None}, "seal_sinks", "True or False"),
    ("ctx_paged", {"rotate": 1}, "rotate", "True and False"),
    ("ctx_sink", {"rotate": {"k": True}}, "rotate", "True and False"),
    ("ctx_sink", {"rotate": {"k": True, "v": None}}, "rotate", "True and False"),
    ("ctx_paged", {"kv_bits": "16"}, "kv_bits", "16"),
    ("ctx_paged", {"kv_bits": None}, "kv_bits", "16"),
    ("ctx_paged", {"kv_bits": {"k": 16}}, "kv_bits", '"v"'),
    ("ctx_paged", {"kv_bits": {"k": 16, "v": 3}}, "kv_bits", '"v"'),
    ("ctx_paged", {"kv_bits": {"k": {"k": 16, "v": 16}, "v": 16}}, "kv_bits", '"v"'),
    ("ctx_paged", {"budget": 0}, "budget", "tokens >= 1"),
    ("ctx_paged", {"budget": -1}, "budget", "tokens >= 1"),
    ("ctx_paged", {"budget": 1.5}, "budget", "tokens >= 1"),
    ("ctx_paged", {"budget": True}, "budget", "tokens >= 1"),
    ("ctx_paged", {"budget": "a lot"}, "budget", "2GiB"),
    ("ctx_paged", {"budget": "-1GiB"}, "budget", "2GiB"),
    ("ctx_paged", {"budget": "0MB"}, "budget", "2GiB"),
    ("ctx_paged", {"budget": "512"}, "budget", "2GiB"),
    ("ctx_paged", {"budget": 31}, "budget", "one page"),
    ("ctx_paged", {"window": 512}, "window", "page_size"),
    ("ctx_sink", {"windows": 512}, "windows", "window"),
    ("ctx_sink", {"sink": 4}, "sink", "window"),
    ("ctx_sink", {"max_length": 10}, "max_length", "window"),
]


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[nn.Module]:
    """A model; the test fails if it runs, or if a cache takes memory or even plans a page."""
    model = build("llama")
    made: list[str] = []
    for part in model.modules():
        part.register_forward_pre_hook(lambda module, args: made.append(type(module).__name__))
    for kind in (LayerStorage, LayerGroup):
        monkeypatch.setattr(kind, "__init__", lambda self, *args, **kwargs: made.append(type(self).__name__))
    yield model
    assert made == []


def _refused(call: Call, model: nn.Module, name: str, options: Any, field: str, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call(model, name, options)
    error = caught.value
    assert field in error.field
    assert allowed in error.allowed
    assert all(text in str(error) for text in (error.field, repr(error.value), error.allowed))
    assert isinstance(error, hf_ctxopt.CtxoptError)
    assert isinstance(error, ValueError)
    if isinstance(options, dict) and not isinstance(options.get(field, {}), dict):
        assert error.value == options[field]


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize(("name", "options", "field", "allowed"), BAD, ids=lambda value: str(value)[:40])
def test_bad_options(
    quiet: nn.Module, entrance: str, name: str, options: dict[str, Any], field: str, allowed: str
) -> None:
    _refused(ENTRANCES[entrance], quiet, name, options, field, allowed)


@pytest.mark.parametrize("options", [["window"], "window=512", 512, (("window", 512),)])
@pytest.mark.parametrize("name", ["ctx_paged", "ctx_sink"])
def test_cache_config_must_be_a_dictionary(quiet: nn.Module, name: str, options: Any) -> None:
    _refused(ENTRANCES["generate"], quiet, name, options, "cache_config", "dictionary")


@pytest.mark.parametrize("options", [{3: 4}, {None: 1}, {("window",): 1}])
def test_names_of_options_are_strings(quiet: nn.Module, options: dict[Any, Any]) -> None:
    _refused(ENTRANCES["generate"], quiet, "ctx_sink", options, "cache_config", "window")


@pytest.mark.parametrize(
    ("entrance", "name"),
    [(entrance, name) for entrance in ("make_cache", "patch_model", "patched")
     for name in ("ctx_nothing", "dynamic", "", 3)] + [("make_cache", None), ("make_cache", "ctx_auto")],
)  # fmt: skip
def test_unknown_caches(quiet: nn.Module, entrance: str, name: Any) -> None:
    _refused(ENTRANCES[entrance], quiet, name, {}, "cache", "ctx_paged, ctx_sink")


@pytest.mark.parametrize("mask", [torch.ones(3), torch.ones(1, 1, 3, 3), [[1, 1]], "left"])
def test_masks_of_another_shape(quiet: nn.Module, mask: Any) -> None:
    with pytest.raises(ConfigError, match=r"attention_mask.*\(batch, seq\)"):
        hf_ctxopt.make_cache(quiet, "ctx_paged", attention_mask=mask)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 1, "sinks": 0},
        {"window": 4, "n_discard": 0},
        {"window": 8, "n_discard": 500},
        {"window": 10**12},
        {"page_size": 1},
        {"page_size": 1024},
        {"kv_bits": {"k": 16, "v": 16}, "budget": "1.5 GB"},
        {"kv_bits": 8},
        {"kv_bits": {"k": 4, "v": 2}, "seal_sinks": True, "rotate": {"k": True, "v": False}, "page_size": 2},
        {"kv_bits": {"k": 16, "v": 8}, "rotate": True, "page_size": 1},
        {"budget": 2048},
        {"sinks": 40, "window": 8},
    ],
    ids=str,
)
def test_the_edges_of_what_is_allowed(options: dict[str, Any]) -> None:
    model = build("llama")
    out = model.generate(IDS, max_new_tokens=12, cache_implementation="ctx_sink", cache_config=options)
    assert out.shape == (1, 36)
    with hf_ctxopt.patched(model, "ctx_sink", **options):
        assert model.generate(IDS, max_new_tokens=12).shape == (1, 36)


# ---- where configurations come from


def _cache(model: Any, **options: Any) -> Any:
    return model.generate(IDS, max_new_tokens=4, return_dict_in_generate=True, **options).past_key_values


def test_cache_config_in_a_saved_generation_config(tmp_path: Path) -> None:
    options = {"window": 12, "sinks": 2, "page_size": 4}
    GenerationConfig(cache_implementation="ctx_sink", cache_config=options).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["cache_config"] == options
    loaded = GenerationConfig.from_pretrained(tmp_path)
    cache = _cache(build("llama"), generation_config=loaded)
    assert (cache.name, cache.options.window, cache.options.page_size) == ("ctx_sink", 12, 4)
    assert loaded.cache_config == options
    assert loaded.prefill_chunk_size is None, "the caller's own configuration was written to"


def test_a_model_saved_with_our_name_in_its_generation_config(tmp_path: Path) -> None:
    model = build("llama")
    model.generation_config.cache_implementation = "ctx_sink"
    model.generation_config.cache_config = {"window": 12}
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert _cache(loaded).options.window == 12
    assert _cache(loaded, cache_config={"window": 13}).options.window == 13
    hf_ctxopt.unregister()
    try:
        with pytest.raises(ValueError, match="ctx_sink"):
            _cache(loaded)
    finally:
        hf_ctxopt.register()


@pytest.mark.parametrize("bad", [{"windw": 3}, {"window": -1}])
def test_bad_options_in_a_models_generation_config(quiet: nn.Module, bad: dict[str, Any]) -> None:
    quiet.generation_config.cache_implementation = "ctx_sink"
    quiet.generation_config.cache_config = bad
    with pytest.raises(ConfigError, match=next(iter(bad))):
        quiet.generate(IDS, max_new_tokens=2)


@pytest.mark.parametrize("where", ["model", "call"])
def test_a_cache_that_is_passed_wins_over_a_name(where: str) -> None:
    """transformers refuses both at once; a name saved in a configuration must not spoil the second turn of a chat."""
    model = build("llama")
    expected = model.generate(IDS, max_new_tokens=8, do_sample=False)
    named: dict[str, Any] = {"cache_implementation": "ctx_paged"} if where == "call" else {}
    if where == "model":
        model.generation_config.cache_implementation = "ctx_paged"
    cache = _cache(model, do_sample=False, **named)
    again = model.generate(expected[:, :28], max_new_tokens=4, do_sample=False, past_key_values=cache, **named)
    assert torch.equal(again, expected)
    own = DynamicCache(config=model.config)
    assert _cache(model, past_key_values=own, do_sample=False, **named) is own
    assert model.generation_config.cache_implementation == ("ctx_paged" if where == "model" else None)


def test_what_a_call_says_wins_over_the_patch() -> None:
    model = hf_ctxopt.patch_model(build("llama"), "ctx_sink", window=16)
    assert _cache(model).options.window == 16
    assert _cache(model, cache_implementation="ctx_paged").name == "ctx_paged"
    assert _cache(model, cache_implementation="ctx_sink").options.window == 1024
    assert type(_cache(model, cache_implementation="dynamic")) is DynamicCache
    assert _cache(model, use_cache=False) is None
    assert type(_cache(model, cache_implementation="static")).__name__ == "StaticCache"


def test_the_callers_dictionary_is_left_alone() -> None:
    options = {"window": 12, "sinks": 2}
    model = build("llama")
    cache = _cache(model, cache_implementation="ctx_sink", cache_config=options)
    options["window"] = 99
    assert cache.options.window == 12
    kept = {"k": 16, "v": 16}
    hf_ctxopt.patch_model(model, "ctx_paged", kv_bits=kept)
    kept["k"] = 3
    assert _cache(model).options.kv_bits == {"k": 16, "v": 16}
