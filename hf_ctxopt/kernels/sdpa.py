"""torch's `scaled_dot_product_attention` without its cuDNN backend.

On data-centre GPUs torch prefers cuDNN, which plans anew for every length it has not seen: 30 to 35 ms a call on an
H200 while a cache grows. The choice is made per call, not for the process.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_switching = threading.RLock()  # the switch is one for the process: two threads must not restore each other's


@contextmanager
def without_cudnn(like: Tensor) -> Iterator[None]:
    """Keep `scaled_dot_product_attention` off cuDNN inside the block, where `like` lies on a GPU."""
    if not like.is_cuda:
        yield
        return
    with _switching:
        before = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(False)
        try:
            yield
        finally:
            torch.backends.cuda.enable_cudnn_sdp(before)


def sdpa(query: Tensor, keys: Tensor, values: Tensor, **options: Any) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, never by cuDNN."""
    if not query.is_cuda:
        return functional.scaled_dot_product_attention(query, keys, values, **options)
    with without_cudnn(query):
        return functional.scaled_dot_product_attention(query, keys, values, **options)
