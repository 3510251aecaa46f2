"""StreamingLLM from scratch for tiny Llama models: what `ctx_sink` is held against.

Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453), section 3.2,
and streaming_llm/pos_shift/modify_llama.py of mit-han-lab/streaming-llm; the context shift is that of llama.cpp.
Keys are cached before the rotary embedding; at every token the cache keeps the first `sinks` and the last `window`
tokens (the new one included), and positions are places inside the cache, so they never exceed `sinks + window - 1`.

Written with plain loops and one token at a time, because it must be obviously right, not fast. It uses the
weights of the model and its table of cosines, and neither hf_ctxopt nor any cache or attention of transformers.
One unpadded row at a time: padding is the business of what is tested.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


def _norm(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """RMS norm of Llama."""
    return module.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, half-split layout: x `(heads, n, head_dim)`, cos and sin `(n, head_dim)`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class _LayerCache:
    """Unrotated keys and values of one layer, `(kv_heads, kept, head_dim)`."""

    def __init__(self, sinks: int, window: int, n_discard: int | None) -> None:
        self.sinks, self.window, self.n_discard = sinks, window, n_discard
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds one token, drops tokens behind the sinks if there are too many, returns what is kept."""
        drop = self._context_shift() if self.n_discard is not None else 0
        self.keys.append(key)
        self.values.append(value)
        if self.n_discard is None:
            drop = max(0, len(self.keys) - self.sinks - self.window)
        del self.keys[self.sinks : self.sinks + drop], self.values[self.sinks : self.sinks + drop]
        return torch.stack(self.keys, dim=1), torch.stack(self.values, dim=1)

    def _context_shift(self) -> int:
        """How many tokens llama.cpp discards before the next one (server-context.cpp, `ctx_shift`)."""
        n_past, n_ctx = len(self.keys), self.sinks + self.window
        if n_past + 1 < n_ctx:
            return 0
        n_left = n_past - self.sinks
        return min(self.n_discard or n_left // 2, max(0, n_left - 1))


def _attend(
    attn: nn.Module, x: torch.Tensor, cache: _LayerCache, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Self-attention of one token `(hidden,)` over what the cache keeps."""
    head_dim = attn.head_dim
    query = attn.q_proj(x).view(-1, 1, head_dim)
    keys, values = cache.append(attn.k_proj(x).view(-1, head_dim), attn.v_proj(x).view(-1, head_dim))
    kept = keys.shape[1]
    keys = _rotate(keys, cos[:kept], sin[:kept])
    query = _rotate(query, cos[kept - 1 : kept], sin[kept - 1 : kept])
    groups = query.shape[0] // keys.shape[0]
    keys, values = keys.repeat_interleave(groups, dim=0), values.repeat_interleave(groups, dim=0)
    weights = torch.softmax(query @ keys.transpose(1, 2) / math.sqrt(head_dim), dim=-1)
    return attn.o_proj((weights @ values).reshape(-1))


@torch.no_grad()
def streaming_logits(
    model: nn.Module, ids: torch.Tensor, sinks: int, window: int, n_discard: int | None = None
) -> torch.Tensor:
    """Logits of every position of a text read as a stream.

    Args:
        model: a float32 `LlamaForCausalLM`, of any rotary kind whose table does not change with the text's length.
        ids: text `(seq,)`, without padding.
        sinks: first tokens kept for ever.
        window: last tokens kept, the query's own included.
        n_discard: discard so many at once whenever the cache is full, as llama.cpp; 0 for half.

    Returns:
        Logits `(seq, vocab)`.
    """
    body = model.model
    places = torch.arange(sinks + window)[None]
    cos, sin = (table[0] for table in body.rotary_emb(torch.zeros(1, 1, 1), places))
    caches = [_LayerCache(sinks, window, n_discard) for _ in body.layers]
    logits = []
    for token in ids.tolist():
        x = body.embed_tokens.weight[token]
        for layer, cache in zip(body.layers, caches, strict=True):
            x = x + _attend(layer.self_attn, _norm(layer.input_layernorm, x), cache, cos, sin)
            hidden, mlp = _norm(layer.post_attention_layernorm, x), layer.mlp
            x = x + mlp.down_proj(F.silu(mlp.gate_proj(hidden)) * mlp.up_proj(hidden))
        logits.append(model.lm_head(_norm(body.norm, x)))
    return torch.stack(logits)


@torch.no_grad()
def contiguous_logits(model: nn.Module, ids: torch.Tensor, sinks: int, window: int) -> torch.Tensor:
    """The same for a one-layer model of any rotary family, by recomputing what is kept as a text of its own.

    With one layer, keys depend on nothing but token and position, so the sinks and the last `window` tokens read
    as one contiguous text are StreamingLLM. Shapes as in `streaming_logits`.
    """
    size, seq = sinks + window, len(ids)
    start = model(ids[None, :size], use_cache=False).logits[0]
    if seq <= size:
        return start
    kept = torch.stack([torch.cat([ids[:sinks], ids[t - window + 1 : t + 1]]) for t in range(size, seq)])
    return torch.cat([start, model(kept, use_cache=False).logits[:, -1]])


@torch.no_grad()
def kept_logits(model: nn.Module, ids: torch.Tensor, steps: Sequence[tuple[int, int, Sequence[int]]]) -> torch.Tensor:
    """Logits of every position of a text of which, step by step, only some earlier tokens are kept.

    A token attends to what its step kept and to the step's own tokens up to itself, at positions 0, 1, 2 ... in that
    order: the kept tokens stand side by side.

    Args:
        model: a float32 `LlamaForCausalLM`.
        ids: text `(seq,)`, without padding.
        steps: `(start, stop, kept)`: tokens `[start, stop)` are fed at once; `kept` are the earlier ones, ascending.

    Returns:
        Logits `(seq, vocab)`.
    """
    body = model.model
    cos, sin = (table[0] for table in body.rotary_emb(torch.zeros(1, 1, 1), torch.arange(len(ids))[None]))
    keys: list[list[torch.Tensor]] = [[] for _ in body.layers]
    values: list[list[torch.Tensor]] = [[] for _ in body.layers]
    logits = []
    for start, stop, kept in steps:
        for token in range(start, stop):
            seen = [*kept, *range(start, token + 1)]
            x = body.embed_tokens.weight[ids[token]]
            for layer, own_keys, own_values in zip(body.layers, keys, values, strict=True):
                attn, normed = layer.self_attn, _norm(layer.input_layernorm, x)
                own_keys.append(attn.k_proj(normed).view(-1, attn.head_dim))
                own_values.append(attn.v_proj(normed).view(-1, attn.head_dim))
                place = len(seen)
                key = _rotate(torch.stack([own_keys[at] for at in seen], dim=1), cos[:place], sin[:place])
                value = torch.stack([own_values[at] for at in seen], dim=1)
                query = _rotate(attn.q_proj(normed).view(-1, 1, attn.head_dim), cos[place - 1 : place],
                                sin[place - 1 : place])  # fmt: skip
                groups = query.shape[0] // key.shape[0]
                key, value = key.repeat_interleave(groups, dim=0), value.repeat_interleave(groups, dim=0)
                weights = torch.softmax(query @ key.transpose(1, 2) / math.sqrt(attn.head_dim), dim=-1)
                x = x + attn.o_proj((weights @ value).reshape(-1))
                hidden, mlp = _norm(layer.post_attention_layernorm, x), layer.mlp
                x = x + mlp.down_proj(F.silu(mlp.gate_proj(hidden)) * mlp.up_proj(hidden))
            logits.append(model.lm_head(_norm(body.norm, x)))
    return torch.stack(logits)
