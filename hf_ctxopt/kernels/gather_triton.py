# mypy: disable-error-code="misc, no-untyped-def, untyped-decorator"
"""Pages of a table row as dense K and V in one launch; the reference is `gather.gather_reference`."""

import triton
import triton.language as tl
from torch import Tensor

from hf_ctxopt.errors import ConfigError
from hf_ctxopt.kernels.gather import check
from hf_ctxopt.kernels.paged import PagedStates


@triton.jit
def _copy(
    raw, codes, scales, out, token_stride, page, raw_pages, sealed_pages, head, P: tl.constexpr, DIM: tl.constexpr,
    BITS: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr, DIM_PAD: tl.constexpr, OVER_TOKENS: tl.constexpr,
):  # fmt: skip
    """One page of one head into `out`, whose tokens are `token_stride` apart."""
    t = tl.arange(0, P)
    rows = (t >= 0)[:, None]
    if page >= 0:
        c = tl.arange(0, DIM_PAD)
        real = rows & (c < DIM)[None, :]
        copied = tl.load(raw + (head * raw_pages + page) * (P * DIM) + t[:, None] * DIM + c[None, :], mask=real)
        tl.store(out + t[:, None] * token_stride + c[None, :], copied.to(out.dtype.element_ty), mask=real)
    elif BITS > 0:
        e = tl.arange(0, PAD)
        used = rows & (e < WIDTH)[None, :]
        place = head * sealed_pages + (-1 - page)
        packed = tl.load(codes + place * (P * WIDTH) + t[:, None] * WIDTH + e[None, :], mask=used, other=0).to(
            tl.int32
        )
        for i in tl.static_range(8 // BITS):
            numbers = ((packed >> (BITS * i)) & ((1 << BITS) - 1)).to(tl.float32)
            if OVER_TOKENS:
                plane = scales + place * (2 * DIM) + i * WIDTH + e
                scale = tl.load(plane, mask=e < WIDTH, other=0.0).to(tl.float32)[None, :]
                zero = tl.load(plane + DIM, mask=e < WIDTH, other=0.0).to(tl.float32)[None, :]
            else:
                scale = tl.load(scales + place * (2 * P) + t).to(tl.float32)[:, None]
                zero = tl.load(scales + place * (2 * P) + P + t).to(tl.float32)[:, None]
            states = numbers * scale + zero
            at_out = out + t[:, None] * token_stride + i * WIDTH + e[None, :]
            tl.store(at_out, states.to(out.dtype.element_ty), mask=used)


@triton.jit(do_not_specialize=["first", "raw_pages", "sealed_pages", "k_head", "v_head"])
def gather_kernel(
    row, raw_keys, raw_values, k_codes, k_scales, v_codes, v_scales, keys, values, first, raw_pages, sealed_pages,
    k_head, k_token, v_head, v_token, P: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, KB: tl.constexpr,
    VB: tl.constexpr, WK: tl.constexpr, WV: tl.constexpr, WKP: tl.constexpr, WVP: tl.constexpr, DKP: tl.constexpr,
    DVP: tl.constexpr,
):  # fmt: skip
    """Grid `(count, kv_heads, 2)`: K, then V."""
    entry, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    page = tl.load(row + first + entry).to(tl.int64)
    if tl.program_id(2) == 0:
        target = keys + head * k_head + entry * P * k_token
        _copy(
            raw_keys, k_codes, k_scales, target, k_token, page, raw_pages, sealed_pages, head, P, DK, KB, WK, WKP, DKP,
            True,
        )  # fmt: skip
    else:
        target = values + head * v_head + entry * P * v_token
        _copy(
            raw_values, v_codes, v_scales, target, v_token, page, raw_pages, sealed_pages, head, P, DV, VB, WV, WVP,
            DVP, False,
        )  # fmt: skip


def gather(pages: PagedStates, row: Tensor, first: int, count: int, keys: Tensor, values: Tensor) -> None:
    """Decode or copy pages into dense tensors; see `gather.gather_reference` for the layout.

    Args:
        pages: the layer's pages.
        row: contiguous int32 `(entries,)` on the pages' device.
        first: first entry.
        count: entries.
        keys: `(kv_heads, count * page_size, key_dim)`, may be a part of a wider buffer.
        values: `(kv_heads, count * page_size, value_dim)`, likewise.

    Raises:
        ConfigError: for a range outside the row, buffers of another shape, or pages that the kernel cannot take.
    """
    check(pages, row, first, count, keys, values)
    kv_heads, raw_pages, size, value_dim = pages.raw_values.shape
    key_dim, sealed = pages.raw_keys.shape[-1], pages.sealed
    if size & (size - 1):
        raise ConfigError("page_size", size, "a power of two for the GPU kernels")
    if pages.k_bits not in (0, 2, 4, 8) or pages.v_bits not in (0, 2, 4, 8):
        raise ConfigError("kv_bits", (pages.k_bits, pages.v_bits), "8, 4 or 2")
    tensors = [pages.raw_keys, pages.raw_values, row, *([] if sealed is None else vars(sealed).values())]
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ConfigError("pages", "strided tensors", "contiguous tensors")
    # Without sealed pages the kernel is compiled without that part: any pointer serves.
    codes = (row,) * 4 if sealed is None else (sealed.k_codes, sealed.k_scales, sealed.v_codes, sealed.v_scales)
    widths = (1, 1) if sealed is None else (sealed.k_codes.shape[-1], sealed.v_codes.shape[-1])
    gather_kernel[(count, kv_heads, 2)](
        row, pages.raw_keys, pages.raw_values, *codes, keys, values, first, raw_pages,
        0 if sealed is None else sealed.k_codes.shape[1], keys.stride(0), keys.stride(1), values.stride(0),
        values.stride(1), P=size, DK=key_dim, DV=value_dim, KB=pages.k_bits, VB=pages.v_bits, WK=widths[0],
        WV=widths[1], WKP=triton.next_power_of_2(widths[0]), WVP=triton.next_power_of_2(widths[1]),
        DKP=triton.next_power_of_2(key_dim), DVP=triton.next_power_of_2(value_dim), num_warps=4,
    )  # fmt: skip
