"""How long prompts are read: the one place that decides on `prefill_chunk_size`.

A prompt that is read at once needs activations for all of its tokens together; in chunks it needs those of one chunk,
and the tokens that are generated stay the same. The rule, in order:

1. A `prefill_chunk_size` of the user's is kept; a model patched with a plan takes the plan's (see `generate.py`).
2. What transformers cannot split stays whole: prompts of more than token ids, encoder-decoders, and continued texts
   before transformers 5.23 (see `generate.py`).
3. `ctx_sink` with a prompt longer than what it will hold: chunks of its window, at most `SMALL` tokens, so that the
   peak is that of a short prompt, and never more than half a position era. `ctx_priority`: of a quarter of its budget.
4. Prompts of more than `LARGE` tokens on a GPU: chunks of `LARGE` tokens, or of `SMALL` where memory is tight, that is
   where the cache has a byte budget or the process may use less than `TIGHT` of the device. The activations of a 7B
   model are some 0.1 GiB at `SMALL` tokens; on large GPUs twice as long chunks keep the kernels filled. Where even
   those would take more than a `SHARE` of what the weights and the prompt's pages leave, the chunk is halved, to
   `LEAST` tokens at least.
5. Prompts of more than `SMALL` tokens anywhere, where the cache has a byte budget: chunks of `SMALL` tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..caches.options import PageOptions, PriorityOptions, SinkOptions
from ..models.layerwise import largest
from ..pages.budget import Budget

SMALL = 1024
LARGE = 2048
TIGHT = 24 << 30  # bytes
SHARE = 0.25  # the rest is for what is not counted here: logits, workspaces, dequantized weights, fragments
LEAST = 128


def chunk_size(model: nn.Module, options: PageOptions, span: int | None, prompt: int | None) -> int | None:
    """Tokens of a prefill chunk; `None` to read the prompt at once.

    Args:
        model: the model.
        options: the cache's options.
        span: positions of an era, if the cache counts in eras.
        prompt: tokens that are to be read; `None` if that is not known.
    """
    if prompt is None:
        return None
    if isinstance(options, SinkOptions) and prompt > options.sinks + options.window:
        return max(1, min([options.window, SMALL] + ([] if span is None else [span // 2])))
    if isinstance(options, PriorityOptions) and (options.most_tokens is None or prompt > options.most_tokens):
        most = SMALL if options.most_tokens is None else max(options.page_size, options.most_tokens // 4)
        return min([most, SMALL] + ([] if span is None else [max(1, span // 2)]))
    counted = Budget(options.budget).nbytes is not None
    device = compute_device(model)
    if device.type == "cuda" and prompt > LARGE:
        if not counted and device_memory(device) >= TIGHT:
            return LARGE
        return affordable(model, options, prompt, SMALL, memory_left(device))
    return SMALL if counted and prompt > SMALL else None


def affordable(model: nn.Module, options: PageOptions, prompt: int, size: int, left: int) -> int:
    """`size` tokens, or half as many as often as their activations need it.

    Args:
        model: the model.
        options: the cache's options, for the bits of its pages.
        prompt: tokens that will be held.
        size: tokens to begin with.
        left: bytes of the device that nothing has taken yet.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if config is not None else None
    width = largest(text, "hidden_size")
    inner = largest(text, "intermediate_size") or 4 * width
    heads = largest(text, "num_attention_heads") or 1
    kv = (largest(text, "num_key_value_heads") or heads) * (largest(text, "head_dim") or width // heads)
    pages = int(getattr(text, "num_hidden_layers", 0) or 0) * kv * prompt * sum(options.bits.values()) // 8
    token = 2 * (6 * width + 3 * inner)  # residual, norm, Q, K, V and their turned copies; gate, up and product
    while size > LEAST and size * token > SHARE * max(0, left - pages):
        size //= 2
    return size


def memory_left(device: torch.device) -> int:
    """Bytes of a GPU that this process may still allocate."""
    return device_memory(device) - torch.cuda.memory_allocated(device)


def compute_device(model: nn.Module) -> torch.device:
    """Where the model computes: the first device that is not the CPU, which may only hold its embedding."""
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU that this process may use."""
    total: int = torch.cuda.get_device_properties(device).total_memory
    share = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # since torch 2.9
    return total if share is None else int(total * share(device))
