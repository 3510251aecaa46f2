# mypy: disable-error-code="misc, no-untyped-def, untyped-decorator, assignment"
"""Encoding full open pages into sealed ones, K and V of all heads in one launch.

The reference is `pages/codec.py`, `Codec.encode`: codes and scales are equal to the bit (the torch operations on the
CPU; on a GPU torch divides by a number through its reciprocal).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_ctxopt.errors import ConfigError
from hf_ctxopt.kernels.paged import PagedStates

LIMIT = tl.constexpr(65504.0)  # the largest finite float16
LEAST_SCALE = tl.constexpr(6.2e-5)  # the smallest normal float16, as in the codec
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it leaves no fraction, ties go to even


@triton.jit
def _scale_and_zero(low, high, BITS: tl.constexpr, MARGIN: tl.constexpr):
    """Float16 scale and zero of the range `[low, high]`, less the share `MARGIN` of it at each end."""
    if MARGIN > 0:
        margin = (high - low) * MARGIN
        low, high = low + margin, high - margin
    zero = tl.minimum(tl.maximum(low, -LIMIT), LIMIT).to(tl.float16)
    step = tl.div_rn(high - zero.to(tl.float32), tl.full(low.shape, (1 << BITS) - 1, tl.float32))
    return tl.minimum(tl.maximum(step, LEAST_SCALE), LIMIT).to(tl.float16), zero


@triton.jit
def _codes(states, scale, zero, BITS: tl.constexpr):
    """Codes of float32 states as int32; scale and zero are those that will be read back."""
    place = tl.div_rn(states - zero.to(tl.float32), tl.broadcast_to(scale.to(tl.float32), states.shape))
    place = tl.minimum(tl.maximum(place, 0.0), float((1 << BITS) - 1))
    return ((place + ROUNDER) - ROUNDER).to(tl.int32)


@triton.jit
def _encode(
    states, codes, scales, P: tl.constexpr, DIM: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr,
    PAD: tl.constexpr, OVER_TOKENS: tl.constexpr, MARGIN: tl.constexpr,
):  # fmt: skip
    """One page of one head; `WIDTH` bytes a token, whose plane `i` is channels `[i * WIDTH, (i + 1) * WIDTH)`."""
    PLANES: tl.constexpr = 8 // BITS
    t, e = tl.arange(0, P), tl.arange(0, PAD)
    used = (t >= 0)[:, None] & (e < WIDTH)[None, :]
    planes = ()
    for i in tl.static_range(PLANES):
        at = states + t[:, None] * DIM + i * WIDTH + e[None, :]
        planes = planes + (tl.load(at, mask=used, other=0.0).to(tl.float32),)
    packed = tl.zeros((P, PAD), tl.int32)
    if OVER_TOKENS:
        for i in tl.static_range(PLANES):
            scale, zero = _scale_and_zero(tl.min(planes[i], 0), tl.max(planes[i], 0), BITS, MARGIN)
            tl.store(scales + i * WIDTH + e, scale, mask=e < WIDTH)
            tl.store(scales + DIM + i * WIDTH + e, zero, mask=e < WIDTH)
            packed |= _codes(planes[i], scale[None, :], zero[None, :], BITS) << (BITS * i)
    else:
        low, high = tl.full((P,), float("inf"), tl.float32), tl.full((P,), float("-inf"), tl.float32)
        for i in tl.static_range(PLANES):
            low = tl.minimum(low, tl.min(tl.where(used, planes[i], float("inf")), 1))
            high = tl.maximum(high, tl.max(tl.where(used, planes[i], float("-inf")), 1))
        scale, zero = _scale_and_zero(low, high, BITS, MARGIN)
        tl.store(scales + t, scale)
        tl.store(scales + P + t, zero)
        for i in tl.static_range(PLANES):
            packed |= _codes(planes[i], scale[:, None], zero[:, None], BITS) << (BITS * i)
    tl.store(codes + t[:, None] * WIDTH + e[None, :], packed.to(tl.uint8), mask=used)


@triton.jit(do_not_specialize=["raw_pages", "sealed_pages"])
def seal_kernel(
    raw_keys, raw_values, k_codes, k_scales, v_codes, v_scales, pairs, raw_pages, sealed_pages, P: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, WK: tl.constexpr, WV: tl.constexpr,
    WKP: tl.constexpr, WVP: tl.constexpr, MK: tl.constexpr, MV: tl.constexpr,
):  # fmt: skip
    """Grid `(pairs, kv_heads, 2)`: K, then V."""
    pair, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    source, target = tl.load(pairs + 2 * pair), tl.load(pairs + 2 * pair + 1)
    if source >= 0:
        raw, sealed = head * raw_pages + source, head * sealed_pages + target
        if tl.program_id(2) == 0:
            _encode(
                raw_keys + raw * (P * DK), k_codes + sealed * (P * WK), k_scales + sealed * (2 * DK), P, DK, KB, WK,
                WKP, True, MK,
            )  # fmt: skip
        else:
            _encode(
                raw_values + raw * (P * DV), v_codes + sealed * (P * WV), v_scales + sealed * (2 * P), P, DV, VB, WV,
                WVP, False, MV,
            )  # fmt: skip


def seal(pages: PagedStates, pairs: Tensor, margins: tuple[float, float] = (0.0, 0.0)) -> None:
    """Encode open pages into sealed ones of the same layer.

    Args:
        pages: the layer's pages; `pages.sealed` is written in place.
        pairs: contiguous int32 `(n, 2)`, each an open page that is full and the sealed page it becomes; a pair with a
            negative open page does nothing, so that a captured launch can do less.
        margins: share of a group's range left out at each end, for K and for V (see `pages/codec.py`).

    Raises:
        ConfigError: without sealed pages, for bits other than 8, 4 and 2, page sizes that are no power of two, and
            pairs of another shape.
    """
    sealed = pages.sealed
    kv_heads, raw_pages, size, value_dim = pages.raw_values.shape
    key_dim = pages.raw_keys.shape[-1]
    if sealed is None:
        raise ConfigError("pages", "no sealed pages", "pages with room for codes")
    for bits, dim in ((pages.k_bits, key_dim), (pages.v_bits, value_dim)):
        if bits not in (2, 4, 8) or dim * bits % 8:
            raise ConfigError("kv_bits", bits, f"8, 4 or 2 bits that fill the bytes of head size {dim}")
    if size & (size - 1):
        raise ConfigError("page_size", size, "a power of two for the GPU kernels")
    if pairs.dtype != torch.int32 or pairs.shape != (pairs.shape[0], 2) or not pairs.is_contiguous():
        raise ConfigError("pairs", (tuple(pairs.shape), pairs.dtype), "contiguous int32 (n, 2)")
    tensors = [pages.raw_keys, pages.raw_values, *vars(sealed).values()]
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ConfigError("pages", "strided tensors", "contiguous tensors")
    if not pairs.shape[0]:
        return
    widths = sealed.k_codes.shape[-1], sealed.v_codes.shape[-1]
    seal_kernel[(pairs.shape[0], kv_heads, 2)](
        pages.raw_keys, pages.raw_values, sealed.k_codes, sealed.k_scales, sealed.v_codes, sealed.v_scales, pairs,
        raw_pages, sealed.k_codes.shape[1], P=size, DK=key_dim, DV=value_dim, KB=pages.k_bits, VB=pages.v_bits,
        WK=widths[0], WV=widths[1], WKP=triton.next_power_of_2(widths[0]), WVP=triton.next_power_of_2(widths[1]),
        MK=margins[0], MV=margins[1],
        # The codec rounds product and sum, one after the other.
        enable_fp_fusion=False, num_warps=8 if size * max(key_dim, value_dim) > 8192 else 4,
    )  # fmt: skip
