"""Codecs against the `gguf` package: decode bit for bit, encode byte for byte where it has an encoder."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from hf_ctxopt.errors import ConfigError
from hf_ctxopt.weights.blocks import BLOCKS, packed_bytes
from hf_ctxopt.weights.codecs import SLAB_CPU, decode, encode

FLAT = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
# Byte offsets of the fp16 halves of a block; the random bytes there may not be inf or NaN.
HALVES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,)}
HALVES |= {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def reference(packed: torch.Tensor, name: str) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType[name]))


@pytest.mark.parametrize("name", BLOCKS)
def test_decode_is_bit_exact_on_random_blocks(name):
    row = BLOCKS[name]
    raw = np.random.default_rng(5).integers(0, 256, (24, 7 * row.nbytes), dtype=np.uint8)
    view = raw.reshape(-1, row.nbytes)
    for at in HALVES[name]:
        bad = view[:, at + 1] & 0x7C == 0x7C
        view[bad, at + 1] &= 0xBF
    packed = torch.from_numpy(raw)
    expected = reference(packed, name)
    assert expected.isfinite().all()
    actual = decode(packed, name)
    assert torch.equal(actual.view(torch.int32), expected.view(torch.int32))
    assert torch.equal(decode(packed, name, torch.bfloat16), expected.bfloat16())


@pytest.mark.parametrize("name", BLOCKS)
def test_table_agrees_with_gguf(name):
    row = BLOCKS[name]
    assert (row.block, row.nbytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(row.ggml)]
    assert gguf.GGMLQuantizationType(row.ggml).name == name
    assert packed_bytes((3, 512), name) == 3 * 512 // row.block * row.nbytes


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("kind", ["normal", "bfloat16", "heavy"])
def test_flat_encoders_agree_with_gguf(name, kind):
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(64, 1024, generator=generator) * 0.02
    if kind == "bfloat16":
        weight = weight.bfloat16().float()
    if kind == "heavy":
        weight = weight**3 * 1e3
    weight[3, :32], weight[4, :64], weight[5, 7] = 0, 0.25, 40.0
    packed = encode(weight, name)
    expected = torch.from_numpy(gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType[name]))
    assert (packed == expected).float().mean() >= 0.99
    ours, theirs = (decode(item, name).sub(weight).square().sum() for item in (packed, expected))
    assert ours <= theirs * (1 + 1e-6)


@pytest.mark.parametrize("name", BLOCKS)
def test_slabs_and_leading_dimensions_change_nothing(name):
    columns = 256
    weight = torch.randn(3, SLAB_CPU // columns // 2, columns, generator=torch.Generator().manual_seed(2))
    packed = encode(weight, name)
    assert packed.shape == (*weight.shape[:-1], columns // BLOCKS[name].block * BLOCKS[name].nbytes)
    rows = torch.cat([encode(part, name) for part in weight.view(-1, columns).split(100)])
    assert torch.equal(packed.view(rows.shape), rows)
    assert torch.equal(decode(packed, name).view(-1, columns), decode(rows, name))
    assert encode(weight[:0], name).shape == (0, *packed.shape[1:])
    assert torch.equal(encode(weight.mT.contiguous().mT, name), packed)


@pytest.mark.parametrize("name", BLOCKS)
def test_encode_decode_is_stable(name):
    """What a block holds exactly is kept: encoding a decoded weight again costs (next to) nothing."""
    weight = torch.randn(16, 512, generator=torch.Generator().manual_seed(3))
    once = decode(encode(weight, name), name)
    twice = decode(encode(once, name), name)
    assert (twice - once).norm() <= 0.12 * (once - weight).norm()


def test_bad_input_is_named():
    weight = torch.randn(2, 100)
    with pytest.raises(ConfigError, match="columns=100"):
        encode(weight, "Q4_0")
    with pytest.raises(ConfigError, match="columns=160"):
        encode(torch.randn(2, 160), "Q4_K")
    with pytest.raises(ConfigError, match="type='Q3_X'"):
        encode(weight, "Q3_X")
    with pytest.raises(ConfigError, match="weight"):
        encode(torch.full((1, 32), torch.nan), "Q8_0")
    with pytest.raises(ConfigError, match="weight"):
        encode(torch.full((1, 256), 1e6), "Q4_K")
    with pytest.raises(ConfigError, match="importance"):
        encode(torch.randn(2, 32), "Q4_0", torch.ones(31))
    with pytest.raises(ConfigError, match="bytes per row"):
        decode(torch.zeros(2, 19, dtype=torch.uint8), "Q4_0")
    with pytest.raises(ConfigError, match="packed"):
        decode(torch.zeros(2, 18), "Q4_0")
