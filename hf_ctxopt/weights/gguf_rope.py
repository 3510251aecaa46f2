"""Scaled rotary embeddings in `.gguf` files, as llama.cpp's converter writes them.

Linear and YaRN scaling are metadata (`<architecture>.rope.scaling.*`). Llama-3's is a tensor, `rope_freqs.weight`,
which each frequency is divided by. transformers reads neither, so a file is read back here.
Source: llama.cpp `convert_hf_to_gguf.py`, `LlamaModel.generate_extra_tensors` and `set_gguf_parameters`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError

logger = logging.getLogger(__name__)
FREQUENCIES = "rope_freqs.weight"
_ORIGINAL = "original_max_position_embeddings"
_PLAIN = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
# Scaling -> parameters that a file can hold -> key behind `rope.scaling.`; others change the result in ways it cannot.
_KEYS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "yarn": {
        "factor": "factor",
        _ORIGINAL: "original_context_length",
        "beta_fast": "yarn_beta_fast",
        "beta_slow": "yarn_beta_slow",
    },
    "llama3": {"factor": "", "low_freq_factor": "", "high_freq_factor": "", _ORIGINAL: ""},
}


def rotary_of(config: Any) -> dict[str, Any]:
    """Rotary parameters of the full-attention layers; other layers' bases are the architecture's own.

    Raises:
        UnsupportedModelError: a scaling, or a parameter of one, that no file can hold.
    """
    facts = dict(getattr(config, "rope_parameters", None) or {})
    if "full_attention" in facts:
        facts = dict(facts["full_attention"])
    kind = facts.setdefault("rope_type", "default")
    known = _KEYS.get(kind)
    if known is None:
        raise UnsupportedModelError(f"no .gguf is written for the rotary scaling {kind!r}; known: {', '.join(_KEYS)}")
    odd = sorted(key for key, value in facts.items() if key not in {*_PLAIN, *known} and value is not None)
    # What follows from others anyway is often written out.
    if odd and not (odd == [_ORIGINAL] and kind in ("default", "linear")):
        raise UnsupportedModelError(f"no .gguf is written for {kind!r} rotary scaling with {', '.join(odd)}")
    facts.setdefault("rope_theta", 10000.0)
    return facts


def scaling_metadata(rotary: Mapping[str, Any], architecture: str) -> dict[str, str | int | float]:
    """Metadata keys of a scaling; empty for none, and for Llama-3's, which is a tensor."""
    kind = rotary["rope_type"]
    if kind in ("default", "llama3"):
        return {}
    found: dict[str, str | int | float] = {f"{architecture}.rope.scaling.type": kind}
    for name, key in _KEYS[kind].items():
        value = rotary.get(name)
        if value is not None:
            found[f"{architecture}.rope.scaling.{key}"] = int(value) if name == _ORIGINAL else float(value)
    return found


def frequency_divisors(rotary: Mapping[str, Any], channels: int) -> Tensor | None:
    """What Llama-3 scaling divides each frequency by, float32 (channels / 2,); `None` for other scalings.

    Args:
        rotary: from `rotary_of`.
        channels: of a head that are rotated.
    """
    if rotary["rope_type"] != "llama3":
        return None
    return _divisors(
        _waves(float(rotary["rope_theta"]), channels), float(rotary["factor"]), float(rotary["low_freq_factor"]),
        float(rotary["high_freq_factor"]), float(rotary[_ORIGINAL]),
    )  # fmt: skip


def scaling_in(
    metadata: Mapping[str, Any], architecture: str, divisors: Tensor | None, theta: float
) -> dict[str, Any]:
    """The parameters of a file's scaling, as `rope_parameters` has them; empty for none.

    Args:
        metadata: of the file.
        architecture: of the file.
        divisors: its `rope_freqs.weight`, if it has one.
        theta: base of the frequencies.
    """
    if divisors is not None and bool((divisors != 1).any()):
        found = _fitted(divisors.float(), theta)
        if found is None:
            logger.warning("%s is no Llama-3 scaling: the frequencies of positions stay unscaled", FREQUENCIES)
        return found or {}
    kind = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if kind not in ("linear", "yarn"):
        if kind not in ("none", "default", ""):
            logger.warning("the rotary scaling %r of the file is not known: positions stay unscaled", kind)
        return {}
    values = {name: metadata.get(f"{architecture}.rope.scaling.{key}") for name, key in _KEYS[str(kind)].items()}
    if not values["factor"]:
        return {}
    return {"rope_type": str(kind), **{name: value for name, value in values.items() if value is not None}}


def _waves(theta: float, channels: int) -> Tensor:
    """Wave length of each frequency, in tokens."""
    return 2 * math.pi * theta ** (torch.arange(0, channels, 2, dtype=torch.float64) / channels)


def _divisors(waves: Tensor, factor: float, low: float, high: float, original: float) -> Tensor:
    smooth = (original / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    found = torch.where(waves > original / low, factor, torch.where(waves < original / high, 1.0, between))
    return found.float()


def _fitted(divisors: Tensor, theta: float) -> dict[str, Any] | None:
    """Llama-3 parameters that give these divisors; `None` if there are none.

    Between the bands the inverse of a divisor is linear in the frequency; two of them fix the line. Only the ratios of
    original length, low and high factor count, so the low factor is one, as in every published model.
    """
    waves = _waves(theta, 2 * len(divisors))
    factor = float(divisors.max())
    inside = (divisors > 1.0001) & (divisors < 0.9999 * factor)
    if factor <= 1 or int(inside.sum()) < 2:
        return None
    smooth = (1 / divisors[inside].double() - 1 / factor) / (1 - 1 / factor)
    x = 1 / waves[inside]
    slope = float((smooth[0] - smooth[-1]) / (x[0] - x[-1]))
    offset = float(smooth[0] - slope * x[0])
    if slope <= 0 or offset >= 0:
        return None
    high = 1 - 1 / offset
    original = round(slope * (high - 1))
    high = round(high, 4)
    again = _divisors(waves, factor, 1.0, high, original)
    if not torch.allclose(again, divisors, rtol=2e-3):
        return None
    return {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": high,
            _ORIGINAL: original}  # fmt: skip
