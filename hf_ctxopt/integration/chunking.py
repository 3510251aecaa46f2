"""How long prompts are read: the one place that decides on `prefill_chunk_size`.

A prompt that is read at once needs activations for all of its tokens together; in chunks it needs those of one chunk,
and the tokens that are generated stay the same. The rule, in order:

1. A `prefill_chunk_size` of the user's is kept.
2. What transformers cannot split stays whole: prompts of more than token ids, encoder-decoders, and continued texts
   before transformers 5.23 (see `generate.py`).
3. `ctx_sink` with a prompt longer than what it will hold: chunks of its window, at most `SMALL` tokens, so that the
   peak is that of a short prompt, and never more than half a position era.
4. Prompts of more than `LARGE` tokens on a GPU: chunks of `LARGE` tokens, or of `SMALL` where memory is tight, that is
   where the cache has a byte budget or the process may use less than `TIGHT` of the device. The activations of a 7B
   model are some 0.1 GiB at `SMALL` tokens; on large GPUs twice as long chunks keep the kernels filled.
5. Prompts of more than `SMALL` tokens anywhere, where the cache has a byte budget: chunks of `SMALL` tokens.
"""

from __future__ import annotations

import torch
from torch import nn

from ..caches.options import PageOptions, SinkOptions
from ..pages.budget import Budget

SMALL = 1024
LARGE = 2048
TIGHT = 24 << 30  # bytes


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
    counted = Budget(options.budget).nbytes is not None
    device = compute_device(model)
    if device.type == "cuda" and prompt > LARGE:
        return SMALL if counted or device_memory(device) < TIGHT else LARGE
    return SMALL if counted and prompt > SMALL else None


def compute_device(model: nn.Module) -> torch.device:
    """Where the model computes: the first device that is not the CPU, which may only hold its embedding."""
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU that this process may use."""
    total: int = torch.cuda.get_device_properties(device).total_memory
    share = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # since torch 2.9
    return total if share is None else int(total * share(device))
