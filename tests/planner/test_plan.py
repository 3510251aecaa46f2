"""What goes into a plan and what comes out: bad values, JSON, words, and models of every shape of input."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hf_ctxopt
from hf_ctxopt import ConfigError, DoesNotFitError, Plan, UnsupportedModelError, plan
from hf_ctxopt.planner import hardware
from hf_ctxopt.planner.facts import facts_of
from hf_ctxopt.planner.hardware import Device
from tests.planner.models import GIB, KNOWN, facts

TINY = {
    "model_type": "llama", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"context": 0}, "context"), ({"context": True}, "context"), ({"batch": 0}, "batch"),
        ({"agents": 1.5}, "agents"),
        ({"goal": "best"}, "goal"), ({"vram": "eight"}, "vram"), ({"vram": -1}, "vram"), ({"vram": True}, "vram"),
        ({"vram": "8"}, "vram"),
        ({"gpu": "voodoo2"}, "gpu"), ({"weights": "Q3_K"}, "weights"), ({"weights": []}, "weights"),
        ({"weights": 3}, "weights"), ({"weights": [3]}, "weights"), ({"weights": True}, "weights"),
        ({"kv_bits": 3}, "kv_bits"), ({"kv_bits": {"k": 8}}, "kv_bits"), ({"kv_budget": "x"}, "kv_budget"),
        ({"reserve": "much"}, "reserve"), ({"device": "cpu"}, "device"), ({"page_size": 24}, "page_size"),
        ({"vram": 10**400}, "vram"), ({"vram": "9" * 25 + "GiB"}, "vram"), ({"batch": 10**30}, "batch"),
    ],
)  # fmt: skip
def test_bad_values_name_their_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as refused:
        plan(facts("Phi-4-mini"), **{"vram": "8GiB", **changes})
    assert refused.value.field == field


def test_json_round_trip_and_its_checks() -> None:
    found = plan(facts("Phi-4-mini"), gpu="rtx4070-laptop")
    values = json.loads(json.dumps(found.to_dict()))
    for key in ("weights", "kv_bits", "cache", "window", "context", "batch", "total_bytes", "bytes", "reasons"):
        assert key in values
    assert values["total_bytes"] == sum(values["bytes"].values())
    assert Plan.from_dict(values) == found
    for broken in ({"version": 0}, {"version": True}, {"version": 1.0}, {"total_bytes": 1}, {"colour": "red"}):
        with pytest.raises(ConfigError):
            Plan.from_dict({**values, **broken})
    with pytest.raises(ConfigError, match="window"):
        Plan.from_dict({key: value for key, value in values.items() if key != "window"})
    with pytest.raises(AttributeError):
        found.context = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("bytes", [[1], None, {"weights": "x"}, {"zz": 1}]), ("on_host", [None, 3, "embedding", ["foo"], [1]]),
        ("on_host", [["head", "head"]]), ("reasons", [None, "abc", [None]]),
        ("kv_bits", ["8", 8, [8, 8], {"k": 8}, {"k": 8, "v": 3}, {"k": True, "v": 8}]),
        ("context", [-1, 0, "256", True, None, 1.5]), ("chunk", [0, -3, "x"]), ("page_size", [0, 24, "x"]),
        ("pages", [-5, None]), ("agents", [0]), ("batch", [0]), ("goal", ["zz", None]), ("vram", ["x", 0, 10**400]),
        ("kv_budget", [-1, "2GiB"]), ("weights", ["zz", 3, []]), ("model", [None]), ("quality", [4]),
        ("cache", [None, "ctx_nowhere", "ctx_priority"]), ("capacity", ["x", -1]), ("window", [256]), ("sinks", [4]),
        ("ms_per_token", ["x", float("nan"), float("inf"), 10**400, -1.0, True]),
    ],
)  # fmt: skip
def test_json_of_no_plan_names_the_field(field: str, values: list[Any]) -> None:
    made = plan(facts("Phi-4-mini"), gpu="rtx4070-laptop").to_dict()
    for value in values:
        with pytest.raises(ConfigError) as refused:
            Plan.from_dict({**made, field: value})
        assert refused.value.field == f"plan.{field}", value
        with pytest.raises(ConfigError):
            replace(Plan.from_dict(made), **{field: value})


def test_a_plan_shares_no_dictionary_with_its_json() -> None:
    made = plan(facts("Phi-4-mini"), gpu="rtx4070-laptop")
    values = made.to_dict()
    read = Plan.from_dict(values)
    for changed in (values, made.to_dict(), read.cache_options, made.cache_options):
        changed["kv_bits"]["k"] = 2
        changed.get("bytes", {})["kv"] = 0
    assert read == made == copy.deepcopy(made) == pickle.loads(pickle.dumps(made))
    assert Plan.from_dict({**made.to_dict(), "bytes": MappingProxyType(made.bytes)}).to_dict() == made.to_dict()


def test_json_with_other_bytes_or_another_cache_is_refused() -> None:
    made = plan(facts("Phi-4-mini"), gpu="rtx4070-laptop").to_dict()
    for count in (-1, "x", None, True):
        with pytest.raises(ConfigError) as refused:
            Plan.from_dict({**made, "bytes": {**made["bytes"], "kv": count}})
        assert refused.value.field == "plan.bytes['kv']"
    with pytest.raises(ConfigError, match="plan.window"):
        Plan.from_dict({**made, "cache": "ctx_sink"})
    with pytest.raises(ConfigError, match="ctx_prefix for several agents"):
        Plan.from_dict({**made, "agents": 2})
    with pytest.raises(ConfigError, match="exactly the fields"):
        Plan.from_dict({**made, 3: 4, "zz": 5})
    windowed = plan(facts("Llama-2-7B"), vram="8GiB", context=10_000).to_dict()
    assert Plan.from_dict(windowed).window is not None
    with pytest.raises(ConfigError, match="plan.sinks"):
        Plan.from_dict({**windowed, "sinks": None})


def test_print_names_every_part_and_the_card() -> None:
    found = plan(facts("Phi-4-mini"), gpu="rtx4070-laptop")
    text = str(found)
    for words in ("rtx4070-laptop", "reserve", "CUDA context", "keys and values", "8,192 tokens", found.weights):
        assert words in text


def test_an_error_of_space_survives_pickling() -> None:
    error = DoesNotFitError(12, "x", ("y would",))
    again = pickle.loads(pickle.dumps(error))
    assert (again.shortfall, again.remedies, str(again)) == (12, ("y would",), str(error))
    assert isinstance(error, hf_ctxopt.CtxoptError)


def test_a_folder_a_config_and_a_dictionary_give_the_same_plan(tmp_path: Path) -> None:
    config = AutoConfig.for_model(**TINY)
    config.save_pretrained(tmp_path)
    plans = [plan(given, vram="4GiB") for given in (config, TINY, tmp_path, str(tmp_path / "config.json"))]
    assert len({tuple(found.bytes.items()) for found in plans}) == 1
    assert plans[2].model == plans[3].model == str(tmp_path)


@pytest.mark.parametrize(
    "given", ["/no/such/folder", "./nowhere", 3, None, {"model_type": "no_such_model"}, torch.nn.Linear(2, 2)]
)
def test_what_is_no_model_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        plan(given, vram="8GiB")
    assert refused.value.field in ("model", "model_type")


BROKEN: list[dict[str, Any]] = [
    {"num_attention_heads": 3}, {"hidden_size": "x"}, {"max_position_embeddings": None}, {"rope_scaling": "x"},
    {"num_attention_heads": 0}, {"hidden_size": 0}, {"head_dim": 0}, {"num_hidden_layers": -1}, {"vocab_size": 0},
    {"num_key_value_heads": 0}, {"rope_parameters": {"rope_type": "zz", "rope_theta": 1e4}}, {"hidden_act": "zz"},
    {"dtype": "zz"}, {"kv_lora_rank": "x"}, {"num_local_experts": float("inf")}, {"moe_intermediate_size": {}},
    {"quantization_config": [1]}, {"quantization_config": "fp8"}, {"model_type": "mistral", "sliding_window": "x"},
]  # fmt: skip


@pytest.mark.parametrize("values", BROKEN)
def test_a_broken_config_is_refused_in_one_line(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY, **values}))
    for given in ({**TINY, **values}, tmp_path):
        with pytest.raises((ConfigError, UnsupportedModelError)) as refused:
            plan(given, vram="4GiB")
        assert "\n" not in str(refused.value)


def test_latent_attention_and_encoder_decoders_are_refused() -> None:
    latent = AutoConfig.for_model("deepseek_v3", num_hidden_layers=1, n_routed_experts=8)
    with pytest.raises(UnsupportedModelError, match="latent"):
        plan(latent, vram="8GiB")
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        plan(AutoConfig.for_model("t5"), vram="8GiB")


def test_learned_positions_end_where_they_end() -> None:
    learned = AutoConfig.for_model("gpt2", n_layer=2, n_embd=64, n_head=4, vocab_size=128)
    assert plan(learned, vram="4GiB").context == 1024
    with pytest.raises(ConfigError, match="1024") as refused:
        plan(learned, vram="4GiB", context=2048)
    assert refused.value.field == "context"


@pytest.mark.parametrize(
    ("config", "trained"),
    [
        ({"model_type": "mpt", "d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 128}, 2048),
        ({"model_type": "bloom", "hidden_size": 64, "n_head": 4, "n_layer": 2, "vocab_size": 128,
          "seq_length": 1024}, 1024),
        ({"model_type": "bloom", "hidden_size": 64, "n_head": 4, "n_layer": 2, "vocab_size": 128}, None),
        ({"model_type": "xlnet", "d_model": 64, "n_head": 4, "n_layer": 2, "vocab_size": 128}, None),
        ({**TINY, "max_position_embeddings": -1}, None), ({**TINY, "max_position_embeddings": 0}, None),
        ({**TINY, "max_position_embeddings": 0, "n_ctx": 256}, 256),
    ],
)  # fmt: skip
def test_the_trained_length_by_any_name(config: dict[str, Any], trained: int | None) -> None:
    found = plan(config, vram="4GiB")
    assert facts_of(config).trained == trained
    assert found.context == (trained or 8192)
    said = "its config does not say what length it was trained on" in found.reasons
    assert said is (trained is None)


def test_a_loaded_model_is_planned_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY), dtype=torch.float32)
    held = 2 * GIB
    there = Device(device="cpu", name="CPU", total=4 * GIB, free=4 * GIB - held, bandwidth=1e10)
    monkeypatch.setattr(hardware, "devices", lambda measure=False: [there])
    found = plan(model)
    size = sum(part.numel() * 4 for part in [*model.parameters(), *model.buffers()])
    assert found.weights == "loaded"
    assert found.bytes["weights"] + found.bytes["embeddings"] == size
    assert found.bytes["others"] == held - size  # what is in use and is not the model
    assert found.bytes["kv"] == 512 * 2 * 2 * 2 * 16 * 4  # float32: 16 bits mean the model's own
    assert found.bytes["cuda_context"] == found.bytes["graph"] == 0
    assert found.on_host == ()


def test_others_on_the_card_count(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Device(device="cuda:0", name="RTX", total=8 * GIB, free=3 * GIB, context=GIB // 2, bandwidth=1e11)
    monkeypatch.setattr(hardware, "devices", lambda measure=False: [card])
    found = plan(facts("Phi-4-mini"))
    assert found.device == "cuda:0"
    assert found.bytes["others"] == 8 * GIB - 3 * GIB - GIB // 2
    assert found.weights != plan(facts("Phi-4-mini"), vram="8GiB").weights


def test_reserve_is_adjustable() -> None:
    tight = plan(facts("Llama-3.1-8B"), vram="8GiB", reserve="128MiB")
    usual = plan(facts("Llama-3.1-8B"), vram="8GiB")
    assert tight.bytes["reserve"] == 128 << 20
    assert tight.bytes["weights"] > usual.bytes["weights"]
    assert plan(facts("Llama-3.1-8B"), vram="8GiB", reserve=0).bytes["reserve"] == 0


@pytest.mark.parametrize("none", [0, "0", " 0 ", "0GiB", "0.0 mb", "0B"])
def test_nothing_can_be_left_alone(none: Any) -> None:
    assert plan(facts("Phi-4-mini"), vram="8GiB", reserve=none).bytes["reserve"] == 0
    for field in ("vram", "kv_budget"):
        with pytest.raises(ConfigError) as refused:
            plan(facts("Phi-4-mini"), **{"vram": "8GiB", field: none})
        assert (refused.value.field, refused.value.value) == (field, none)


@pytest.mark.parametrize(
    "bad", ["-1", "-1GiB", "1e9", "", "0x10", True, 1.5, -1, [1], "８GiB", "８", "1\u212aB", "9" * 400 + "GiB"]
)
def test_what_is_no_size_is_no_reserve(bad: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        plan(facts("Phi-4-mini"), vram="8GiB", reserve=bad)
    assert (refused.value.field, refused.value.value) == ("reserve", bad)


def test_digits_alone_are_bytes() -> None:
    digits = plan(facts("Phi-4-mini"), vram=str(8 * GIB), kv_budget=str(GIB), reserve=str(GIB))
    assert digits == plan(facts("Phi-4-mini"), vram=8 * GIB, kv_budget=GIB, reserve=GIB)


def test_remedies_fit() -> None:
    """What a refusal names is planned without one."""
    with pytest.raises(DoesNotFitError) as refused:
        plan(facts("Llama-3.1-8B"), vram="8GiB", context=65536, weights="Q6_K", kv_bits=8, agents=2)
    card = next(remedy for remedy in refused.value.remedies if "card" in remedy)
    size = card.split("card of ")[1].split(" GiB")[0]
    found = plan(facts("Llama-3.1-8B"), vram=f"{size}GiB", context=65536, weights="Q6_K", kv_bits=8, agents=2)
    assert found.context == 65536
    smaller = f"{int(size) - 2}GiB"
    with pytest.raises(DoesNotFitError):
        plan(facts("Llama-3.1-8B"), vram=smaller, context=65536, weights="Q6_K", kv_bits=8, agents=2)


def test_all_models_are_known_by_their_parameters() -> None:
    for name, known in KNOWN.items():
        assert sum(matrix.numel for matrix in facts(name).matrices) == known.parameters, name
        assert facts(name).trained == known.trained, name
