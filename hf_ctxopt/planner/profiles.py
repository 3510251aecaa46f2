"""Cards one may plan for without owning them: memory, bandwidth and the CUDA context's size.

Memory and bandwidth are the makers' figures (nominal GiB, GB/s). The context is what a process takes outside of its
allocator once cuBLAS is loaded: 0.69 GiB was measured on an H200; consumer cards load fewer kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError

GIB = 1 << 30
MOST = 1 << 60
"""Of bytes, tokens or sequences: a number beyond it is a mistake."""
CONSUMER_CONTEXT = int(0.45 * GIB)
DATACENTRE_CONTEXT = int(0.69 * GIB)


@dataclass(frozen=True)
class Profile:
    """One kind of card.

    Args:
        name: what `gpu=` and `--gpu` take.
        vram: bytes of memory.
        bandwidth: bytes per second, by the data sheet.
        capability: CUDA compute capability; `""` where there is none.
        context: bytes of a process's CUDA context.
        marks: parts of the name that the driver gives the card; all of them must be there.
    """

    name: str
    vram: int
    bandwidth: float
    capability: str
    context: int = CONSUMER_CONTEXT
    marks: tuple[str, ...] = ()


def _card(name: str, gib: float, gbs: float, capability: str, *marks: str, context: int = CONSUMER_CONTEXT) -> Profile:
    return Profile(name, int(gib * GIB), gbs * 1e9, capability, context, marks)


# In the order in which names are matched: a longer mark before the shorter one that it contains.
PROFILES: dict[str, Profile] = {
    card.name: card
    for card in (
        _card("rtx4070-laptop", 8, 256, "8.9", "4070", "Laptop"),
        _card("rtx4060-laptop", 8, 256, "8.9", "4060", "Laptop"),
        _card("rtx4090-laptop", 16, 576, "8.9", "4090", "Laptop"),
        _card("rtx3060", 12, 360, "8.6", "RTX 3060"),
        _card("rtx3080", 10, 760, "8.6", "RTX 3080"),
        _card("rtx3090", 24, 936, "8.6", "RTX 3090"),
        _card("rtx4060", 8, 272, "8.9", "RTX 4060"),
        _card("rtx4060ti-16gb", 16, 288, "8.9", "RTX 4060 Ti"),
        _card("rtx4070", 12, 504, "8.9", "RTX 4070"),
        _card("rtx4070ti-super", 16, 672, "8.9", "RTX 4070 Ti SUPER"),
        _card("rtx4080", 16, 717, "8.9", "RTX 4080"),
        _card("rtx4090", 24, 1008, "8.9", "RTX 4090"),
        _card("rtx5070", 12, 672, "12.0", "RTX 5070"),
        _card("rtx5090", 32, 1792, "12.0", "RTX 5090"),
        _card("t4", 16, 320, "7.5", "T4"),
        _card("l4", 24, 300, "8.9", "L4"),
        _card("a10g", 24, 600, "8.6", "A10G"),
        _card("a100-40gb", 40, 1555, "8.0", "A100", "40GB", context=DATACENTRE_CONTEXT),
        _card("a100", 80, 2039, "8.0", "A100", context=DATACENTRE_CONTEXT),
        _card("h100", 80, 3350, "9.0", "H100", context=DATACENTRE_CONTEXT),
        _card("h200", 141e9 / GIB, 4800, "9.0", "H200", context=DATACENTRE_CONTEXT),
    )
}


def profile(name: str) -> Profile:
    """The card called `name`; case, spaces, `-` and `_` do not matter.

    Raises:
        ConfigError: there is none of that name.
    """
    wanted = _plain(name) if isinstance(name, str) else name
    for card in PROFILES.values():
        if _plain(card.name) == wanted:
            return card
    raise ConfigError("gpu", name, f"one of {', '.join(PROFILES)}")


def recognized(name: str) -> Profile | None:
    """The profile of a card by the name that its driver gives it, e.g. `"NVIDIA GeForce RTX 4070 Laptop GPU"`."""
    words = name.lower()
    fitting = [card for card in PROFILES.values() if card.marks and all(mark.lower() in words for mark in card.marks)]
    return max(fitting, key=lambda card: sum(map(len, card.marks)), default=None)


def of_size(vram: int) -> Profile:
    """The slowest card with about `vram` bytes, whose bandwidth stands for a card of which only the size is known."""
    nearest = min(abs(card.vram - vram) for card in PROFILES.values())
    alike = [card for card in PROFILES.values() if abs(card.vram - vram) <= nearest + GIB // 2]
    return min(alike, key=lambda card: card.bandwidth)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter not in " -_")
