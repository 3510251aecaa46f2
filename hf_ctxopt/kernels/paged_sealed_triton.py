# mypy: disable-error-code="misc, no-untyped-def, untyped-decorator, assignment"
"""Sealed pages of the paged decode attention: from packed codes to partial outputs without a dense page in between.

Tokens and channels are the rows of both matrix products and the queries their columns, so that the few queries of a
KV head fill a tile of 8 columns and not half of one of 16 rows.
"""

import triton
import triton.language as tl

from hf_ctxopt.kernels.paged_page_triton import exp2, logits, store_pages


@triton.jit
def code_values(units, BITS: tl.constexpr, SLOT: tl.constexpr, FAST: tl.constexpr):
    """Code `SLOT` of each 16-bit unit as float16: `(code - 2**(BITS - 1)) * 2**(BITS * (SLOT % (8 // BITS)))`, exact.

    `0x6400 | n` is 1024 + n in float16 for n < 1024, so a mask and a subtraction make a number of a code in place.
    """
    PLANES: tl.constexpr = 8 // BITS
    LOW: tl.constexpr = BITS * (SLOT % PLANES)
    MASK: tl.constexpr = ((1 << BITS) - 1) << LOW
    OFFSET: tl.constexpr = 1024 + (1 << (BITS - 1 + LOW))
    if FAST:  # two units per register and three instructions; the compiler alone takes each unit apart
        PAIR: tl.constexpr = MASK * 65537
        BIAS: tl.constexpr = (0x6400 + OFFSET - 1024) * 65537
        SHIFT: tl.constexpr = 8 if SLOT >= PLANES else 0
        return tl.inline_asm_elementwise(
            f"{{ .reg .b32 t, c; shr.b32 t, $1, {SHIFT}; lop3.b32 t, t, {PAIR}, 0x64006400, 0xEA; "
            f"mov.b32 c, {BIAS}; sub.rn.f16x2 $0, t, c; }}",
            "=r,r",
            [units],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        shifted = units >> 8 if SLOT >= PLANES else units
        return ((shifted & MASK) | 0x6400).to(tl.float16, bitcast=True) - OFFSET


@triton.jit
def scaled(numbers, scale, zero, FAST: tl.constexpr):
    """`numbers * scale + zero` in float16, rounded once."""
    if FAST:
        return tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;",
            "=r,r,r,r",
            [numbers, scale, zero],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        return (numbers.to(tl.float32) * scale.to(tl.float32) + zero.to(tl.float32)).to(tl.float16)


@triton.jit
def half_of(words, UPPER: tl.constexpr, FAST: tl.constexpr):
    """The lower or upper float16 of each 32-bit word."""
    if FAST:
        PICK: tl.constexpr = 0x7632 if UPPER else 0x5410
        return tl.inline_asm_elementwise(
            f"prmt.b32 $0, $1, $2, {PICK};", "=r,r,r", [words], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        half = words >> 16 if UPPER else words
        return (half & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def log2_and_inverse(x, FAST: tl.constexpr):
    """log2 and reciprocal of positive normal numbers."""
    if FAST:
        log = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
        inv = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
        return log, inv
    else:
        return tl.log2(x), 1.0 / x


@triton.jit
def sealed_part(
    query, k_codes, k_scales, v_codes, v_scales, row_table, state, partial, lse, page_lse, first, last, scaling, cap,
    width, H: tl.constexpr, V: tl.constexpr, G: tl.constexpr, P: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    COLS: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, UK: tl.constexpr, UV: tl.constexpr, UKP: tl.constexpr,
    UVP: tl.constexpr, CAP: tl.constexpr, SHARES: tl.constexpr, FAST: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Attention over the row's sealed pages `[first, last)`, counted from its first sealed page.

    A 16-bit unit holds codes of `16 / bits` channels: one matrix product per code of the unit, straight from the
    packed bytes to registers. Channel of code `i` of unit `u`: `2 u + i // planes + (i % planes) * 2 * units`.
    """
    sealed_from, sink_entries, jump = tl.load(state + 1), tl.load(state + 3), tl.load(state + 4)
    VG: tl.constexpr = V * G
    KP: tl.constexpr = 8 // KB
    VP: tl.constexpr = 8 // VB
    col, t = tl.arange(0, COLS), tl.arange(0, P)
    uk, uv = tl.arange(0, UKP), tl.arange(0, UVP)
    place = (col // G) * (H * G) + col % G  # of a query in (V, H * G)
    start = tl.load(state + 8 + 2 * (col // G), mask=col < VG, other=0)
    stop = tl.load(state + 9 + 2 * (col // G), mask=col < VG, other=0)
    peak = tl.full((COLS,), -1e30, tl.float32)
    total = tl.zeros((P, COLS), tl.float32)  # summed over tokens once, after the loop
    shift = tl.zeros((P, COLS), tl.float32)
    q, acc = (), ()
    for i in tl.static_range(2 * KP):
        channel = 2 * uk + i // KP + (i % KP) * 2 * UK
        used = (uk < UK)[:, None] & (col < VG)[None, :]
        q = q + (tl.load(query + place[None, :] * DK + channel[:, None], mask=used, other=0.0).to(tl.float16),)
    for _ in tl.static_range(2 * VP):
        acc = acc + (tl.zeros((UVP, COLS), tl.float32),)
    for index in range(first, last):
        entry = sealed_from + index
        page = (-1 - tl.load(row_table + entry)).to(tl.int64)
        token = (entry + tl.where(entry >= sink_entries, jump, 0)) * P + t
        k_at = k_codes + page * (P * UK) + t[:, None] * UK + uk[None, :]
        v_at = v_codes + page * (P * UV) + t[None, :] * UV + uv[:, None]
        if UKP == UK:
            k_units = tl.load(k_at)
        else:
            k_units = tl.load(k_at, mask=(uk < UK)[None, :], other=0)
        if UVP == UV:
            v_units = tl.load(v_at)
        else:
            v_units = tl.load(v_at, mask=(uv < UV)[:, None], other=0)
        v_scale = tl.load(v_scales + page * (2 * P) + t).to(tl.float32)
        v_zero = tl.load(v_scales + page * (2 * P) + P + t).to(tl.float32)
        s = tl.zeros((P, COLS), tl.float32)
        for plane in tl.static_range(KP):
            at = k_scales + page * DK + plane * UK + uk
            if UKP == UK:
                scales = tl.load(at)
                zeros = tl.load(at + DK // 2)
            else:
                scales = tl.load(at, mask=uk < UK, other=0)
                zeros = tl.load(at + DK // 2, mask=uk < UK, other=0)
            for upper in tl.static_range(2):
                step = half_of(scales, upper, FAST)
                middle = scaled(step, tl.full((UKP,), 1 << (KB - 1), tl.float16), half_of(zeros, upper, FAST), FAST)
                if plane > 0:
                    step = scaled(
                        step,
                        tl.full((UKP,), 1.0 / (1 << (KB * plane)), tl.float16),
                        tl.zeros((UKP,), tl.float16),
                        FAST,
                    )
                numbers = code_values(k_units, KB, upper * KP + plane, FAST)
                s = tl.dot(scaled(numbers, step[None, :], middle[None, :], FAST), q[upper * KP + plane], s)
        s = logits(s, scaling, cap, CAP)
        sees = (token[:, None] >= start[None, :]) & (token[:, None] < stop[None, :])
        # The value's scale joins the exponent: weights of the codes stay within [0, 1] whatever the scales are.
        log_scale, inverse = log2_and_inverse(v_scale, FAST)
        s = tl.where(sees, s + log_scale[:, None], float("-inf"))
        higher = tl.maximum(peak, tl.max(s, 0))
        decay = exp2(peak - higher, FAST)
        w16 = exp2(s - higher[None, :], FAST).to(tl.float16)
        w = w16.to(tl.float32) * inverse[:, None]
        total = total * decay[None, :] + w
        shift = shift * decay[None, :] + w * (v_zero + v_scale * (1 << (VB - 1)))[:, None]
        peak = higher
        renewed = ()
        for i in tl.static_range(2 * VP):
            renewed = renewed + (tl.dot(code_values(v_units, VB, i, FAST), w16, acc[i] * decay[None, :]),)
        acc = renewed
        if SHARES:
            one = tl.arange(0, 1)
            store_pages(page_lse, tl.trans(w), peak, entry + one, one == 0, col, width, VG, COLS, 1, P)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()  # as in `raw_part`
    all_total, all_shift = tl.sum(total, 0), tl.sum(shift, 0)
    share = 1.0 / tl.maximum(all_total, 1e-38)
    for i in tl.static_range(2 * VP):
        channel = 2 * uv + i // VP + (i % VP) * 2 * UV
        out = (acc[i] * (1.0 / (1 << (VB * (i % VP)))) + all_shift[None, :]) * share[None, :]
        tl.store(partial + col[None, :] * DV + channel[:, None], out, mask=(uv < UV)[:, None] & (col < VG)[None, :])
    sums = tl.where(all_total > 0, tl.log2(tl.maximum(all_total, 1e-38)) + peak, float("-inf"))
    tl.store(lse + col, sums, mask=col < VG)
