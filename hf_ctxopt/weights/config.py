"""`GgufQuantConfig`: what `from_pretrained(quantization_config=...)` is given, and a saved model's config holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from .selection import Choice

METHOD = "ctxopt_gguf"


class GgufQuantConfig(QuantizationConfigMixin):
    """Pack a model's linears and embeddings in GGUF blocks while it is loaded.

    Args:
        mix: "Q4_K_M", "Q4_K_S", "Q5_K_M", "Q6_K", "Q8_0" …: the type of each tensor by llama.cpp's rules.
        include: regular expressions of the modules to pack; all by default.
        exclude: regular expressions of modules that stay as they are.
        overrides: regular expression of module names -> block type, e.g. `{"lm_head": "Q8_0"}`.
        types: module -> block type as they are in a saved model; written by `save_pretrained`.

    Raises:
        ConfigError: unknown mix or type, a bad pattern.
    """

    def __init__(
        self, mix: str = "Q4_K_M", include: Sequence[str] | None = None, exclude: Sequence[str] | None = None,
        overrides: Mapping[str, str] | None = None, types: Mapping[str, str] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        self.quant_method: Any = METHOD
        self.mix = mix
        self.include = include if include is None or isinstance(include, str) else list(include)
        self.exclude = exclude if exclude is None or isinstance(exclude, str) else list(exclude)
        self.overrides = dict(overrides or {})
        self.types = None if types is None else dict(types)
        self.choice()

    def choice(self) -> Choice:
        """The same as checked rules."""
        return Choice(self.mix, self.include, self.exclude, self.overrides)
