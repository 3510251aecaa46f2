"""The Triton paged decode, through Triton's interpreter, against its float32 reference."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from hf_ctxopt.errors import ConfigError
from hf_ctxopt.kernels import paged_triton
from hf_ctxopt.kernels.paged import PagedStates, SealedPages, decode_reference, unpack
from hf_ctxopt.kernels.paged_triton import Launch, decode, workspace_bytes


@dataclass
class Problem:
    """Random pages in random order, and rows of ragged lengths over them."""

    heads: int = 4
    kv_heads: int = 2
    key_dim: int = 32
    value_dim: int = 32
    size: int = 16
    bits: tuple[int, int] | None = None
    lengths: tuple[int, ...] = (70, 5, 129)
    sinks: int = 0  # with sinks, the first page is the sink page and met by a second query
    jump: int = 0
    pad: int = 0
    softcap: float | None = None
    sink_logits: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(self.seed)
        batch, variants = len(self.lengths), 2 if self.sinks else 1
        entries = [-(-length // self.size) for length in self.lengths]
        raw, width = sum(entries) + 3, max(entries) + 2

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw).to(self.dtype)

        self.query = normal(batch, variants, self.heads, self.key_dim)
        self.logits = torch.randn(self.heads, generator=draw) if self.sink_logits else None
        keys = normal(self.kv_heads, raw, self.size, self.key_dim)
        values = normal(self.kv_heads, raw, self.size, self.value_dim) + 0.5
        order = torch.randperm(raw, generator=draw).tolist()
        self.rows = torch.zeros(batch, 8 + 2 * variants, dtype=torch.int32)
        self.table = torch.full((batch, width), 2**30, dtype=torch.int32)  # columns past the row's are never used
        used = torch.zeros(raw, self.size, dtype=torch.bool)
        for row, length in enumerate(self.lengths):
            count = entries[row]
            sealed = (min(1, count - 1), count - 1) if self.bits else (0, 0)
            sink_entries = 1 if self.sinks else 0
            mine = [order.pop() for _ in range(count)]
            ranges = [self.pad, length + self.jump * self.size]
            if self.sinks:
                ranges = [0, self.sinks, (1 + self.jump) * self.size + 3, length + self.jump * self.size]
            state = [count, *sealed, sink_entries, self.jump if self.sinks else 0, 0, 0, 0, *ranges]
            self.rows[row] = torch.tensor(state)
            for entry, page in enumerate(mine):
                self.table[row, entry] = -1 - page if sealed[0] <= entry < sealed[1] else page
                used[page, : max(0, length - entry * self.size)] = True
        keys[:, ~used], values[:, ~used] = torch.nan, torch.nan
        self.pages = PagedStates(keys, values)
        if self.bits:
            clean_keys, clean_values = torch.nan_to_num(keys), torch.nan_to_num(values)
            k_codes, k_scales = encode(clean_keys, self.bits[0], 2)
            v_codes, v_scales = encode(clean_values, self.bits[1], 3)
            self.pages = PagedStates(keys, values, SealedPages(k_codes, k_scales, v_codes, v_scales))

    def errors(self, launch: Launch | None = None, again: bool = False) -> tuple[float, float]:
        """Relative errors of the output and of the shares; `again` without shares must give the same output."""
        scaling = self.key_dim**-0.5
        want, want_shares = decode_reference(
            self.query, self.pages, self.table, self.rows, scaling, self.softcap, self.logits
        )
        out = torch.full((len(self.lengths), self.heads, self.value_dim), torch.nan, dtype=self.dtype)
        shares = torch.full_like(want_shares, torch.nan)
        size = workspace_bytes(self.query, self.pages, self.table.shape[1], True, launch)
        workspace = torch.full((size // 4,), torch.nan).view(torch.uint8)
        arguments = (self.query, self.pages, self.table, self.rows, scaling, self.softcap, self.logits)
        got = decode(*arguments, out=out, shares=shares, workspace=workspace, launch=launch)
        assert not again or torch.equal(got, decode(*arguments, launch=launch))
        return relative(got, want), relative(shares, want_shares)


def relative(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def encode(states: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of pages `(heads, pages, size, channels)`, minimum and maximum over `dim`."""
    zero = states.float().amin(dim, keepdim=True).half()
    span = states.float().amax(dim, keepdim=True) - zero.float()
    scale = (span / (2**bits - 1)).clamp_min(6.2e-5).half()
    codes = ((states.float() - zero.float()) / scale.float()).round().clamp(0, 2**bits - 1).to(torch.uint8)
    planes = codes.chunk(8 // bits, dim=-1)
    packed = torch.stack([plane << (bits * index) for index, plane in enumerate(planes)]).sum(0).to(torch.uint8)
    return packed, torch.stack([scale.squeeze(dim), zero.squeeze(dim)], dim=2)


def test_unpack_is_the_inverse_of_packing() -> None:
    states = torch.randn(2, 3, 16, 32)
    for bits in (8, 4, 2):
        codes, scales = encode(states, bits, 3)
        back = unpack(codes, bits) * scales[:, :, 0, :, None].float() + scales[:, :, 1, :, None].float()
        assert (back - states).abs().max() <= scales[:, :, 0].max() * 0.51 + 2e-3


@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 64), (32, 128)])
@pytest.mark.parametrize("heads", [(2, 2), (8, 2), (7, 1), (8, 1)])
def test_raw_pages(dims: tuple[int, int], heads: tuple[int, int]) -> None:
    case = Problem(*heads, *dims, seed=dims[0] + heads[0])
    assert max(case.errors(again=heads[1] == 2)) < 1e-5


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (2, 2), (8, 4), (2, 8)])
@pytest.mark.parametrize(
    ("dims", "heads", "dtype"),
    [
        ((64, 64), (4, 2), torch.float32),
        ((80, 96), (2, 2), torch.float16),
        ((96, 80), (8, 1), torch.float32),
    ],
)
def test_sealed_pages(
    bits: tuple[int, int], dims: tuple[int, int], heads: tuple[int, int], dtype: torch.dtype
) -> None:
    case = Problem(*heads, *dims, bits=bits, lengths=(70, 5), dtype=dtype, seed=sum(bits) + dims[0])
    assert max(case.errors()) < 2e-3


@pytest.mark.parametrize(
    ("dims", "bits"), [((128, 128), None), ((192, 128), (8, 4)), ((256, 256), None), ((256, 256), (4, 2))]
)
def test_wide_heads(dims: tuple[int, int], bits: tuple[int, int] | None) -> None:
    case = Problem(4, 2, *dims, bits=bits, lengths=(37, 18), seed=dims[0])
    assert max(case.errors()) < (1e-5 if bits is None else 2e-3)


@pytest.mark.parametrize(
    ("size", "bits"), [(16, None), (32, None), (64, None), (16, (4, 4)), (32, (8, 8)), (64, (4, 4))]
)
@pytest.mark.parametrize(
    "options",
    [{"sinks": 4, "jump": 5}, {"softcap": 3.0}, {"sink_logits": True}, {"pad": 9, "lengths": (70, 9, 40)}],
    ids=lambda options: "-".join(options),
)
def test_variants(size: int, bits: tuple[int, int] | None, options: dict[str, object]) -> None:
    case = Problem(4, 2, size=size, bits=bits, seed=size, **options)
    assert max(case.errors()) < (1e-5 if bits is None else 2e-3)


@pytest.mark.parametrize("splits", [1, 3, 10])
@pytest.mark.parametrize("tokens", [16, 64])
def test_launches_agree(splits: int, tokens: int) -> None:
    raw = Problem(lengths=(97, 1, 48), seed=splits)
    assert max(raw.errors(Launch(splits, tokens, 4, 2), again=tokens == 64)) < 1e-5
    sealed = Problem(bits=(8, 4), lengths=(97, 1, 48), seed=splits)
    assert max(sealed.errors(Launch(max(2, splits), tokens, 1, 2), again=tokens == 16)) < 2e-3


@pytest.mark.parametrize(("cores", "room"), [(132, 228 << 10), (36, 100 << 10), (1, 64 << 10)])
@pytest.mark.parametrize("bits", [None, (8, 4), (4, 4)])
def test_chosen_launches_fit_the_gpu(
    cores: int, room: int, bits: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_triton, "multiprocessors", lambda device: cores)
    monkeypatch.setattr(paged_triton, "shared_memory", lambda device: room)
    case = Problem(key_dim=128, value_dim=128, size=32, bits=bits, lengths=(40,), dtype=torch.float16)
    for pairs in (1, 8, 64, 1000):
        for entries in (1, 64, 1024, 4096):
            launch = paged_triton.choose(case.pages, pairs, entries)
            assert (1 if bits is None else 2) <= launch.splits <= max(2, entries, 24)
            assert launch.tokens >= 32
            # a tile of K and V for each of two programs, or for the one that always must fit
            assert launch.tokens * 512 * (2 if bits is None else 1) <= room
            # a few rows fill the GPU, many rows do not multiply the programs
            if entries == 4096:
                assert launch.splits * pairs >= cores
                assert pairs < 64 or launch.splits * pairs <= max(48 * pairs, 8 * cores)


def test_empty_rows_give_zeros() -> None:
    case = Problem(lengths=(40, 33), sink_logits=True)
    case.rows[0] = 0
    case.rows[1, 8:] = torch.tensor([7, 7])
    shares = torch.full((2, 4, case.table.shape[1]), torch.nan)
    out = decode(case.query, case.pages, case.table, case.rows, 0.2, sink_logits=case.logits, shares=shares)
    assert not out.any()
    assert not shares.any()
    assert not decode(case.query, case.pages, case.table, case.rows, 0.2).any()


def test_refuses_what_it_cannot_take() -> None:
    case = Problem(size=16)
    call = (case.pages, case.table, case.rows, 0.2)
    with pytest.raises(ConfigError, match="contiguous"):
        decode(case.query.repeat(1, 1, 1, 2)[..., ::2], *call)
    with pytest.raises(ConfigError, match="variants"):
        decode(case.query.repeat(1, 2, 1, 1), *call)
    with pytest.raises(ConfigError, match="workspace"):
        decode(case.query, *call, workspace=torch.empty(8, dtype=torch.uint8))
    with pytest.raises(ConfigError, match="page_size"):
        Problem(size=8, lengths=(20,)).errors()
