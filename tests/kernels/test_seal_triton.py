"""Sealing and gathering pages in Triton, through its interpreter: equal to the codec and to the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from hf_ctxopt.errors import ConfigError
from hf_ctxopt.kernels.gather import gather_reference
from hf_ctxopt.kernels.gather_triton import gather
from hf_ctxopt.kernels.paged import PagedStates, SealedPages
from hf_ctxopt.kernels.seal_triton import seal
from hf_ctxopt.pages.codec import Codec

HEADS, OPEN, SEALED = 2, 4, 5
PAIRS = [(2, 0), (0, 3), (-1, 1), (3, 4)]  # the third does nothing


def pages(
    bits: tuple[int, int], dims: tuple[int, int], size: int, dtype: torch.dtype = torch.float32, spread: float = 1.0
) -> PagedStates:
    """Random open pages with outlying channels; sealed ones hold 77 everywhere."""
    torch.manual_seed(size + sum(dims))
    raw = [(spread * torch.randn(HEADS, OPEN, size, dim) * torch.rand(dim).exp2().square()).to(dtype) for dim in dims]
    made: list[Tensor] = []
    for codec, dim in ((Codec(bits[0], True), dims[0]), (Codec(bits[1], False), dims[1])):
        made.append(torch.full((HEADS, SEALED, *codec.code_shape(size, dim)), 77, dtype=torch.uint8))
        made.append(torch.full((HEADS, SEALED, *codec.scale_shape(size, dim)), 77.0, dtype=torch.float16))
    return PagedStates(raw[0], raw[1], SealedPages(*made))


def expected(before: PagedStates, bits: tuple[int, int]) -> list[Tensor]:
    """Codes and scales after sealing, by the codec."""
    assert before.sealed is not None
    want = [tensor.clone() for tensor in vars(before.sealed).values()]
    for source, target in PAIRS:
        if source >= 0:
            want[0][:, target], want[1][:, target] = Codec(bits[0], True).encode(before.raw_keys[:, source])
            want[2][:, target], want[3][:, target] = Codec(bits[1], False).encode(before.raw_values[:, source])
    return want


def margins(bits: tuple[int, int]) -> tuple[float, float]:
    """What the codec leaves out of each range."""
    return Codec(bits[0], True).margin, Codec(bits[1], False).margin


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (2, 2), (8, 4), (2, 8)])
@pytest.mark.parametrize(("dims", "size"), [((64, 64), 32), ((80, 96), 16), ((192, 128), 16), ((64, 256), 64)])
def test_codes_equal_the_codec(bits: tuple[int, int], dims: tuple[int, int], size: int) -> None:
    case = pages(bits, dims, size, torch.float16)
    want = expected(case, bits)
    seal(case, torch.tensor(PAIRS, dtype=torch.int32), margins(bits))
    assert case.sealed is not None
    for got, wanted in zip(vars(case.sealed).values(), want, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("spread", [0.0, 1e-7, 1e6])
def test_ranges_beyond_float16(spread: float) -> None:
    case = pages((4, 8), (64, 64), 16, spread=spread)
    want = expected(case, (4, 8))
    seal(case, torch.tensor(PAIRS, dtype=torch.int32))
    assert case.sealed is not None
    for got, wanted in zip(vars(case.sealed).values(), want, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("bits", [None, (8, 8), (4, 2)])
@pytest.mark.parametrize(("dims", "size"), [((64, 64), 32), ((80, 96), 16), ((256, 192), 16)])
def test_gather_is_the_reference(bits: tuple[int, int] | None, dims: tuple[int, int], size: int) -> None:
    case = pages(bits or (8, 8), dims, size)
    row = [3, 1, 0, 2, 0]
    if bits is None:
        case = PagedStates(case.raw_keys, case.raw_values)
    else:
        seal(case, torch.tensor(PAIRS, dtype=torch.int32))
        row = [1, -1, -4, 2, -5]
    table = torch.tensor([9999, *row, 9999], dtype=torch.int32)
    first, count = 2, 3

    def buffers() -> list[Tensor]:  # parts of wider ones: what lies beside them must stay
        return [torch.full((HEADS, count * size + 7, dim), torch.nan) for dim in dims]

    got, want = buffers(), buffers()
    gather(case, table, first, count, *[buffer[:, 4:-3] for buffer in got])
    gather_reference(case, table, first, count, *[buffer[:, 4:-3] for buffer in want])
    for mine, reference in zip(got, want, strict=True):
        assert reference.isfinite().sum() == HEADS * count * size * reference.shape[-1]
        torch.testing.assert_close(mine, reference, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_what_was_sealed_comes_back() -> None:
    case = pages((8, 8), (64, 64), 16, torch.float16)
    seal(case, torch.tensor([[2, 0]], dtype=torch.int32))
    keys, values = (torch.empty(HEADS, 16, 64, dtype=torch.float16) for _ in range(2))
    gather(case, torch.tensor([-1], dtype=torch.int32), 0, 1, keys, values)
    assert (keys - case.raw_keys[:, 2]).abs().max() < 0.05
    assert (values - case.raw_values[:, 2]).abs().max() < 0.1


def test_refuses_what_does_not_belong_together() -> None:
    case = pages((8, 8), (64, 64), 16)
    pairs = torch.tensor(PAIRS, dtype=torch.int32)
    seal(case, pairs[:0])
    with pytest.raises(ConfigError, match="pairs"):
        seal(case, pairs.long())
    with pytest.raises(ConfigError, match="no sealed pages"):
        seal(PagedStates(case.raw_keys, case.raw_values), pairs)
    with pytest.raises(ConfigError, match="page_size"):
        seal(pages((8, 8), (64, 64), 24), pairs)
    assert case.sealed is not None
    wide = SealedPages(case.sealed.k_codes.repeat(1, 1, 1, 2), *list(vars(case.sealed).values())[1:])
    with pytest.raises(ConfigError, match="kv_bits"):
        seal(PagedStates(case.raw_keys, case.raw_values, wide), pairs)
    buffers = [torch.empty(HEADS, 16, 64) for _ in range(2)]
    row = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ConfigError, match="count"):
        gather(case, row, 3, 1, *buffers)
    with pytest.raises(ConfigError, match="keys"):
        gather(case, row, 0, 2, *buffers)
