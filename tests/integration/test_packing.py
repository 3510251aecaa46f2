"""`weights=`: one name for packing, by us or by another project, while loading and in memory."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import hf_ctxopt
from hf_ctxopt import ConfigError, CtxoptError
from hf_ctxopt.integration.packing import check_in_memory, check_scheme, loading_config
from hf_ctxopt.planner.facts import facts_of
from hf_ctxopt.planner.ladder import ladder
from hf_ctxopt.planner.schemes import SCHEMES, weight_bytes
from hf_ctxopt.weights import others
from hf_ctxopt.weights.codecs import encode
from hf_ctxopt.weights.gguf_file import GgufFile
from hf_ctxopt.weights.linear import GgufLinear
from hf_ctxopt.weights.others import OTHERS, check_other, install_line
from hf_ctxopt.weights.stored import stored_scheme
from tests.cli.tiny import tiny_tokenizer
from tests.weights.test_gguf_names import SMALL, write

IDS = torch.arange(2, 30).view(1, -1)
CUDA_ONLY = {"torchao-int4"}
MADE_ELSEWHERE = {"gptq", "awq"}


@pytest.fixture(scope="module")
def dense() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


@pytest.fixture(scope="module")
def folder(dense: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("dense")
    dense.save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


def packages(monkeypatch: pytest.MonkeyPatch, present: bool) -> None:
    monkeypatch.setattr(others, "_installed", lambda module: present)


@pytest.mark.parametrize("name", OTHERS)
def test_a_missing_package_is_named_before_anything_is_loaded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packages(monkeypatch, False)
    with pytest.raises(CtxoptError, match="pip install") as error:
        check_scheme(name, "cuda", None)
    for package in OTHERS[name].needs.values():
        assert package in str(error.value)
    plan = hf_ctxopt.plan({"model_type": "llama"}, vram="80GiB", weights=name).to_dict()
    with pytest.raises(CtxoptError, match="pip install"):  # the folder does not even exist
        hf_ctxopt.load({**plan, "model": "/nowhere"})


@pytest.mark.parametrize("name", OTHERS)
def test_every_scheme_is_planned_for(name: str) -> None:
    found = hf_ctxopt.plan({"model_type": "llama"}, vram="80GiB", weights=name)
    assert found.weights == name
    assert any(install_line(name) in reason for reason in found.reasons)
    facts = facts_of({"model_type": "llama"})
    assert (
        weight_bytes(facts, "Q4_0").total * 0.85 < weight_bytes(facts, name).total < weight_bytes(facts, "bf16").total
    )


@pytest.mark.parametrize("name", OTHERS)
def test_with_its_package_a_scheme_is_asked_for_where_it_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packages(monkeypatch, True)
    method = OTHERS[name].method
    assert check_scheme(name, "cuda", {"quant_method": method})
    if name in MADE_ELSEWHERE:
        with pytest.raises(ConfigError, match="not packed"):
            check_scheme(name, "cuda", None)
    else:
        assert not check_scheme(name, "cuda", None)
    if name in CUDA_ONLY:
        with pytest.raises(ConfigError, match="CUDA"):
            check_other(name, "cpu")
    else:
        check_other(name, "cpu")


@pytest.mark.parametrize("name", [name for name, row in OTHERS.items() if row.make is not None])
def test_the_config_is_transformers_own(name: str) -> None:
    if any(importlib.util.find_spec(module.partition(".")[0]) is None for module in OTHERS[name].needs):
        pytest.skip(f"needs {install_line(name)}")
    assert loading_config(name, (), torch.bfloat16).quant_method == OTHERS[name].method


def test_the_table_is_the_ladders_and_the_planners() -> None:
    assert set(OTHERS) < set(SCHEMES)
    assert {rung.weights for rung in ladder(list(SCHEMES), None)} == set(SCHEMES)


def test_a_checkpoint_that_is_packed_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    packages(monkeypatch, True)
    for weights, stored in (
        ("Q4_K_M", {"quant_method": "gptq"}),
        ("Q4_K_M", {"quant_method": "ctxopt_gguf", "mix": "Q8_0"}),
        ("awq", {"quant_method": "gptq"}),
        ("nf4", {"quant_method": "ctxopt_gguf", "mix": "Q4_K_M"}),
    ):
        with pytest.raises(ConfigError, match="packed as already"):
            check_scheme(weights, "cuda", stored)
    assert check_scheme("Q4_K_M", "cpu", {"quant_method": "ctxopt_gguf", "mix": "Q4_K_M"})
    with pytest.raises(ConfigError, match="weights"):
        check_scheme("Q3", "cpu", None)


def test_a_packed_checkpoint_is_planned_and_loaded_as_what_it_is(folder: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=hf_ctxopt.GgufQuantConfig("Q5_K_M"))
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    found = hf_ctxopt.plan(tmp_path, vram="80GiB")
    assert found.weights == "Q5_K_M"
    assert hf_ctxopt.plan(tmp_path, vram="80GiB", weights=["Q5_K_M", "bf16"]).weights == "Q5_K_M"
    assert hf_ctxopt.plan(folder, vram="80GiB").weights == "bf16"
    for other in ("bf16", "Q6_K", "int8"):
        with pytest.raises(ConfigError, match="Q5_K_M"):
            hf_ctxopt.plan(tmp_path, vram="80GiB", weights=other)
    with pytest.raises(ConfigError, match="packed as already"):
        check_scheme("bf16", "cpu", {"quant_method": "ctxopt_gguf", "mix": "Q5_K_M"})
    again, _ = hf_ctxopt.load(found, "cpu")
    assert isinstance(again.model.layers[0].mlp.up_proj, GgufLinear)
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-2, atol=1e-2)


def test_a_gguf_file_keeps_its_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are not unpacked and packed again, unless others are asked for."""
    path = tmp_path / "model.gguf"
    write(path, "gpt2", AutoConfig.for_model("gpt2", **SMALL["gpt2"]))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **options: tiny_tokenizer())
    found = hf_ctxopt.plan(path, vram="80GiB")
    assert found.weights == "Q8_0"
    model, _ = hf_ctxopt.load(found, "cpu")
    want, _ = hf_ctxopt.load_gguf(path, torch.bfloat16)
    layer, block = model.transformer.h[1].mlp.c_fc, want.transformer.h[1].mlp.c_fc
    assert isinstance(layer, GgufLinear)
    assert torch.equal(layer.weight, block.weight)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, want(IDS).logits)
    dense, _ = hf_ctxopt.load(path, "cpu", weights="bf16")
    assert not isinstance(dense.transformer.h[1].mlp.c_fc, GgufLinear)
    assert hf_ctxopt.plan(path, vram="80GiB", weights="Q4_K_M").weights == "Q4_K_M"


def test_the_mix_of_a_gguf_file(tmp_path: Path) -> None:
    for kind, mix in ((15, "Q4_K_M"), (1024 + 7, "Q8_0"), (None, "Q8_0"), (99, "Q8_0")):
        writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
        if kind is not None:
            writer.add_file_type(kind)
        writer.add_tensor("a", encode(torch.zeros(8, 256), "Q8_0").numpy(), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor("b", encode(torch.zeros(2, 256), "Q4_K").numpy(), raw_dtype=gguf.GGMLQuantizationType.Q4_K)
        writer.add_tensor("c", torch.zeros(64, 256).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        assert GgufFile(tmp_path / "a.gguf").mix == mix


@pytest.mark.parametrize(
    ("stored", "scheme"),
    [
        (None, None), ({"quant_method": "fp8"}, None), ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, "int8"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": False, "load_in_4bit": True}, "nf4"),
        ({"quant_method": "quanto", "weights": "int4"}, "quanto-int4"),
        ({"quant_method": "quanto", "weights": "int8"}, "quanto-int8"),
    ],
)  # fmt: skip
def test_the_scheme_of_a_checkpoint(stored: Any, scheme: str | None) -> None:
    assert stored_scheme(stored) == scheme


def loaded(folder: Path, weights: str, package: str | None) -> Any:
    if package is not None:
        pytest.importorskip(package)
    return hf_ctxopt.load(folder, "cpu", weights=weights)


@pytest.mark.parametrize(
    ("weights", "package", "error"),
    [
        ("Q4_K_M", None, 0.2), ("hqq4", "hqq", 0.2), ("hqq8", "hqq", 0.03),
        ("quanto-int4", "optimum.quanto", 0.3), ("quanto-int8", "optimum.quanto", 0.03),
    ],
)  # fmt: skip
def test_a_folder_is_loaded_packed_and_runs(
    weights: str, package: str | None, error: float, folder: Path, dense: LlamaForCausalLM
) -> None:
    model, tokenizer = loaded(folder, weights, package)
    with torch.no_grad():
        want, got = dense(IDS).logits.float(), model(IDS).logits.float()
        text = model.generate(tokenizer("a b", return_tensors="pt").input_ids, max_new_tokens=4, do_sample=False)
    assert 1e-4 < float((got - want).norm() / want.norm()) < error
    assert text.shape[1] > 4
    held, planned = facts_of(model).loaded, weight_bytes(facts_of(dense.config), weights)
    assert held is not None
    assert held[0] == pytest.approx(planned.layers, rel=0.03)


def test_a_model_in_memory_is_packed_where_it_is(folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    hf_ctxopt.patch_model(model, weights="Q5_K_M")
    assert isinstance(model.model.layers[0].mlp.up_proj, GgufLinear)
    hf_ctxopt.patch_model(model, "ctx_sink", weights="Q5_K_M", window=64)  # it is so already
    with pytest.raises(ConfigError, match="packed already"):
        hf_ctxopt.patch_model(model, weights="Q4_K_M")
    hf_ctxopt.unpatch_model(model)
    assert isinstance(model.model.layers[0].mlp.up_proj, GgufLinear)
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape[1] == IDS.shape[1] + 3


def test_hqq_packs_a_model_in_memory(folder: Path) -> None:
    pytest.importorskip("hqq")
    model = LlamaForCausalLM.from_pretrained(folder)
    hf_ctxopt.patch_model(model, weights="hqq4")
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "HQQLinear"
    with pytest.raises(ConfigError, match="packed already"):
        check_in_memory(model, "Q4_K_M")
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape[1] == IDS.shape[1] + 3


def test_what_is_packed_only_while_loading_names_load(
    dense: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages(monkeypatch, True)
    for name in ("nf4", "quanto-int4", "gptq"):
        with pytest.raises(ConfigError, match=r"hf_ctxopt\.load"):
            hf_ctxopt.patch_model(dense, weights=name)
    with pytest.raises(ConfigError, match="weights"):
        hf_ctxopt.patch_model(dense, weights="Q3")
    with pytest.raises(ConfigError, match="plan"):
        hf_ctxopt.patch_model(dense, plan=hf_ctxopt.plan(dense), weights="Q8_0")
    with pytest.raises(ConfigError, match="not undone"), hf_ctxopt.patched(dense, weights="Q8_0"):
        pass
    assert not check_in_memory(dense, "bf16")
    assert not any(isinstance(module, GgufLinear) for module in dense.modules())


def test_a_model_unpacked_from_a_gguf_file_can_be_packed(folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    model.config.quantization_config = {"quant_method": "gguf"}  # transformers' mark of where it came from
    assert check_in_memory(model, "Q8_0")
    hf_ctxopt.patch_model(model, weights="Q8_0")
    assert isinstance(model.model.layers[0].mlp.up_proj, GgufLinear)


def test_a_plan_has_its_own_weights(folder: Path) -> None:
    plan = hf_ctxopt.plan(folder, weights="Q8_0", device="cpu")
    with pytest.raises(ConfigError, match="beside a plan"):
        hf_ctxopt.load(plan, weights="Q4_K_M")
