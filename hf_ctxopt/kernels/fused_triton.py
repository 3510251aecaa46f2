# mypy: disable-error-code="misc, no-untyped-def, untyped-decorator"
"""RMS norm and rotary embedding in one launch each. See `fused.py`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_ctxopt.kernels.fused import NormForm

ROUNDED, PLUS_ONE = tl.constexpr(int(NormForm.ROUNDED)), tl.constexpr(int(NormForm.PLUS_ONE))


@triton.jit
def norm_kernel(x, weight, out, eps, DIM: tl.constexpr, PAD: tl.constexpr, FORM: tl.constexpr):
    """One row of `x` (rows, DIM) per program."""
    row = tl.program_id(0).to(tl.int64) * DIM
    c = tl.arange(0, PAD)
    used = c < DIM
    given = tl.load(x + row + c, mask=used, other=0.0)
    factor = tl.load(weight + c, mask=used, other=0.0).to(tl.float32)
    wide = given.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 0) / DIM + eps)
    if FORM == ROUNDED:
        normed = normed.to(given.dtype).to(tl.float32)
    if FORM == PLUS_ONE:
        factor += 1.0
    tl.store(out + row + c, (normed * factor).to(given.dtype), mask=used)


@triton.jit
def rotary_kernel(
    query, keys, cos, sin, query_out, keys_out, heads, seq, q_batch, q_head, q_seq, k_batch, k_head, k_seq, c_batch,
    c_seq, s_batch, s_seq, HALF: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, heads + KV heads): one head of one token; the outputs are (batch, seq, heads, 2 HALF)."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, at = token // seq, token % seq
    kv_heads = tl.num_programs(1) - heads
    if head < heads:
        states = query + batch * q_batch + head.to(tl.int64) * q_head + at * q_seq
        out = query_out + (token * heads + head) * (2 * HALF)
    else:
        states = keys + batch * k_batch + (head - heads).to(tl.int64) * k_head + at * k_seq
        out = keys_out + (token * kv_heads + head - heads) * (2 * HALF)
    c = tl.arange(0, PAD)
    used = c < HALF
    first = tl.load(states + c, mask=used, other=0.0)
    second = tl.load(states + HALF + c, mask=used, other=0.0)
    cos += batch * c_batch + at * c_seq
    sin += batch * s_batch + at * s_seq
    near = _turned(first, tl.load(cos + c, mask=used, other=0.0), second, tl.load(sin + c, mask=used, other=0.0), -1.0)
    cos += HALF
    sin += HALF
    far = _turned(second, tl.load(cos + c, mask=used, other=0.0), first, tl.load(sin + c, mask=used, other=0.0), 1.0)
    tl.store(out + c, near, mask=used)
    tl.store(out + HALF + c, far, mask=used)


@triton.jit
def _turned(a, cos, b, sin, sign):
    """a cos ± b sin with the roundings of three operations in their dtype."""
    one = (a.to(tl.float32) * cos.to(tl.float32)).to(a.dtype).to(tl.float32)
    two = (b.to(tl.float32) * sin.to(tl.float32)).to(a.dtype).to(tl.float32)
    return (one + sign * two).to(a.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, form: NormForm) -> Tensor:
    """`fused.rms_norm` in one launch."""
    x = x.contiguous()
    out, channels = torch.empty_like(x), x.shape[-1]
    pad = triton.next_power_of_2(channels)
    warps = min(8, max(1, pad // 512))
    norm_kernel[(x.numel() // channels,)](
        x, weight, out, float(eps), DIM=channels, PAD=pad, FORM=int(form), num_warps=warps
    )
    return out


def rotary(query: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`fused.rotary` in one launch; channels must lie next to each other in all four."""
    batch, heads, seq, channels = query.shape
    kv_heads = keys.shape[1]
    out = [states.new_empty(batch, seq, states.shape[1], channels) for states in (query, keys)]
    tables = [(0 if table.shape[0] == 1 else table.stride(0), table.stride(1)) for table in (cos, sin)]
    rotary_kernel[(batch * seq, heads + kv_heads)](
        query, keys, cos, sin, *out, heads, seq, *query.stride()[:3], *keys.stride()[:3], *tables[0], *tables[1],
        HALF=channels // 2, PAD=triton.next_power_of_2(channels // 2), num_warps=1,
    )  # fmt: skip
    return out[0].transpose(1, 2), out[1].transpose(1, 2)
