"""Pages of a table row as dense K and V: the arguments and the plain-torch reference.

For prefill over encoded history in bounded pieces. `gather_triton.gather` takes the same arguments.
"""

from __future__ import annotations

from torch import Tensor

from hf_ctxopt.errors import ConfigError
from hf_ctxopt.kernels.paged import PagedStates, page_states


def gather_reference(pages: PagedStates, row: Tensor, first: int, count: int, keys: Tensor, values: Tensor) -> None:
    """Decode or copy the pages of the entries `[first, first + count)` of a table row into dense tensors.

    Args:
        pages: the layer's pages.
        row: int32 `(entries,)`; raw page `r` is `r`, sealed page `s` is `-1 - s`.
        first: first entry.
        count: entries.
        keys: `(kv_heads, count * page_size, key_dim)`, filled; the arithmetic is float32, the dtype the buffer's.
        values: `(kv_heads, count * page_size, value_dim)`, filled.

    Raises:
        ConfigError: for a range outside the row or buffers of another shape.
    """
    check(pages, row, first, count, keys, values)
    size = pages.page_size
    for index, reference in enumerate(row[first : first + count].tolist()):
        at = slice(index * size, (index + 1) * size)
        keys[:, at], values[:, at] = page_states(pages, reference)


def check(pages: PagedStates, row: Tensor, first: int, count: int, keys: Tensor, values: Tensor) -> None:
    """`ConfigError` unless the arguments of `gather` belong together."""
    if first < 0 or count < 1 or first + count > row.shape[0]:
        raise ConfigError("count", (first, count), f"entries of a row of {row.shape[0]}")
    heads, tokens = pages.raw_keys.shape[0], count * pages.page_size
    for name, buffer, stored in (("keys", keys, pages.raw_keys), ("values", values, pages.raw_values)):
        if buffer.shape != (heads, tokens, stored.shape[-1]) or buffer.stride(-1) != 1:
            raise ConfigError(name, tuple(buffer.shape), f"{(heads, tokens, stored.shape[-1])}, channels side by side")
