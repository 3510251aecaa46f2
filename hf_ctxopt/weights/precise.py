"""Modules that must not be packed, because their model's code looks at the weight itself.

Some models cast activations to `layer.weight.dtype` (T5's `wo`, the heads of Mamba): packed, that is uint8, and the
activations would be lost. Nothing in a config tells of it, so the code is read.
"""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from .ties import with_tied


def left_dense(model: nn.Module) -> set[str]:
    """Names of modules to leave dense whatever the rules say, with those that share their tensors.

    These are modules whose weight's dtype their parent's `forward` reads, unless it minds uint8, and those that the
    model keeps in float32 (`_keep_in_fp32_modules`).
    """
    names = {
        *(getattr(model, "_keep_in_fp32_modules", None) or ()),
        *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
    }
    # As transformers finds them: whole parts of a name.
    exact = re.compile("|".join(rf"(?:^|\.){re.escape(name)}(?:$|\.)" for name in sorted(names)) or r"(?!)")
    found: set[str] = set()
    for owner, module in model.named_modules():
        kind: Any = type(module)
        for leaf, child in module.named_children():
            name = f"{owner}.{leaf}" if owner else leaf
            if isinstance(child, nn.Linear | nn.Embedding | Conv1D) and (exact.search(name) or leaf in _read(kind)):
                found.add(name)
    return with_tied(model, found)


@functools.lru_cache(1024)
def _read(kind: type[Any]) -> frozenset[str]:
    """Names of the children whose weight the code of `kind` uses itself, or its dtype without minding uint8."""
    try:
        code = inspect.getsource(kind.forward)
    except (OSError, TypeError):  # no source: `gguf_matmul` refuses such activations when they come
        return frozenset()
    read = set(re.findall(r"self\.(\w+)\.weight\.dtype", code))
    minded = set(re.findall(r"self\.(\w+)\.weight\.dtype(?: != torch\.uint8|\)?\.is_floating_point)", code))
    used = set(
        re.findall(r"self\.(\w+)\.weight @", code)
    )  # multiplied here, past the layer's own forward (Jamba, Mamba)
    return frozenset(read - minded | used)
