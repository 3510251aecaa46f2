"""What a `.gguf` file says beside transformers' table: it is read back, or refused, and never lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, JambaConfig, JambaForCausalLM

import hf_ctxopt
from hf_ctxopt.errors import CtxoptError, UnsupportedModelError
from tests.weights.test_gguf_write import SMALL

IDS = torch.arange(2, 42).view(2, -1)


def made(family: str, **changes: Any) -> Any:
    """A random model with biases and norms that matter."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.08).add_(1.0 if parameter.dim() == 1 and "norm" in family else 0.0)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True}),
        ("qwen3", {"head_dim": 32}),
        ("phi3", {"partial_rotary_factor": 0.5}),
        ("phi3", {"sliding_window": 8}),
        ("gemma2", {"num_hidden_layers": 46, "hidden_size": 96, "intermediate_size": 32, "num_attention_heads": 2,
                    "num_key_value_heads": 1, "head_dim": 32, "query_pre_attn_scalar": 48}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)  # fmt: skip
def test_it_is_read_back(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = made(family, **changes)
    again, _ = hf_ctxopt.load_gguf(hf_ctxopt.save_gguf(model, tmp_path / "a.gguf"), torch.float32)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
    if "sliding_window" in changes:  # the window is felt at this length
        model.config.sliding_window = None
        assert not torch.allclose(logits(again), logits(made(family)), atol=1e-3)


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar"),
        ("gemma3_text", {"layer_types": ["full_attention", "full_attention"]}, "layer_types"),
    ],
)
def test_what_no_file_holds_is_refused(family: str, changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=told):
        hf_ctxopt.save_gguf(made(family, **changes), tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


def test_a_mistrals_window_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hf_ctxopt.save_gguf(made("mistral", sliding_window=8), tmp_path / "a.gguf")
    assert "window is not read back" in caplog.text


@pytest.mark.parametrize("kind", ["experts", "longrope"])
def test_files_that_would_be_read_as_another_model(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    extra = {"llama.expert_count": 4} if kind == "experts" else {}
    hf_ctxopt.save_gguf(made("llama"), path, metadata=extra)
    if kind == "longrope":
        reader, writer = gguf.GGUFReader(path), gguf.GGUFWriter(tmp_path / "b.gguf", "llama")
        for field in reader.fields.values():
            if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                writer.add_key_value(field.name, field.contents(), field.types[0])
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.add_tensor("rope_factors_long.weight", reader.tensors[0].data[:1].astype("float32"))
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            write()
        writer.close()
        path = tmp_path / "b.gguf"
    for read in (hf_ctxopt.load_gguf, lambda file: hf_ctxopt.plan(str(file), vram="8GiB")):
        with pytest.raises(UnsupportedModelError, match=kind):
            read(path)


def test_a_file_without_a_vocabulary_says_so(tmp_path: Path) -> None:
    path = hf_ctxopt.save_gguf(hf_ctxopt.quantize_(made("llama"), "Q8_0"), tmp_path / "a.gguf")
    with pytest.raises(CtxoptError, match="has no vocabulary"):
        hf_ctxopt.load(str(path))


def test_a_matrix_that_the_models_code_multiplies_itself_stays_dense() -> None:
    """Jamba's and Mamba's `dt_proj`, which fits a block from a hidden size of 512 on."""
    torch.manual_seed(0)
    config = JambaConfig(
        hidden_size=512, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, num_experts=2, use_mamba_kernels=False, attn_layer_period=2, attn_layer_offset=1,
    )  # fmt: skip
    model = JambaForCausalLM(config).eval()
    want = logits(model)
    hf_ctxopt.quantize_(model, "Q8_0")
    assert not any("dt_proj" in name for name in model.config.quantization_config.types)
    assert any("in_proj" in name for name in model.config.quantization_config.types)
    assert float((logits(model) - want).norm() / want.norm()) < 0.05
