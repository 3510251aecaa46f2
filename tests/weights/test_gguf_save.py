"""`save_gguf`: files written of whole models, read by `gguf`, by transformers and by `load_gguf`."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import gguf
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import hf_ctxopt
from hf_ctxopt.cli.models import load_model
from hf_ctxopt.errors import ConfigError, CtxoptError, UnsupportedModelError
from hf_ctxopt.weights.gguf_file import GgufFile
from tests.cli.tiny import END, START, TEMPLATE, tiny_tokenizer
from tests.weights.test_gguf_load import MIXTURE
from tests.weights.test_gguf_write import FAMILIES, SMALL, small

TEXT = "How much is three times four, and what are the words of this text?"
IDS = torch.arange(2, 30).view(2, -1)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_models_come_back_block_for_block(family: str, tmp_path: Path) -> None:
    model = hf_ctxopt.quantize_(small(family), "Q5_K_M")
    path = hf_ctxopt.save_gguf(model, tmp_path / "a.gguf")
    assert [item.name for item in tmp_path.iterdir()] == ["a.gguf"]
    again, tokenizer = hf_ctxopt.load_gguf(path)
    assert tokenizer is None
    assert GgufFile(path).mix == "Q5_K_M"
    held = dict(model.named_parameters())
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, held.pop(name)), name
    assert not held
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)
    hf_ctxopt.save_gguf(again, tmp_path / "b.gguf")
    assert (tmp_path / "b.gguf").stat().st_size == pytest.approx(path.stat().st_size, abs=256)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dense_weights_keep_their_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    model = small("qwen2").to(dtype)
    path = hf_ctxopt.save_gguf(model, tmp_path / "a.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    name = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[dtype]
    assert kinds["blk.0.ffn_up.weight"] == name
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    again, _ = hf_ctxopt.load_gguf(path, dtype)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=dtype)
    for read in (again, stock):
        for parameter, values in read.state_dict().items():
            assert torch.equal(values, model.state_dict()[parameter]), parameter


def test_a_mixture(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **MIXTURE)).eval()
    for parameter in model.parameters():  # experts and routers begin at what is in memory
        parameter.data.normal_(0.0, 0.05).add_(1.0 if parameter.dim() == 1 else 0.0)
    hf_ctxopt.quantize_(model, "Q8_0", exclude=["layers.0.mlp.experts"])
    again, _ = hf_ctxopt.load_gguf(hf_ctxopt.save_gguf(model, tmp_path / "a.gguf"))
    assert again.model.layers[1].mlp.experts.block_types == {"gate_up_proj": "Q8_0", "down_proj": "Q8_0"}
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)
    model.config.norm_topk_prob = False
    with pytest.raises(UnsupportedModelError, match="qwen3_moe"):
        hf_ctxopt.save_gguf(model, tmp_path / "b.gguf")


def trained(byte_level: bool) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer, or one as of a SentencePiece model, of a few words."""
    held = Tokenizer(models.BPE(byte_fallback=not byte_level, unk_token=None if byte_level else "<unk>"))
    special = [START, END] if byte_level else ["<unk>", START, END, *(f"<0x{byte:02X}>" for byte in range(256))]
    if byte_level:
        held.pre_tokenizer, held.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        held.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        held.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet = []
    trainer = trainers.BpeTrainer(
        vocab_size=290 if byte_level else 380, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    held.train_from_iterator([TEXT] * 4, trainer)
    if not byte_level:  # the trainer knows bytes only as special tokens
        state = json.loads(held.to_str())
        state["added_tokens"] = state["added_tokens"][:3]
        held = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=held, bos_token=START, eos_token=END, chat_template=TEMPLATE)


@pytest.mark.parametrize("byte_level", [True, False])
def test_a_tokenizer_comes_back(byte_level: bool, tmp_path: Path) -> None:
    family = "qwen2" if byte_level else "llama"
    config = AutoConfig.for_model(family, **{**SMALL, "vocab_size": 400, "pad_token_id": -1})
    model = AutoModelForCausalLM.from_config(config)
    tokenizer = trained(byte_level)
    path = hf_ctxopt.save_gguf(model, tmp_path / "a.gguf", tokenizer, metadata={"general.license": "mit"})
    file = GgufFile(path)
    assert file.metadata["general.license"] == "mit"
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 400
    assert file.metadata["tokenizer.ggml.model"] == ("gpt2" if byte_level else "llama")
    assert "tokenizer.ggml.padding_token_id" not in file.metadata
    _, again = hf_ctxopt.load_gguf(path)
    for text in (TEXT, "the words of the text é"):
        assert again(text, add_special_tokens=False).input_ids == tokenizer(text, add_special_tokens=False).input_ids
        assert again.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert again.chat_template == tokenizer.chat_template
    # transformers 5.17 gives a Llama's file the first token of a text for the last.
    for read in (again, hf_ctxopt.load(path)[1], load_model(str(path), device="cpu")[1]):
        assert (read.bos_token, read.eos_token) == (START, END)


def test_the_command_line_leaves_the_blocks_packed(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**SMALL, "vocab_size": 400}))
    hf_ctxopt.quantize_(model, "Q8_0")
    path = hf_ctxopt.save_gguf(model, tmp_path / "a.gguf", trained(byte_level=False))
    read, _ = load_model(str(path), device="cpu")
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        assert torch.equal(read.get_parameter(name), model.get_parameter(name))
    bare = hf_ctxopt.save_gguf(model, tmp_path / "bare.gguf")
    with pytest.raises(CtxoptError, match="tokenizer"):
        load_model(str(bare), device="cpu")


def test_a_tokenizer_that_contradicts_itself_or_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tokenizers` raises a bare Exception; planning a file without the package `gguf` ended in an ImportError."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **{**SMALL, "vocab_size": 400}))
    path = hf_ctxopt.save_gguf(model, tmp_path / "a.gguf", trained(byte_level=True))
    merge = GgufFile(path).metadata["tokenizer.ggml.merges"][0].encode()
    path.write_bytes(path.read_bytes().replace(merge, b"~" * (len(merge) - 2) + b" ~"))
    assert hf_ctxopt.load_gguf(path)[1] is None
    with pytest.raises(CtxoptError, match="tokenizer"):
        load_model(str(path), device="cpu")
    monkeypatch.setitem(sys.modules, "gguf", None)
    for read in (hf_ctxopt.load_gguf, lambda path: hf_ctxopt.plan(path, vram="8GiB")):
        with pytest.raises(CtxoptError, match="pip install"):
            read(path)


@pytest.mark.real
def test_smollm2s_tokenizer(smollm2, tmp_path: Path) -> None:
    config = copy.deepcopy(smollm2.model.config)
    config.num_hidden_layers = 1
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    path = hf_ctxopt.save_gguf(model, tmp_path / "a.gguf", smollm2.tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in ("The capital of France is Paris.", "naïve  \n\t x = 12345;", "<|im_start|>user\nHi<|im_end|>"):
        assert again(text).input_ids == smollm2.tokenizer(text).input_ids


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    other = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_layer=1, n_embd=64, n_head=2))
    with pytest.raises(UnsupportedModelError, match="gpt2"):
        hf_ctxopt.save_gguf(other, path)
    model = small("llama")
    with pytest.raises(UnsupportedModelError, match="tokenizer"):
        hf_ctxopt.save_gguf(model, path, object())
    with pytest.raises(UnsupportedModelError, match="96 tokens"):
        hf_ctxopt.save_gguf(model, path, tiny_tokenizer())
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(ConfigError, match="meta"):
        hf_ctxopt.save_gguf(model, path)
    assert not list(tmp_path.iterdir())
