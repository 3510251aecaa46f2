"""One page of a stored text: where its keys and values lie, on the device or in the host's memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..pages.arena import Arena
from ..pages.pool import KINDS, SEALED, kind_of


@dataclass(eq=False)
class Slot:
    """A page of text in all arenas.

    Args:
        pages: its page in each arena; `None` where a sliding layer's was dropped, or while it lies in the host.
        host: what lies in the host's memory: (arena, layer) → the tensors of one page; empty on the device.
        kinds: per arena, the kind of page that lies there.
        away: whether it lies in the host; there may be nothing of it left, where all layers slide.
    """

    pages: list[int | None]
    host: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)
    kinds: list[str | None] = field(default_factory=list)
    away: bool = False

    def kind(self, arena: int) -> str | None:
        """Kind of its page in an arena, wherever it lies; `None` if it was dropped."""
        if self.away:
            return self.kinds[arena]
        page = self.pages[arena]
        return None if page is None else kind_of(page)

    def content(self, arena: int, layer: int, number: int, part: Tensor) -> Tensor:
        """One tensor of its page, on the CPU; `part` is that of all pages on the device."""
        if self.away:
            return self.host[arena, layer][number]
        page = self.pages[arena] or 0
        return part[:, page - SEALED if page >= SEALED else page].cpu()

    @property
    def host_bytes(self) -> int:
        """Bytes in the host's memory."""
        return sum(tensor.nbytes for tensors in self.host.values() for tensor in tensors)

    def send_away(self, arenas: list[Arena]) -> None:
        """Move its pages to the host's memory, pinned where a GPU will read it back. Nothing happens by halves."""
        held: dict[tuple[int, int], list[Tensor]] = {}
        for index, (arena, page) in enumerate(zip(arenas, self.pages, strict=True)):
            if page is not None:
                place, kind = page - arena.pool_of(page).first, kind_of(page)
                for layer, storage in arena.storages.items():
                    held[index, layer] = [_copy(part[:, place]) for part in storage.kept(kind)]
        pages, self.pages = self.pages, [None] * len(arenas)
        self.host, self.kinds = held, [None if page is None else kind_of(page) for page in pages]
        self.away = True
        for arena, page in zip(arenas, pages, strict=True):
            arena.release([] if page is None else [page])

    def bring_back(self, arenas: list[Arena]) -> None:
        """Move its pages to the device again; the caller has made room. Nothing happens by halves."""
        pages: list[int | None] = [None] * len(arenas)
        try:
            for index, (arena, kind) in enumerate(zip(arenas, self.kinds, strict=True)):
                if kind is None:
                    continue
                pool = arena.pool if kind == KINDS[0] else arena.sealed
                page = pages[index] = pool.take(1)[0]
                for layer, storage in arena.storages.items():
                    for part, tensor in zip(storage.kept(kind), self.host[index, layer], strict=True):
                        part[:, page - pool.first] = tensor.to(part.device, non_blocking=True)
        except BaseException:
            for arena, taken in zip(arenas, pages, strict=True):
                arena.release([] if taken is None else [taken])
            raise
        self.pages, self.host, self.kinds, self.away = pages, {}, [], False


def _copy(page: Tensor) -> Tensor:
    held = torch.empty(page.shape, dtype=page.dtype, pin_memory=page.is_cuda)
    return held.copy_(page)
