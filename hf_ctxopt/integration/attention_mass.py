"""Where attention looks, and what fewer bits change about its output: sums over blocks of queries, in float32.

Memory stays bounded however long the text is: a block holds at most `BLOCK` scores, and what is kept of it are sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..pages.rotation import rotate_channels
from ..pages.sealed import Codecs

BLOCK = 1 << 24
"""Scores (heads x queries x keys) of a block: 64 MiB in float32, of which a few copies exist for a moment."""


@dataclass(frozen=True)
class Scored:
    """One call of an attention layer, of one row.

    Args:
        query: `(heads, queries, key_dim)`.
        key: `(kv_heads, keys, key_dim)`.
        value: `(kv_heads, keys, value_dim)`.
        scale: factor on the scores.
        mask: bool (True is visible) or additive, `(1 or heads, queries, keys)`; `None` if all are visible.
        softcap: `c` of `c * tanh(scores / c)`, if the model caps its scores.
        drains: learned sinks, `(heads,)` logits that take part in the softmax and belong to no token; or `None`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    mask: Tensor | None = None
    softcap: float | None = None
    drains: Tensor | None = None

    def of(self, queries: Tensor) -> Scored:
        """The same call for some of its queries, `(n,)` indices."""
        mask = None if self.mask is None else self.mask[:, queries]
        return replace(self, query=self.query[:, queries], mask=mask)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(queries, probabilities `(heads, queries, keys)` in float32), in order."""
        heads, queries, dim = self.query.shape
        keys = self.key.float()
        size = max(1, BLOCK // (heads * keys.shape[1]))
        for start in range(0, queries, size):
            part = slice(start, min(start + size, queries))
            rows = self.query[:, part].float().reshape(keys.shape[0], -1, dim)  # queries that share a head's keys
            scores = (rows @ keys.transpose(1, 2)).view(heads, -1, keys.shape[1]) * self.scale
            if self.softcap is not None:
                scores = self.softcap * torch.tanh(scores / self.softcap)
            if self.mask is not None:
                seen = self.mask[:, part]
                scores = scores.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else scores + seen.float()
            yield part, self._softmax(scores)

    def _softmax(self, scores: Tensor) -> Tensor:
        if self.drains is None:
            return scores.softmax(-1)
        drains = self.drains.float().view(-1, 1, 1).expand(-1, scores.shape[1], 1)
        return torch.cat([scores, drains], -1).softmax(-1)[..., :-1]

    def outputs(self) -> Tensor:
        """What attention returns, `(heads, queries, value_dim)` in float32."""
        values = self.value.float()
        found = []
        for _, probabilities in self.blocks():
            grouped = probabilities.reshape(values.shape[0], -1, values.shape[1])
            found.append((grouped @ values).view(probabilities.shape[0], -1, values.shape[2]))
        return torch.cat(found, 1)

    def error(self, codecs: Codecs, page_size: int) -> float:
        """Square of the relative change of `outputs` with K and V as a cache with these codecs holds them."""
        exact = self.outputs()
        keys, values = stored(self.key, codecs, "k", page_size), stored(self.value, codecs, "v", page_size)
        change = replace(self, key=keys, value=values).outputs() - exact
        return float(change.square().sum() / exact.square().sum().clamp_min(torch.finfo(torch.float32).tiny))


def outside(probabilities: Tensor, places: Tensor, offset: int, sinks: int, windows: Sequence[int]) -> Tensor:
    """Probability on tokens that are neither among the first nor among the last ones.

    Args:
        probabilities: `(heads, queries, keys)`.
        places: `(queries,)`, places of the queries in the text.
        offset: place of the first key in the text.
        sinks: first tokens that are kept.
        windows: last tokens that are kept, the query's own included.

    Returns:
        `(windows, heads, queries)`; `nan` where nothing lies outside because the text is no longer than what is kept.
    """
    heads, queries, keys = probabilities.shape
    sums = torch.nn.functional.pad(probabilities.cumsum(-1), (1, 0))  # sums[j]: of the keys before j
    before = sums[..., min(max(0, sinks - offset), keys)]
    found = []
    for window in windows:
        oldest = places - window + 1  # first token of the window
        upto = (oldest - offset).clamp(0, keys).expand(heads, queries)[..., None]
        mass = (sums.gather(-1, upto)[..., 0] - before).clamp_min(0)
        found.append(mass.masked_fill(oldest <= sinks, torch.nan))
    return torch.stack(found)


def stored(states: Tensor, codecs: Codecs, part: str, page_size: int) -> Tensor:
    """What a cache gives back of keys or values: its first page and a begun one as they are, the rest through a codec.

    Args:
        states: `(kv_heads, tokens, head_dim)`.
        codecs: of full pages.
        part: `"k"` or `"v"`.
        page_size: tokens of a page.
    """
    codec, turned = (codecs.keys, codecs.rotate_keys) if part == "k" else (codecs.values, codecs.rotate_values)
    first, last = page_size, states.shape[1] // page_size * page_size
    if last <= first or codec.bits == 16:
        return states
    pages = states[:, first:last].unflatten(1, (-1, page_size))
    pages = codec.decode(*codec.encode(rotate_channels(pages) if turned else pages), states.dtype)
    pages = rotate_channels(pages, back=True) if turned else pages
    return torch.cat([states[:, :first], pages.flatten(1, 2), states[:, last:]], 1)
