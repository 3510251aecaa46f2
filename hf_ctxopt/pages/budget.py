"""The memory a cache may take, in tokens or in bytes, shared by its layer groups."""

from __future__ import annotations

import re

from ..errors import ConfigError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_ALLOWED = 'None, a number of tokens >= 1, or bytes as text such as "512MiB" or "2GiB"'


class Budget:
    """An upper limit on pages.

    Args:
        limit: `None` for no limit; an `int` counts tokens (page slots, summed over the batch, per layer group); a
            string counts bytes over all layers, e.g. `"2GiB"`, `"800MB"`.

    Raises:
        ConfigError: `limit` is none of these.
    """

    def __init__(self, limit: int | str | None = None) -> None:
        self.tokens: int | None = None
        self.nbytes: int | None = None
        if isinstance(limit, str):
            self.nbytes = parse_bytes(limit)
        elif isinstance(limit, int) and not isinstance(limit, bool) and limit >= 1:
            self.tokens = limit
        elif limit is not None:
            raise ConfigError("budget", limit, _ALLOWED)

    def most_pages(self, page_size: int, page_bytes: int, others: int, beside: int = 0) -> int | None:
        """Pages of one kind a layer group may have; `None` if there is no limit.

        Args:
            page_size: tokens of a page.
            page_bytes: bytes of a page over all layers of the group.
            others: bytes of everything else that the cache has.
            beside: pages of another kind that the group has.
        """
        if self.tokens is not None:
            return max(0, self.tokens // page_size - beside)
        if self.nbytes is None:
            return None
        return max(0, self.nbytes - others) // max(1, page_bytes)


def parse_bytes(text: str) -> int:
    """Bytes of `"512MiB"`, `"2GiB"`, `"1.5 GB"`.

    Raises:
        ConfigError: the text is not a positive size.
    """
    match = re.fullmatch(r"\s*(\d{1,30}(?:\.\d+)?)\s*([KMG]I?)?B\s*", text, re.IGNORECASE | re.ASCII)
    size = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise ConfigError("budget", text, _ALLOWED)
    return size
