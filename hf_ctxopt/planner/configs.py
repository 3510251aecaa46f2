"""Reading a model's config from a path, a `.gguf` file, a Hub id or a dictionary, with errors of one line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..weights.gguf_file import GgufFile


def gguf_file(spec: str) -> GgufFile | None:
    """The `.gguf` file that a path names, if it names one."""
    path = Path(spec).expanduser()
    return GgufFile(path) if path.suffix == ".gguf" and path.is_file() else None


def config_at(spec: str, file: GgufFile | None) -> Any:
    """The config at a path or of a Hub id; that of `file`, if it is one. Raises `ConfigError`: there is none."""
    from transformers import AutoConfig

    path = Path(spec).expanduser()
    if (
        file is None
        and not path.exists()
        and (path.is_absolute() or spec.startswith((".", "~")) or spec.count("/") > 1 or path.suffix == ".gguf")
    ):
        raise ConfigError("model", spec, "an existing folder, config.json or .gguf file, or a Hub id")
    if file is not None:
        from ..weights.gguf_load import gguf_config

        return gguf_config(file)
    try:
        return AutoConfig.from_pretrained(str(path) if path.exists() else spec)
    except broken() as error:
        allowed = f"one whose config transformers can read ({reason(error)})"
        if not path.exists():
            allowed = f"an existing folder or file, or a Hub id that can be reached ({reason(error)})"
        raise ConfigError("model", spec, allowed) from error


def config_of(values: Mapping[str, Any]) -> Any:
    """The config that a dictionary describes. Raises `ConfigError`: transformers cannot make it."""
    from transformers import CONFIG_MAPPING, AutoConfig

    given = dict(values)
    kind = given.pop("model_type", None)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ConfigError("model_type", kind, "a type that this version of transformers knows")
    try:
        return AutoConfig.for_model(kind, **given)
    except broken() as error:
        raise ConfigError("model", kind, f"a config that transformers can read ({reason(error)})") from error


def broken() -> tuple[type[Exception], ...]:
    """What transformers raises for a config that is not there or whose values make no sense: no type of its own."""
    from huggingface_hub.errors import StrictDataclassError

    return (
        OSError, ImportError, StrictDataclassError, ValueError, TypeError, LookupError, AttributeError,
        ArithmeticError, AssertionError, RuntimeError,
    )  # fmt: skip


def reason(error: Exception) -> str:
    """The message in one line."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}"[:240]
