"""Models whose code or ties go against packing each module by itself."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BartForConditionalGeneration,
    BloomForCausalLM,
    FalconForCausalLM,
    FalconMambaForCausalLM,
    FSMTForConditionalGeneration,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    MambaForCausalLM,
    ProphetNetForConditionalGeneration,
    RobertaPreLayerNormForCausalLM,
    RwkvForCausalLM,
    T5ForConditionalGeneration,
)
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

import hf_ctxopt
from hf_ctxopt.weights.blocks import packed_bytes
from hf_ctxopt.weights.codecs import encode
from hf_ctxopt.weights.dtype_mark import mark_dtype
from hf_ctxopt.weights.gguf_load import load_gguf
from hf_ctxopt.weights.linear import GgufEmbedding, GgufLinear
from hf_ctxopt.weights.matmul import gguf_matmul
from hf_ctxopt.weights.roles import kept
from hf_ctxopt.weights.selection import Choice, is_embedding, replacement, types_of
from hf_ctxopt.weights.shapes import weights_of
from tests.weights.test_gguf_names import SMALL, write

IDS = torch.arange(3, 15).view(1, -1)


def built(kind: Any, **values: Any) -> Any:
    """A small model of a class."""
    torch.manual_seed(0)
    return spread(kind(kind.config_class(**{"vocab_size": 128, **values})))


# Of a model with encoder and decoder, as most call them.
PAIR: dict[str, int] = {
    "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
}  # fmt: skip


def t5(**changes: Any) -> T5ForConditionalGeneration:
    sizes = {"d_model": 256, "d_kv": 64, "d_ff": 256, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    return built(T5ForConditionalGeneration, **sizes, **changes)


def mamba(tied: bool) -> MambaForCausalLM:
    return built(MambaForCausalLM, hidden_size=256, state_size=8, num_hidden_layers=2, tie_word_embeddings=tied)


def bart() -> BartForConditionalGeneration:
    wide = {"d_model": 256, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256}
    return built(BartForConditionalGeneration, **{**PAIR, **wide})


def falcon() -> FalconForCausalLM:
    return built(FalconForCausalLM, hidden_size=256, num_hidden_layers=2, num_attention_heads=4)


def gpt2() -> GPT2LMHeadModel:
    return built(GPT2LMHeadModel, n_embd=256, n_layer=2, n_head=4, n_positions=64)


def fsmt() -> FSMTForConditionalGeneration:
    return built(FSMTForConditionalGeneration, src_vocab_size=128, tgt_vocab_size=128, use_cache=False, **PAIR)


def prophetnet() -> ProphetNetForConditionalGeneration:
    renamed = {"encoder_layers": "num_encoder_layers", "decoder_layers": "num_decoder_layers",
               "d_model": "hidden_size", "encoder_attention_heads": "num_encoder_attention_heads",
               "decoder_attention_heads": "num_decoder_attention_heads"}  # fmt: skip
    return built(ProphetNetForConditionalGeneration, **{renamed.get(name, name): size for name, size in PAIR.items()})


def gemma4(own_embeddings: int = 32) -> Gemma4ForConditionalGeneration:
    """Gemma 4 with images, in its small form by default: embeddings of each layer's own."""
    text: dict[str, Any] = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16,
        "hidden_size_per_layer_input": own_embeddings, "vocab_size_per_layer_input": 128, "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"], "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    config = Gemma4Config(text_config=text, vision_config=None, audio_config=None)
    return spread(Gemma4ForConditionalGeneration(config))


def rwkv() -> RwkvForCausalLM:
    return built(RwkvForCausalLM, context_length=32, hidden_size=64, num_hidden_layers=2, rescale_every=1)


def bloom(exact: bool) -> BloomForCausalLM:
    return built(BloomForCausalLM, hidden_size=64, n_layer=2, n_head=4, pretraining_tp=2, slow_but_exact=exact)


def spread(model: Any) -> Any:
    """Matrices far enough from zero for an output that tells models apart."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.05)
    model.tie_weights()
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS, **more).logits
    return out


def as_decoded(model: Any, dense: Any) -> None:
    """`model` gives what its dense twin gives with the decoded weights in the packed modules' places."""
    for name, module in model.named_modules():
        if isinstance(module, GgufLinear | GgufEmbedding):
            twin, values = dense.get_submodule(name), module.dequantize()
            twin.weight.data = values.T.contiguous() if isinstance(twin, Conv1D) else values
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_a_layer_whose_dtype_the_model_reads_stays_dense(feed_forward: str) -> None:
    model = t5(feed_forward_proj=feed_forward)
    dense = copy.deepcopy(model)
    hf_ctxopt.quantize_(model, "Q8_0")
    feed = model.encoder.block[0].layer[1].DenseReluDense
    assert type(feed.wo) is nn.Linear
    assert isinstance(feed.wi_0 if feed_forward == "gated-gelu" else feed.wi, GgufLinear)
    as_decoded(model, dense)


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_of_mamba_stays_dense(tied: bool) -> None:
    model = mamba(tied)
    dense = copy.deepcopy(model)
    hf_ctxopt.quantize_(model, "Q8_0")
    assert type(model.lm_head) is nn.Linear
    assert isinstance(model.get_input_embeddings(), GgufEmbedding) is not tied
    assert isinstance(model.backbone.layers[0].mixer.in_proj, GgufLinear)
    as_decoded(model, dense)


@pytest.mark.parametrize(
    ("build", "left"),
    [(fsmt, "decoder.embed_tokens"), (prophetnet, "ngram_embeddings"), (gemma4, "language_model.embed_tokens")],
)
def test_a_weight_that_the_model_s_code_takes_past_its_layer_stays_dense(build: Any, left: str) -> None:
    model = build()
    dense = copy.deepcopy(model)
    hf_ctxopt.quantize_(model, "Q8_0")
    types = model.config.quantization_config.types
    assert types
    assert not any(name.endswith(left) for name in types)
    as_decoded(model, dense)


def test_a_weight_that_is_changed_in_a_loop_over_the_blocks_stays_dense() -> None:
    """RWKV divides the outputs of its later blocks, in place, at the first step."""
    model = rwkv()
    dense = copy.deepcopy(model)
    hf_ctxopt.quantize_(model, "Q8_0")
    block = model.rwkv.blocks[1]
    assert type(block.attention.output) is type(block.feed_forward.value) is nn.Linear
    assert isinstance(block.attention.key, GgufLinear)
    as_decoded(model, dense)


def test_a_model_named_after_its_norms_is_packed() -> None:
    model = built(
        RobertaPreLayerNormForCausalLM, hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=64, is_decoder=True,
    )  # fmt: skip
    types = types_of(model, Choice("Q8_0"))
    assert "roberta_prelayernorm.encoder.layer.0.attention.self.query" in types
    assert kept("model.layers.0.input_layernorm.mlp.fc1")
    assert kept("norm.weight")


def test_an_embedding_that_does_more_stays_dense() -> None:
    class Marked(nn.Embedding):  # T5Gemma 2's
        embed_scale = 2.0

        def __init__(self) -> None:
            super().__init__(8, 32)
            self.own = nn.Parameter(torch.zeros(32))

    assert is_embedding(nn.Embedding(8, 32))
    assert not is_embedding(Marked())
    assert not is_embedding(nn.Embedding(8, 32, max_norm=1.0))


def test_a_scale_is_rounded_only_where_the_model_rounds_it() -> None:
    """BART's is a plain number; the root of 96 in bfloat16 is off by 0.02 %, and the last digit with it."""
    layer = BartScaledWordEmbedding(64, 96, None, embed_scale=96**0.5).to(torch.bfloat16)
    new = replacement(layer, "Q8_0", torch.bfloat16, packed=True)
    new.weight = nn.Parameter(encode(layer.weight.detach(), "Q8_0"), requires_grad=False)
    layer.weight.data = new.dequantize(torch.bfloat16)
    ids = torch.arange(64)
    assert torch.equal(new(ids), layer(ids))


def test_a_mixer_multiplies_alike_however_it_was_packed(tmp_path: Path) -> None:
    """FalconMamba's code takes another, rougher way where its config says that it is quantized."""
    kind = FalconMambaForCausalLM
    dense = built(kind, hidden_size=64, state_size=8, num_hidden_layers=1, time_step_rank=4)
    dense.to(torch.bfloat16).save_pretrained(tmp_path)
    model = kind.from_pretrained(tmp_path)
    hf_ctxopt.quantize_(model, "Q8_0")
    loaded = kind.from_pretrained(tmp_path, quantization_config=hf_ctxopt.GgufQuantConfig("Q8_0"))
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    for one in (model, loaded):
        assert one.config._is_quantized  # FlashAttention's casts ask
        assert not hasattr(one.backbone.layers[0].mixer.config, "_is_quantized")


def test_code_that_a_setting_turns_on_keeps_nothing_dense_while_it_is_off() -> None:
    assert "model.language_model.embed_tokens" in types_of(gemma4(0), Choice("Q8_0"))
    for exact in (False, True):
        model = bloom(exact)
        dense = copy.deepcopy(model)
        hf_ctxopt.quantize_(model, "Q8_0")
        assert isinstance(model.transformer.h[0].self_attention.dense, GgufLinear) is not exact
        as_decoded(model, dense)


@pytest.mark.parametrize("build", [t5, bart])
def test_modules_that_share_a_tensor_share_its_type(build: Any, tmp_path: Path) -> None:
    model = build()
    dense = copy.deepcopy(model)
    dense.save_pretrained(tmp_path / "dense")
    hf_ctxopt.quantize_(model, "Q4_K_M")
    types = model.config.quantization_config.types
    tied = [name for name in types if re.search(r"shared|embed_tokens|lm_head", name)]
    assert len(tied) == 4
    assert {types[name] for name in tied} == {"Q6_K"}
    assert model.lm_head.weight is model.get_input_embeddings().weight
    kind = type(model)
    loaded = kind.from_pretrained(tmp_path / "dense", quantization_config=hf_ctxopt.GgufQuantConfig("Q4_K_M"))
    model.save_pretrained(tmp_path / "packed")
    again = kind.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(again), logits(model))
    as_decoded(model, dense)


@pytest.mark.parametrize("build", [falcon, gpt2])
@pytest.mark.parametrize("mix", ["Q8_0", "Q4_K_M"])
def test_linears_of_other_classes_are_packed(build: Any, mix: str, tmp_path: Path) -> None:
    model = build()
    dense = copy.deepcopy(model)
    dense.save_pretrained(tmp_path / "dense")
    hf_ctxopt.quantize_(model, mix)
    left = [name for name, part in model.named_parameters() if part.dim() == 2 and part.is_floating_point()]
    assert [name for name in left if "wpe" not in name] == []
    packed = sum(part.nbytes for part in model.parameters() if part.dtype == torch.uint8)
    sizes = [shape for name, shape in weights_of(dense) if len(shape) == 2 and "wpe" not in name]
    assert mix != "Q8_0" or packed == sum(packed_bytes(shape, "Q8_0") for shape in sizes)
    loaded = type(model).from_pretrained(tmp_path / "dense", quantization_config=hf_ctxopt.GgufQuantConfig(mix))
    model.save_pretrained(tmp_path / "packed")
    again = type(model).from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(again), logits(model))
    as_decoded(model, dense)


def test_large_matrices_that_stay_dense_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    class Scaled(nn.Linear):
        pass

    model = gpt2()
    model.transformer.h[0].mlp.c_fc = Scaled(1024, 1024, bias=False)
    types_of(model, Choice("Q8_0"))
    assert "1 matrices stay dense, 0.00 GB: transformer.h.0.mlp.c_fc.weight" in caplog.text
    caplog.clear()
    types_of(model, Choice("Q8_0", exclude=["h.0.mlp"]))
    assert "stay dense" not in caplog.text


def test_an_override_of_one_module_counts_for_those_that_share_its_tensor() -> None:
    model = t5()
    types = types_of(model, Choice("Q4_K_M", overrides={"lm_head": "Q8_0"}))
    assert {types[name] for name in ("shared", "encoder.embed_tokens", "lm_head")} == {"Q8_0"}
    with pytest.raises(hf_ctxopt.ConfigError, match="share a tensor"):
        types_of(model, Choice("Q4_K_M", overrides={"lm_head": "Q8_0", "shared": "Q6_K"}))


def test_a_tensor_that_one_module_may_not_pack_stays_dense() -> None:
    types = types_of(t5(), Choice("Q4_K_M", exclude=["decoder.embed_tokens"]))
    assert types
    assert not any(re.search(r"shared|embed_tokens|lm_head", name) for name in types)


def test_a_file_s_layers_that_the_model_looks_at_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "model.gguf", "gpt2", GPT2Config(**SMALL["gpt2"]))
    want = logits(load_gguf(tmp_path / "model.gguf")[0])
    monkeypatch.setattr(GPT2LMHeadModel, "_keep_in_fp32_modules", ["wte", "c_fc"])
    model, _ = load_gguf(tmp_path / "model.gguf")
    assert isinstance(model.transformer.h[0].mlp.c_fc, Conv1D)
    assert isinstance(model.transformer.h[0].mlp.c_proj, GgufLinear)
    assert type(model.lm_head) is nn.Linear  # it is the embedding's tensor
    torch.testing.assert_close(logits(model), want, rtol=1e-3, atol=1e-4)


def test_activations_that_are_not_floating_are_refused() -> None:
    packed = encode(torch.randn(4, 64), "Q8_0")
    with pytest.raises(hf_ctxopt.ConfigError, match="activations"):
        gguf_matmul(torch.zeros(2, 64, dtype=torch.uint8), packed, "Q8_0")


@pytest.mark.parametrize("rows", [1, 40])
def test_activations_of_other_columns_are_refused(rows: int) -> None:
    packed = encode(torch.randn(4, 256), "Q4_K")
    for wrong in (128, 512):
        with pytest.raises(hf_ctxopt.ConfigError, match=f"{wrong}: allowed is 256"):
            gguf_matmul(torch.zeros(rows, wrong), packed, "Q4_K")


def test_the_mark_of_a_dtype_lies_where_the_model_does() -> None:
    """A model on a GPU says so: `model.device` is its first parameter's."""
    model = nn.Sequential(nn.Linear(2, 2, device="meta"))
    mark_dtype(model, torch.bfloat16)
    first = next(model.parameters())
    assert (first.dtype, first.device.type, first.numel()) == (torch.bfloat16, "meta", 0)
