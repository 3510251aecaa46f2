"""Plans at work: `patch_model(model, plan=...)`, `patch_model(model)`, `ctx_auto` and `load`."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hf_ctxopt
from hf_ctxopt import ConfigError, CtxoptError, Plan
from hf_ctxopt.integration import generate, load, planned
from hf_ctxopt.integration.packing import loading_config
from hf_ctxopt.integration.record import record_of
from hf_ctxopt.planner import hardware
from hf_ctxopt.planner.hardware import Device
from hf_ctxopt.weights.linear import GgufEmbedding, GgufLinear
from tests.cli.tiny import save_tiny, tiny_model
from tests.planner.models import facts

GIB = 1 << 30
IDS = torch.randint(2, 258, (1, 40), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk, with its tokenizer."""
    return save_tiny(tmp_path_factory.mktemp("planned"))


def _tokens(model: Any, **call: Any) -> tuple[torch.Tensor, Any]:
    out = model.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False, return_dict_in_generate=True,
        **call,
    )  # fmt: skip
    return out.sequences, next(out[key] for key in ("cache", "past_key_values") if out.get(key) is not None)


def test_a_patched_model_runs_as_planned() -> None:
    model = tiny_model()
    made = hf_ctxopt.plan(model, vram="4GiB", context=256, kv_bits={"k": 8, "v": 4})
    assert hf_ctxopt.patch_model(model, plan=made) is model
    _, cache = _tokens(model)
    assert cache.stats()["kv_bits"] == {"k": 8, "v": 4}
    assert cache.options.budget == f"{made.kv_budget}B"
    record = record_of(model)
    assert record is not None
    assert (record.plan, record.chunk) == (made, made.chunk)
    hf_ctxopt.unpatch_model(model)
    assert record_of(model) is None
    hf_ctxopt.patch_model(model, plan=made.to_dict())
    assert record_of(model).plan == made  # type: ignore[union-attr]


def test_a_plan_with_a_window() -> None:
    model = tiny_model(positions=64)
    made = hf_ctxopt.plan(model, vram="4GiB", context=400)
    with hf_ctxopt.patched(model, plan=made):
        _, cache = _tokens(model)
    assert cache.name == "ctx_sink"
    assert (cache.options.sinks, cache.options.window) == (made.sinks, made.window)
    assert cache.options.sinks + cache.options.window <= 64


def test_the_planned_chunk_is_fed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    made = hf_ctxopt.plan(model, vram="4GiB", context=256)
    small = Plan.from_dict({**made.to_dict(), "chunk": 16})
    fed: list[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with hf_ctxopt.patched(model, plan=small):
        planned_tokens, _ = _tokens(model)
    assert fed[:3] == [16, 16, 8]
    fed.clear()
    with hf_ctxopt.patched(model, plan=made):
        whole, _ = _tokens(model)
    hook.remove()
    assert fed[0] == 40
    assert torch.equal(planned_tokens, whole)


@pytest.mark.parametrize(
    "given",
    [{"cache": "ctx_sink"}, {"kv_bits": 8}, {"on_host": ["embedding"]}, {"plan": {"version": 1}}, {"plan": "auto"}],
)  # fmt: skip
def test_a_plan_comes_alone_and_whole(given: dict[str, Any]) -> None:
    model = tiny_model()
    made = hf_ctxopt.plan(model, vram="4GiB")
    with pytest.raises(ConfigError):
        hf_ctxopt.patch_model(model, **{"plan": made, **given})
    assert record_of(model) is None


def test_without_arguments_the_model_is_planned_as_it_stands() -> None:
    model = tiny_model()
    want, _ = _tokens(model, cache_implementation="ctx_paged")
    hf_ctxopt.patch_model(model)
    record = record_of(model)
    assert record is not None
    assert record.plan is not None
    assert record.plan.weights == "loaded"
    assert record.plan.device.split(":")[0] == "cpu"
    got, cache = _tokens(model)
    assert torch.equal(got, want)
    assert (cache.name, cache.options.budget) == ("ctx_paged", None)  # a CPU has no hard limit
    hf_ctxopt.unpatch_model(model)
    assert record_of(model) is None
    hf_ctxopt.patch_model(model, page_size=16)
    assert record_of(model).plan is None  # type: ignore[union-attr]


def test_on_a_gpu_pages_get_a_budget_and_prompts_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Device(device="cuda:0", name="RTX", total=8 * GIB, free=7 * GIB, own=0, context=GIB // 2, bandwidth=1e11)
    monkeypatch.setattr(hardware, "devices", lambda measure=False: [card])
    monkeypatch.setattr(planned, "compute_device", lambda model: torch.device("cuda", 0))
    settings = planned.automatic(tiny_model())
    assert settings.plan is not None
    assert settings.options.budget == f"{settings.plan.kv_budget}B"
    assert settings.chunk == settings.plan.chunk
    assert settings.plan.kv_budget < 7 * GIB


def test_where_nothing_can_be_planned_it_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = Device(device="cpu", name="CPU", total=GIB, free=1 << 20, bandwidth=1e10)
    monkeypatch.setattr(hardware, "devices", lambda measure=False: [full])
    model = tiny_model()
    with caplog.at_level(logging.WARNING):
        hf_ctxopt.patch_model(model)
    assert "no plan for LlamaForCausalLM" in caplog.text
    assert "are missing" in caplog.text
    _, cache = _tokens(model)
    assert (cache.name, cache.options.budget) == ("ctx_paged", None)


def test_auto_by_name() -> None:
    model = tiny_model()
    want, _ = _tokens(model, cache_implementation="ctx_paged")
    got, cache = _tokens(model, cache_implementation="ctx_auto")
    assert torch.equal(got, want)
    assert cache.name == "ctx_paged"
    with pytest.raises(ConfigError, match="ctx_auto"):
        _tokens(model, cache_implementation="ctx_auto", cache_config={"page_size": 16})
    hf_ctxopt.patch_model(model, "ctx_auto")
    assert record_of(model).plan is not None  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="ctx_auto"):
        hf_ctxopt.patch_model(model, "ctx_auto", page_size=16)


def test_auto_plans_once_for_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny_model(), []
    monkeypatch.setattr(planned, "_planned", lambda given: calls.append(given) or planned.Settings("ctx_paged", None))
    for _ in range(3):
        planned.automatic(model, again=False)
    assert calls == [model]
    planned.automatic(model)
    assert len(calls) == 2


@pytest.mark.parametrize("scheme", ["bf16", "Q8_0"])
def test_load(folder: Path, scheme: str) -> None:
    made = hf_ctxopt.plan(folder, vram="4GiB", weights=scheme, kv_bits=8)
    model, tokenizer = hf_ctxopt.load(made.to_dict(), device="cpu")
    packed = [module for module in model.modules() if isinstance(module, GgufLinear | GgufEmbedding)]
    assert bool(packed) is (scheme == "Q8_0")
    assert tokenizer.pad_token_id is not None
    _, cache = _tokens(model)
    assert cache.stats()["kv_bits"] == {"k": 8, "v": 8}
    assert model.dtype == torch.bfloat16
    held = sum(part.numel() * part.element_size() for part in {id(p): p for p in model.parameters()}.values())
    # The plan's bytes are those of the loaded weights (buffers aside).
    assert held == made.bytes["weights"] + made.bytes["embeddings"]


def test_what_cannot_be_loaded(folder: Path, tmp_path: Path) -> None:
    loaded = hf_ctxopt.plan(tiny_model(), vram="4GiB")
    with pytest.raises(ConfigError, match="loaded"):
        hf_ctxopt.load(loaded)
    made = hf_ctxopt.plan(folder, vram="4GiB")
    gone = Plan.from_dict({**made.to_dict(), "model": str(tmp_path / "nowhere")})
    with pytest.raises(CtxoptError, match="cannot load"):
        hf_ctxopt.load(gone, device="cpu")
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    with pytest.raises(CtxoptError, match="cannot load"):
        hf_ctxopt.load(Plan.from_dict({**made.to_dict(), "model": str(tmp_path)}), device="cpu")


def test_parts_on_the_host_stay_there(folder: Path) -> None:
    """The meta device stands for a GPU: what is moved has no data any more."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    load._move(model, torch.device("meta"), ("embedding",))
    away = {name: part.device.type for name, part in [*model.named_parameters(), *model.named_buffers()]}
    assert away.pop("model.embed_tokens.weight") == "cpu"
    assert set(away.values()) == {"meta"}


def test_embeddings_on_the_host_are_not_packed(folder: Path) -> None:
    options = loading_config("Q8_0", [load._pattern(load._PARTS["embedding"])], torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=options)
    assert type(model.get_input_embeddings()) is torch.nn.Embedding
    assert isinstance(model.get_output_embeddings(), GgufLinear)


def test_a_plan_for_other_weights_is_noticed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = hf_ctxopt.plan(folder, vram="4GiB", weights="Q4_K_M")
    with caplog.at_level(logging.WARNING):
        hf_ctxopt.patch_model(tiny_model().bfloat16(), plan=made)
    assert "may not fit as planned" in caplog.text


@pytest.mark.parametrize("bits", [16, 8])
def test_a_plan_of_another_model_is_refused(bits: int) -> None:
    model = tiny_model()
    hf_ctxopt.patch_model(model, "ctx_sink")
    before = record_of(model)
    other = hf_ctxopt.plan(facts("Llama-3.1-8B"), vram="80GiB", kv_bits=bits)
    with pytest.raises(ConfigError, match="a plan of this LlamaForCausalLM") as refused:
        hf_ctxopt.patch_model(model, plan=other)
    assert refused.value.field == "plan"
    assert record_of(model) is before


@pytest.mark.parametrize("bits", [16, 8, {"k": 8, "v": 4}])
def test_a_plan_counts_no_fewer_bytes_than_the_model_has(bits: Any) -> None:
    """A plan of a config is for two bytes: not for the model in float32. One for float32 holds for it in bfloat16."""
    model = tiny_model()
    wide, narrow = (hf_ctxopt.plan(given, vram="4GiB", kv_bits=bits) for given in (model, model.config))
    with pytest.raises(ConfigError, match=r"in torch\.float32.*2 bytes each, the model's 4") as refused:
        hf_ctxopt.patch_model(model, plan=narrow)
    assert refused.value.field == "plan"
    assert record_of(model) is None
    for made, dtype in ((wide, torch.float32), (wide, torch.bfloat16), (narrow, torch.bfloat16)):
        hf_ctxopt.patch_model(model.to(dtype), plan=made)
        assert record_of(model).plan == made  # type: ignore[union-attr]


def test_a_plan_is_for_the_weights_windows_and_length_that_the_model_has() -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 8192, "head_dim": 64,
    }  # fmt: skip
    config = AutoConfig.for_model("llama", **sizes, max_position_embeddings=512)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    kinds = ["sliding_attention", "full_attention"]
    hybrid, wider = (
        AutoConfig.for_model("gemma3_text", **sizes, layer_types=kinds, sliding_window=window) for window in (64, 512)
    )
    other = AutoModelForCausalLM.from_config(wider, dtype=torch.bfloat16)
    longer = {**config.to_dict(), "max_position_embeddings": 1024}
    others = [
        (model, hf_ctxopt.plan(config, vram="4GiB", weights="Q4_K_M"), "weights that it has"),
        (model, hf_ctxopt.plan(longer, vram="4GiB"), "trained on 512"),
        (other, hf_ctxopt.plan(hybrid, vram="4GiB"), "does not grow"),
    ]
    for given, plan, words in others:
        with pytest.raises(ConfigError, match=words):
            hf_ctxopt.patch_model(given, plan=plan)
        assert record_of(given) is None


@pytest.mark.parametrize("given", [torch.float32, "float32", "torch.float32", torch.int16, "zz", 3])
def test_a_plan_is_loaded_in_two_bytes(folder: Path, given: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        hf_ctxopt.load(hf_ctxopt.plan(folder, vram="4GiB"), "cpu", dtype=given)
    assert (refused.value.field, refused.value.value) == ("dtype", given)


@pytest.mark.parametrize("given", ["nonsense", 3.5, "cuda:99", "meta"])
def test_a_device_that_is_not_here_is_refused_before_anything_is_read(given: Any) -> None:
    made = replace(hf_ctxopt.plan(facts("Phi-4-mini"), vram="8GiB"), model="/nowhere")
    with pytest.raises(ConfigError) as refused:
        hf_ctxopt.load(made, given)
    assert refused.value.field == "device"


def test_a_plan_for_a_device_that_is_not_here_is_loaded_on_what_is(folder: Path) -> None:
    made = replace(hf_ctxopt.plan(folder, vram="4GiB"), device="cuda:99")
    model, _ = hf_ctxopt.load(made)
    assert model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(CtxoptError, match="cannot load"):
        hf_ctxopt.load(made, "cpu", nonsense=3)


def test_a_chunk_is_only_that_of_the_plan_s_own_cache() -> None:
    model = tiny_model()
    made = hf_ctxopt.plan(model, vram="4GiB", context=256)
    hf_ctxopt.patch_model(model, plan=made)
    own = hf_ctxopt.make_cache(model, made.cache, **made.cache_options)
    assert generate._planned_chunk(model, own) == made.chunk
    assert generate._planned_chunk(model, hf_ctxopt.make_cache(model, "ctx_paged", page_size=8)) is None
