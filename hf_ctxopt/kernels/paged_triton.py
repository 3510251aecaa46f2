"""Decode attention over a page table as Triton kernels: split the pages, read each once, merge the splits.

Everything that decides a launch is static (shapes, bits, the GPU), nothing waits for the device, and all state of a
row is read from device tensors: a captured graph replays the launches while lengths grow.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from triton import __version__ as triton_version
from triton import language as tl
from triton.runtime.jit import JITFunction

from hf_ctxopt.errors import ConfigError
from hf_ctxopt.kernels.paged import PagedStates, variants_of
from hf_ctxopt.kernels.paged_combine_triton import combine_kernel, shares_kernel
from hf_ctxopt.kernels.paged_split_triton import split_kernel

INTERPRETED = not isinstance(split_kernel, JITFunction)
PAGE_SIZES = (16, 32, 64, 128)
_OVERHEAD = 1.3  # shared memory of a program over that of its tile of keys and values


@dataclass(frozen=True)
class Launch:
    """How the split kernel is started.

    Args:
        splits: programs of one row and KV head.
        tokens: raw tokens of one step of a program.
        warps: warps of a program.
        stages: loads in flight, in steps.
        registers: most registers of a thread; `None` leaves it to the compiler.
    """

    splits: int
    tokens: int
    warps: int
    stages: int
    registers: int | None = None


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the GPU; 2 in the interpreter."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def starts_early(device: torch.device) -> bool:
    """Whether a launch may begin before the one it depends on has ended (compute capability 9 and later).

    Triton 3.4 has the functions and cannot compile them.
    """
    version = tuple(int(part) for part in triton_version.split(".")[:2])
    if INTERPRETED or device.type != "cuda" or version < (3, 6) or not hasattr(tl.extra.cuda, "gdc_wait"):
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory of one multiprocessor; 100 KiB, as on consumer cards, where it cannot be asked."""
    if device.type != "cuda":
        return 100 << 10
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_multiprocessor", 100 << 10))


def choose(pages: PagedStates, pairs: int, entries: int) -> Launch:
    """The launch for `pairs` of rows and KV heads and a table of `entries` columns.

    The splits follow from the width of the table, the work of each from the row state on the device: a table with
    room to grow only costs programs that end at once. The rules and their numbers come from a sweep on one H200
    (`benchmarks/gpu/attention.py` times what they choose); multiprocessors and shared memory scale them down.
    """
    cores, room = multiprocessors(pages.raw_keys.device), shared_memory(pages.raw_keys.device)
    rule = _raw_launch if pages.sealed is None else _mixed_launch
    return rule(pages, max(1, pairs), entries, cores, room)


def _tile(pages: PagedStates, tokens: int) -> int:
    """Bytes of shared memory of a program that reads `tokens` raw tokens at a time."""
    channels = pages.raw_keys.shape[-1] + pages.raw_values.shape[-1]
    return int(tokens * channels * pages.raw_keys.element_size() * _OVERHEAD)


def _raw_launch(pages: PagedStates, pairs: int, entries: int, cores: int, room: int) -> Launch:
    # Two programs on each multiprocessor keep the memory busy; more only add partial results to merge.
    tokens, size = 128, pages.page_size
    while tokens > max(32, size) and 2 * _tile(pages, tokens) > room:
        tokens //= 2
    tiles = -(-entries * size // tokens)
    splits = max(1, min(2 * cores // pairs, tiles))
    return Launch(splits, tokens, 8 if tokens >= 128 else 4, 2)


def _mixed_launch(pages: PagedStates, pairs: int, entries: int, cores: int, room: int) -> Launch:
    # Unpacking is bound by registers: as many small programs as they allow (128 for each thread up to 4 bits), in
    # one wave. A program reads either raw or sealed pages: of few splits, one for the raw pages would be a waste.
    size, wide = pages.page_size, max(pages.k_bits, pages.v_bits) > 4
    tokens = max(32, size)
    fit = max(1, min(6 if wide else 8, room // _tile(pages, tokens)))
    wave = max(1, fit * cores // pairs)
    splits = max(wave, min(wave * -(-24 // wave), entries // 4))
    splits = max(2, min(splits, -(-entries // 2), 512))
    short = entries <= 2 * splits and 2 * pairs * splits <= fit * cores
    # A cap on registers decides how many programs fit; tiles wider than those measured would spill under it.
    measured = size * max(pages.raw_keys.shape[-1], pages.raw_values.shape[-1]) <= 4096
    registers = (168 if wide else 128) if measured and not short else None
    return Launch(splits, tokens, 4 if short else 2, 3 if wide else 2, registers)


def workspace_bytes(
    query: Tensor, pages: PagedStates, entries: int, shares: bool, launch: Launch | None = None
) -> int:
    """Bytes of scratch memory that `decode` needs; they need no initial value."""
    batch, variants, heads, _ = query.shape
    launch = launch or choose(pages, batch * pages.raw_keys.shape[0], entries)
    rows = batch * variants * heads
    return 4 * rows * (launch.splits * (pages.raw_values.shape[-1] + 1) + (entries if shares else 0))


def decode(
    query: Tensor,
    pages: PagedStates,
    table: Tensor,
    rows: Tensor,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    out: Tensor | None = None,
    shares: Tensor | None = None,
    workspace: Tensor | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """Attention of one token per row over the pages of its row; see `paged.decode_reference` for the layout.

    Args:
        query: `(batch, variants, heads, key_dim)`.
        pages: the layer's pages.
        table: int32 `(batch, entries)`.
        rows: int32 `(batch, 8 + 2 * variants)`.
        scaling: factor on the scores.
        softcap: `softcap * tanh(score / softcap)`, or `None`.
        sink_logits: `(heads,)`, an extra logit per head, or `None`.
        out: `(batch, heads, value_dim)`, filled and returned; made here if `None`.
        shares: float32 `(batch, heads, entries)`, filled with each entry's share of the attention if given.
        workspace: uint8, `workspace_bytes` long at least; made here if `None`. Calls that may overlap need their own.
        launch: overrides the choice of `choose`.

    Returns:
        `(batch, heads, value_dim)` in the query's dtype.
    """
    variants = _check(query, pages, table, rows)
    batch, _, heads, key_dim = query.shape
    kv_heads, raw_pages, size, value_dim = pages.raw_values.shape
    entries, groups = table.shape[1], heads // kv_heads
    launch = launch or choose(pages, batch * kv_heads, entries)
    if out is None:
        out = query.new_empty(batch, heads, value_dim)
    needed = workspace_bytes(query, pages, entries, shares is not None, launch)
    if workspace is None:
        workspace = torch.empty(needed, dtype=torch.uint8, device=query.device)
    if workspace.numel() < needed:
        raise ConfigError("workspace", workspace.numel(), f"at least {needed} bytes")
    parts = batch * variants * heads * launch.splits
    scratch = workspace[:needed].view(torch.float32)
    partial, lse, page_lse = (
        scratch[: parts * value_dim],
        scratch[parts * value_dim :],
        scratch[parts * (value_dim + 1) :],
    )
    sealed = pages.sealed
    if sealed is None:
        # Never read: the kernel is compiled without that part.
        codes = (table, table, table, table)
    else:
        # 16-bit units of codes and, for the keys, 32-bit words of two channels' scales
        k_codes, v_codes = sealed.k_codes.view(torch.int16), sealed.v_codes.view(torch.int16)
        codes = (k_codes, sealed.k_scales.view(torch.int32), v_codes, sealed.v_scales)
    units = (key_dim * pages.k_bits // 16, value_dim * pages.v_bits // 16)
    common = {"V": variants, "G": groups}
    early = launch.warps < 8 and starts_early(query.device)  # measured: with 8 warps it costs more than it saves
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    if launch.registers is not None and not INTERPRETED:
        options["maxnreg"] = launch.registers
    split_kernel[(batch * kv_heads, launch.splits)](
        query, pages.raw_keys, pages.raw_values, *codes, table, rows, partial, lse, page_lse, float(scaling),
        float(softcap or 1.0), raw_pages, 0 if sealed is None else sealed.k_codes.shape[1], entries, rows.shape[1],
        H=kv_heads, P=size, DK=key_dim, DV=value_dim, DKP=_pad(key_dim), DVP=_pad(value_dim),
        ROWS=_pad(variants * groups), COLS=_pad(variants * groups, 8), BN=launch.tokens, KB=pages.k_bits,
        VB=pages.v_bits, UK=units[0], UV=units[1],
        UKP=_pad(units[0]), UVP=_pad(units[1]), CAP=softcap is not None, SHARES=shares is not None,
        FAST=not INTERPRETED, PRECISION="ieee", EARLY=early, **common, **options,
    )  # fmt: skip
    logit = lse if sink_logits is None else sink_logits
    common |= {
        "SPLITS": launch.splits,
        "HEADS": heads,
        "PARTS": _pad(launch.splits * variants),
        "SINK": sink_logits is not None,
    }
    block = min(_pad(value_dim), 64)
    combine_kernel[(batch * heads, -(-value_dim // block))](
        partial, lse, logit, out, DV=value_dim, CHUNK=min(common["PARTS"], 64), BD=block, EARLY=early,
        num_warps=4, **({"launch_pdl": True} if early else {}), **common,
    )  # fmt: skip
    if shares is not None:
        shares_kernel[(batch * heads, -(-entries // 1024))](
            page_lse, lse, logit, rows, shares, entries, rows.shape[1], BE=1024, num_warps=4, **common
        )
    return out


def _pad(size: int, least: int = 16) -> int:
    """The next power of two that a matrix product takes."""
    return max(least, 1 << max(size - 1, 0).bit_length())


def _check(query: Tensor, pages: PagedStates, table: Tensor, rows: Tensor) -> int:
    """The number of variants; `ConfigError` if the kernels cannot take these tensors."""
    variants = variants_of(rows)
    kv_heads, size = pages.raw_keys.shape[0], pages.page_size
    tensors = [query, pages.raw_keys, pages.raw_values, table, rows]
    if pages.sealed is not None:
        tensors += vars(pages.sealed).values()
        for bits, dim in ((pages.k_bits, query.shape[-1]), (pages.v_bits, pages.raw_values.shape[-1])):
            if bits not in (2, 4, 8) or dim * bits % 16:
                raise ConfigError("kv_bits", bits, f"8, 4 or 2 bits that fill 16-bit units of head size {dim}")
    if size not in PAGE_SIZES:
        raise ConfigError("page_size", size, f"one of {PAGE_SIZES} for the GPU kernels")
    if variants > 4 or query.shape[1] != variants or query.shape[2] % kv_heads:
        raise ConfigError(
            "query", tuple(query.shape), f"(batch, {variants} variants of at most 4, n * {kv_heads}, dim)"
        )
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ConfigError("pages", "strided tensors", "contiguous tensors")
    return variants
