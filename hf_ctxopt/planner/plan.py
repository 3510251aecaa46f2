"""The plan: what to run with, what each byte is for, and why. Pure data, to and from JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..errors import ConfigError
from .needs import Needs
from .valid import check_fields

VERSION = 1
STORE = "sessions"
"""Name of the prefix store where several agents share one: that of `Session`."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Settings that fit a card.

    `kv_bits` and `bytes` are plain dictionaries, so that plans can be copied, pickled and taken apart by `asdict`.
    They belong to the plan and are not to be changed: `dataclasses.replace` makes another plan.

    Args:
        model: what the model was given as; loadable if it is a folder, a file or a Hub id.
        device: the card, by torch's name or its profile's.
        goal: `"quality"`, `"context"` or `"speed"`.
        weights: scheme of the weights (`schemes.py`), or `"loaded"` for a model as it stands.
        kv_bits: bits of a full page's keys and values, `{"k": ..., "v": ...}`; 16 is the model's dtype.
        cache: name of the cache.
        window: last tokens that are kept, with `sinks` first ones; `None` keeps all.
        sinks: first tokens that are always kept; `None` without a window.
        context: tokens of each sequence that the plan is for.
        capacity: tokens of each sequence that the pages hold at most; `None` for any number (a window).
        batch: sequences at once.
        agents: sequences whose pages are kept between calls.
        page_size: tokens of a page.
        pages: growing pages that the memory left for them holds.
        page_bytes: bytes of one, over all layers that grow.
        page_budget: bytes left for them: `pages * page_bytes <= page_budget < (pages + 1) * page_bytes`.
        kv_budget: bytes of all pages, those that do not grow included.
        chunk: tokens of a prefill chunk.
        on_host: of `"embedding"` and `"head"`, those kept in the host's memory.
        host_bytes: bytes of these.
        vram: bytes of the card.
        bytes: expected bytes on the card by part (`valid.PARTS`), with the pages of `context` tokens.
        ms_per_token: expected time of a decode step at `context` tokens; `None` if the bandwidth is unknown.
        quality: class of what is given up (`ladder.py`), and `", windowed"` where tokens are forgotten.
        reasons: what was tried and why it was rejected, and what to know of the choice.
        needs: what the prompt needs that the plan was made for (`needs.py`); `None` without one.

    Raises:
        ConfigError: a field has a value that no plan has (`valid.py`).
    """

    model: str
    device: str
    goal: str
    weights: str
    kv_bits: Mapping[str, int]
    cache: str
    window: int | None
    sinks: int | None
    context: int
    capacity: int | None
    batch: int
    agents: int
    page_size: int
    pages: int
    page_bytes: int
    page_budget: int
    kv_budget: int
    chunk: int
    on_host: tuple[str, ...]
    host_bytes: int
    vram: int
    bytes: Mapping[str, int]
    ms_per_token: float | None
    quality: str
    reasons: tuple[str, ...] = field(default=())
    needs: Needs | None = None

    def __post_init__(self) -> None:
        check_fields({part.name: getattr(self, part.name) for part in fields(self)})
        for name, kind in (("on_host", tuple), ("reasons", tuple), ("kv_bits", dict), ("bytes", dict)):
            object.__setattr__(self, name, kind(getattr(self, name)))  # the caller's may change

    @property
    def total_bytes(self) -> int:
        """Bytes of all parts, the reserve included."""
        return sum(self.bytes.values())

    @property
    def cache_options(self) -> dict[str, Any]:
        """Options of the cache, as `patch_model(cache=..., **options)` and `cache_config` take them."""
        options: dict[str, Any] = {"page_size": self.page_size, "kv_bits": dict(self.kv_bits)}
        if self.cache == "ctx_prefix":
            options["store"] = STORE
        if self.window is None:
            return {**options, "budget": f"{self.kv_budget}B"}
        return {**options, "window": self.window, "sinks": self.sinks}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` makes the same plan of them."""
        values = asdict(self)
        lists = {"on_host": list(self.on_host), "reasons": list(self.reasons)}
        needs = None if self.needs is None else self.needs.to_dict()
        return {"version": VERSION, **values, **lists, "needs": needs, "total_bytes": self.total_bytes}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """The plan that `to_dict` wrote.

        Raises:
            ConfigError: a field is missing, unknown or of another version, has a value that no plan has
                (`valid.py`), or the bytes do not add up.
        """
        if not isinstance(values, Mapping):
            raise ConfigError("plan", values, "a dictionary that Plan.to_dict() wrote")
        if type(values.get("version")) is not int or values["version"] != VERSION:
            raise ConfigError("version", values.get("version"), f"{VERSION}: a plan of this version of hf_ctxopt")
        given = {key: value for key, value in values.items() if key not in ("version", "total_bytes")}
        given = {"needs": None, **given}  # plans of before there were any have none
        names = {part.name for part in fields(cls)}
        if wrong := sorted(map(str, names.symmetric_difference(given))):
            raise ConfigError("plan", wrong, f"exactly the fields {', '.join(sorted(names))}")
        needs = None if given["needs"] is None else Needs.from_dict(given["needs"])
        plan = cls(**{**given, "needs": needs})
        if values.get("total_bytes", plan.total_bytes) != plan.total_bytes:
            raise ConfigError("total_bytes", values["total_bytes"], f"{plan.total_bytes}, the sum of the parts")
        return plan

    def __str__(self) -> str:
        from .words import described

        return described(self)
