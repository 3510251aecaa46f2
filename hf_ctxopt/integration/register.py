"""Adding our names to transformers, and taking them away.

Importing hf_ctxopt must cost nothing, so the heavy modules are not imported here: a finder waits until
somebody imports them, and edits them then. Modules that are loaded already are edited at once.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from threading import RLock
from types import ModuleType
from typing import Any

NAMES = ("ctx_paged", "ctx_sink", "ctx_priority", "ctx_prefix", "ctx_auto")
_ATTENTION = "ctxopt"
_lock = RLock()

Method = Callable[..., Any]
_WRAPPERS = {
    "_prepare_cache_for_generation": ("generate", "wrap_prepare_cache"),
    "_prefill": ("prefill", "wrap_prefill"),
    "_sample": ("prefill", "wrap_decoding"),
    "_beam_search": ("prefill", "wrap_decoding"),
    "_assisted_decoding": ("prefill", "wrap_decoding"),
}
_wrapped: dict[str, tuple[Method, Method]] = {}  # by name: the original method and the wrapper put in its place


def _add_names(module: ModuleType) -> None:
    from .compat import check_configuration

    check_configuration(module)
    known = module.ALL_CACHE_IMPLEMENTATIONS
    module.ALL_CACHE_IMPLEMENTATIONS = known + tuple(name for name in NAMES if name not in known)  # type: ignore[attr-defined]


def _remove_names(module: ModuleType) -> None:
    known = module.ALL_CACHE_IMPLEMENTATIONS
    module.ALL_CACHE_IMPLEMENTATIONS = tuple(name for name in known if name not in NAMES)  # type: ignore[attr-defined]


def _wrap_generation(module: ModuleType) -> None:
    from .compat import check_generation

    check_generation(module)
    for name in _WRAPPERS:
        method = getattr(module.GenerationMixin, name)
        # Somebody else's method, once we are in place, is taken to wrap ours; the original means we were taken out.
        if name not in _wrapped or method is _wrapped[name][0]:
            _wrapped[name] = (method, _late(name, method))
            setattr(module.GenerationMixin, name, _wrapped[name][1])


def _late(name: str, original: Method) -> Method:
    """The wrapper, built on its first call: its own imports need transformers fully loaded."""
    built: list[Method] = []

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _finder not in sys.meta_path:
            return original(self, *args, **kwargs)
        if not built:
            room, function = _WRAPPERS[name]
            built.append(getattr(importlib.import_module(f".{room}", __package__), function)(original))
        return built[0](self, *args, **kwargs)

    return wrapper


def _unwrap_generation(module: ModuleType) -> None:
    # Where somebody has wrapped our wrapper since, it stays inside theirs and only calls on (see `_late`).
    for name, (original, wrapper) in list(_wrapped.items()):
        if getattr(module.GenerationMixin, name) is wrapper:
            setattr(module.GenerationMixin, name, original)
            del _wrapped[name]


@functools.cache
def _attention_function() -> Callable[..., Any]:
    # Asked once: an import statement takes as long as a small tensor operation, and each layer of a step comes here.
    from .attention import ctxopt_attention

    return ctxopt_attention


def _attention(*args: Any, **kwargs: Any) -> Any:
    return _attention_function()(*args, **kwargs)


def _mask(**kwargs: Any) -> Any:
    from .mask import lazy_mask

    return lazy_mask(**kwargs)


def _add_attention(module: ModuleType) -> None:
    from .compat import check_registry

    check_registry(module.AttentionInterface, "AttentionInterface")
    module.AttentionInterface.register(_ATTENTION, _uncompiled_attention())


@functools.cache
def _uncompiled_attention() -> Any:
    """One object for the process. Compiled layers (`compiled.py`) break at it: it reads what the host has planned."""
    return sys.modules["torch"].compiler.disable(_attention)


def _remove_attention(module: ModuleType) -> None:
    module.AttentionInterface._global_mapping.pop(_ATTENTION, None)


def _add_mask(module: ModuleType) -> None:
    from .compat import check_registry

    check_registry(module.AttentionMaskInterface, "AttentionMaskInterface")
    module.AttentionMaskInterface.register(_ATTENTION, _mask)


def _remove_mask(module: ModuleType) -> None:
    module.AttentionMaskInterface._global_mapping.pop(_ATTENTION, None)


def _add_quantizer(module: ModuleType) -> None:
    from ..weights.config import METHOD, GgufQuantConfig
    from ..weights.quantizer import GgufQuantizer

    module.auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = GgufQuantConfig
    module.auto.AUTO_QUANTIZER_MAPPING[METHOD] = GgufQuantizer


def _remove_quantizer(module: ModuleType) -> None:
    for mapping in (module.auto.AUTO_QUANTIZATION_CONFIG_MAPPING, module.auto.AUTO_QUANTIZER_MAPPING):
        mapping.pop("ctxopt_gguf", None)


Edit = Callable[[ModuleType], None]
_EDITS: dict[str, tuple[Edit, Edit]] = {
    "transformers.generation.configuration_utils": (_add_names, _remove_names),
    "transformers.generation.utils": (_wrap_generation, _unwrap_generation),
    "transformers.modeling_utils": (_add_attention, _remove_attention),
    "transformers.masking_utils": (_add_mask, _remove_mask),
    "transformers.quantizers": (_add_quantizer, _remove_quantizer),
}


class _EditingLoader(Loader):
    """Loads a module as its own loader does, edits it, and leaves it to its own loader again."""

    def __init__(self, loader: Loader, name: str) -> None:
        self._loader, self._name = loader, name

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        if _finder in sys.meta_path:
            _EDITS[self._name][0](module)

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # an empty copy of this object
            raise AttributeError(name)
        return getattr(self._loader, name)


class _Finder(MetaPathFinder):
    """Finds the modules we edit through the other finders, and puts our loader around theirs."""

    def __init__(self) -> None:
        self._busy: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _EDITS or fullname in self._busy:
            return None
        self._busy.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._busy.discard(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _EditingLoader(spec.loader, fullname)
        return spec


_finder = _Finder()


def register() -> None:
    """Make the cache names and the attention function known to transformers. Idempotent; runs on import."""
    with _lock:
        if _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)
        for name, (add, _) in _EDITS.items():
            module = sys.modules.get(name)
            if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
                add(module)


def unregister() -> None:
    """Take every name and wrapper away again. Patched models should be unpatched before."""
    with _lock:
        if _finder in sys.meta_path:
            sys.meta_path.remove(_finder)
        for name, (_, remove) in _EDITS.items():
            module = sys.modules.get(name)
            if module is not None:
                remove(module)
