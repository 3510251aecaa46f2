# mypy: disable-error-code="misc, no-untyped-def, untyped-decorator"
"""What reading raw and sealed pages has in common: scores, exponentials and the shares of pages."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp2(x, FAST: tl.constexpr):
    """`2**x`; what is below the smallest normal number is 0."""
    if FAST:  # without the four instructions that keep subnormal results
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.exp2(x)


@triton.jit
def logits(products, scaling, cap, CAP: tl.constexpr):
    """Scores in log2 units from query-key products."""
    if CAP:
        # tanh(x) = 2 sigmoid(2 x) - 1, which saturates without overflow
        return (2.0 * tl.sigmoid(products * (2.0 * scaling / cap)) - 1.0) * (cap * LOG2E)
    else:
        return products * (scaling * LOG2E)


@triton.jit
def store_pages(page_lse, weights, peak, entry, valid, row, width, VG: tl.constexpr,
                ROWS: tl.constexpr, N: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """log2-sum-exp of each of the tile's `N` pages; `weights` are relative to `2**peak`."""
    sums = tl.sum(tl.reshape(weights, (ROWS, N, P)), 2)
    value = tl.where(sums > 0, tl.log2(tl.maximum(sums, 1e-38)) + peak[:, None], float("-inf"))
    tl.store(page_lse + row[:, None] * width + entry[None, :], value, mask=(row < VG)[:, None] & valid[None, :])
