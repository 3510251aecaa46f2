"""Well-formed `.gguf` files that describe no model, or another than their tensors are of: refused, and at once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from hf_ctxopt.errors import CorruptFileError, UnsupportedModelError
from hf_ctxopt.weights.blocks import BLOCKS
from hf_ctxopt.weights.codecs import encode
from hf_ctxopt.weights.gguf_file import GgufFile
from hf_ctxopt.weights.gguf_load import load_gguf

LIMIT_S = 0.5
TENSORS = {"token_embd.weight": (96, 64), "output_norm.weight": (64,), "output.weight": (96, 64)} | {
    f"blk.{layer}.{name}.weight": shape
    for layer in range(2)
    for name, shape in {
        "attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64), "ffn_gate": (128, 64),
        "ffn_up": (128, 64), "ffn_down": (64, 128), "attn_norm": (64,), "ffn_norm": (64,),
    }.items()
}  # fmt: skip
KEYS: dict[str, Any] = {
    "block_count": 2, "context_length": 128, "embedding_length": 64, "feed_forward_length": 128,
    "attention.head_count": 4, "attention.head_count_kv": 2, "vocab_size": 96,
}  # fmt: skip


def write(path: Path, keys: dict[str, Any], shapes: dict[str, Any], architecture: str = "llama") -> None:
    """A small model with other keys (`None`: left out) and other shapes (`None`: left out)."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in {**KEYS, **keys}.items():
        key = f"{architecture}.{name}"
        if isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            (writer.add_int32 if value < 0 else writer.add_uint32)(key, value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_token_list([f"t{i}" for i in range(96)])
    random = np.random.default_rng(0)
    for name, shape in {**TENSORS, **shapes}.items():
        if shape is None:
            continue
        values = random.standard_normal(shape, np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


BAD_KEYS = [
    *((f"block_count={value}", {"block_count": value}) for value in (100_000, 200, -1, 0, 1, 2.0, "two", None)),
    *((f"heads={value}", {"attention.head_count": value}) for value in (0, 7, -4, "eight", [4, 4], 1 << 31)),
    *((f"kv_heads={value}", {"attention.head_count_kv": value}) for value in (0, 3, "two")),
    *((f"width={value}", {"embedding_length": value}) for value in (0, 128, "x", None)),
    *((f"inner={value}", {"feed_forward_length": value}) for value in (0, 96, "x")),
    *((f"base={value}", {"rope.freq_base": value}) for value in (0.0, -1.0, float("nan"), "x")),
    *((f"channels={value}", {"rope.dimension_count": value}) for value in (3, 32, "x")),
    *(
        (f"factor={value}", {"rope.scaling.type": "linear", "rope.scaling.factor": value})
        for value in ("x", -2.0, float("inf"))
    ),
    *((f"eps={value}", {"attention.layer_norm_epsilon": value}) for value in (float("nan"), -1.0, float("inf"))),
    *((f"key={value}", {"attention.key_length": value}) for value in (1, 32, 1 << 31)),
    *(
        (f"{key}={value}", {key: value})
        for key, value in (
            ("rope.scaling.type", [1, 2]),
            ("rope.scaling.type", 7),
            ("expert_count", [4, 4]),
            ("expert_count", "x"),
            ("expert_feed_forward_length", [4, 4]),
            ("expert_used_count", -1),
        )
    ),
    ("value=8", {"attention.value_length": 8}),
    ("epsilon", {"attention.layer_norm_epsilon": "x", "vocab_size": "many"}),
]
BAD_SHAPES = {
    "blk.0.attn_q.weight": (128, 64), "blk.0.ffn_down.weight": (64, 64), "blk.1.attn_norm.weight": (32,),
    "token_embd.weight": (64, 64), "rope_freqs.weight": (7,), "blk.1.ffn_up.weight": None,
    "blk.2.ffn_up.weight": (8, 64),
}  # fmt: skip


def refused(path: Path) -> None:
    begun = time.process_time()
    with pytest.raises(CorruptFileError) as caught:
        load_gguf(path)
    assert time.process_time() - begun < LIMIT_S
    assert caught.value.path == str(path)
    assert caught.value.reason


@pytest.fixture(scope="module", autouse=True)
def the_file_is_sound_otherwise(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Imports what loading needs, too: no refusal is measured with it."""
    path = tmp_path_factory.mktemp("sound") / "a.gguf"
    write(path, {"rope.dimension_count": 16, "rope.freq_base": 5e5}, {})
    model, _ = load_gguf(path)
    assert model(torch.arange(8).view(1, -1)).logits.isfinite().all()


@pytest.mark.parametrize(("title", "changed"), BAD_KEYS, ids=[title for title, _ in BAD_KEYS])
def test_bad_metadata(title: str, changed: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", changed, {})
    refused(tmp_path / "a.gguf")


@pytest.mark.parametrize("name", BAD_SHAPES)
def test_bad_shapes(name: str, tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", {}, {name: BAD_SHAPES[name]})
    refused(tmp_path / "a.gguf")


@pytest.mark.parametrize("half", [0x7E00, 0x7C00, 0xFC00])
@pytest.mark.parametrize("type", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_scales_that_are_not_finite(type: str, half: int, tmp_path: Path) -> None:
    """The last block's last fp16 number: NaN, infinity, its negative."""
    write(tmp_path / "a.gguf", {}, {})
    sound = GgufFile(tmp_path / "a.gguf")
    packed = encode(torch.randn(3, 512), type)
    row = BLOCKS[type]
    at = packed.numel() - row.nbytes + (208 if type == "Q6_K" else 2 if row.nbytes in (20, 24, 144, 176) else 0)
    packed.view(-1)[at : at + 2] = torch.tensor([half & 255, half >> 8], dtype=torch.uint8)
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama")
    writer.add_tensor("x", packed.numpy(), raw_dtype=gguf.GGMLQuantizationType[type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CorruptFileError, match="x .*has values that are not finite"):
        GgufFile(tmp_path / "b.gguf").check_finite("x")
    for name in sound.tensors:
        sound.check_finite(name)


def test_a_norm_that_is_not_finite(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", {}, {})
    place = GgufFile(tmp_path / "a.gguf").tensors["blk.0.attn_norm.weight"]
    data = bytearray((tmp_path / "a.gguf").read_bytes())
    data[place.offset : place.offset + 4] = np.float32("nan").tobytes()
    (tmp_path / "a.gguf").write_bytes(data)
    refused(tmp_path / "a.gguf")


def test_an_unknown_architecture_is_not_called_damaged(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", {}, {}, "nonsense")
    with pytest.raises(UnsupportedModelError, match="nonsense"):
        load_gguf(tmp_path / "a.gguf")
