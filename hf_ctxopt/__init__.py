"""hf_ctxopt: KV caches that make a Hugging Face model's context fit the GPU it runs on.

Importing the package registers its cache names with transformers; `unregister()` takes them away. Everything else is
loaded when it is first used, so the import itself is cheap.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from .errors import (
    CacheFullError,
    CompatibilityError,
    ConfigError,
    CorruptFileError,
    CtxoptError,
    DoesNotFitError,
    IntegrityError,
    InterruptedStepError,
    UnsupportedModelError,
)
from .integration.register import register, unregister

if TYPE_CHECKING:
    from .caches import PagedCache, PrefixCache, PriorityCache, SinkCache
    from .caches.stores import drop_store, stores
    from .integration.build import make_cache
    from .integration.load import load
    from .integration.messages import priorities_from_messages
    from .integration.patch import patch_model, patched, unpatch_model
    from .integration.probed import plan
    from .integration.saved import load_store, save_store
    from .integration.session import Session
    from .planner.plan import Plan
    from .weights.config import GgufQuantConfig
    from .weights.gguf_load import load_gguf
    from .weights.gguf_save import save_gguf
    from .weights.in_memory import quantize_
    from .weights.lora import packed_lora

__version__ = "0.1.0"

__all__ = [
    "CacheFullError",
    "CompatibilityError",
    "ConfigError",
    "CorruptFileError",
    "CtxoptError",
    "DoesNotFitError",
    "GgufQuantConfig",
    "IntegrityError",
    "InterruptedStepError",
    "PagedCache",
    "Plan",
    "PrefixCache",
    "PriorityCache",
    "Session",
    "SinkCache",
    "UnsupportedModelError",
    "__version__",
    "drop_store",
    "load",
    "load_gguf",
    "load_store",
    "make_cache",
    "packed_lora",
    "patch_model",
    "patched",
    "plan",
    "priorities_from_messages",
    "quantize_",
    "register",
    "save_gguf",
    "save_store",
    "stores",
    "unpatch_model",
    "unregister",
]

_LAZY = {
    "GgufQuantConfig": ".weights.config",
    "PagedCache": ".caches",
    "Plan": ".planner.plan",
    "PrefixCache": ".caches",
    "PriorityCache": ".caches",
    "Session": ".integration.session",
    "SinkCache": ".caches",
    "drop_store": ".caches.stores",
    "load": ".integration.load",
    "load_gguf": ".weights.gguf_load",
    "load_store": ".integration.saved",
    "make_cache": ".integration.build",
    "packed_lora": ".weights.lora",
    "patch_model": ".integration.patch",
    "patched": ".integration.patch",
    "plan": ".integration.probed",
    "priorities_from_messages": ".integration.messages",
    "quantize_": ".weights.in_memory",
    "save_gguf": ".weights.gguf_save",
    "save_store": ".integration.saved",
    "stores": ".caches.stores",
    "testing": ".testing",
    "unpatch_model": ".integration.patch",
}

logging.getLogger(__name__).addHandler(logging.NullHandler())
register()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = import_module(_LAZY[name], __name__)
    return module if name == "testing" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
