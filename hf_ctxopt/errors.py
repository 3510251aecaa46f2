"""The package's exceptions. Every error a user can cause is a `CtxoptError`, and says which option to change."""

from __future__ import annotations

import sys
from typing import Any

_NO_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


class CtxoptError(Exception):
    """Base class of every error raised by hf_ctxopt."""


class ConfigError(CtxoptError, ValueError):
    """An option has a value that cannot work.

    Args:
        field: name of the option, e.g. `"window"`.
        value: what was given.
        allowed: the range or the alternatives, in words.
    """

    def __init__(self, field: str, value: Any, allowed: str) -> None:
        super().__init__(f"{field}={value!r}: allowed is {allowed}")
        self.field, self.value, self.allowed = field, value, allowed

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, self.value, self.allowed)


class CacheFullError(CtxoptError, RuntimeError):
    """The next tokens do not fit the cache's budget. Nothing was written and nothing was dropped.

    Args:
        needed: tokens (page slots) that the step needs in all.
        room: tokens (page slots) that the budget allows.
        option: what to change.
    """

    def __init__(self, needed: int, room: int, option: str) -> None:
        super().__init__(f"the step needs page slots for {needed} tokens, the budget has room for {room}; {option}")
        self.needed, self.room, self.option = needed, room, option

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.needed, self.room, self.option)


class UnsupportedModelError(CtxoptError, TypeError):
    """The model cannot be served correctly by this cache. Raised before the first token."""


class IntegrityError(CtxoptError, RuntimeError):
    """A cache's page accounts disagree with its page table (raised when `CTXOPT_DEBUG=1`)."""


class InterruptedStepError(CtxoptError, RuntimeError):
    """A forward pass stopped between two layers and the cache cannot go on from there."""


class CorruptFileError(CtxoptError, ValueError):
    """A file is damaged, truncated or not what it claims to be."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.reason)


class CompatibilityError(CtxoptError, ImportError):
    """The installed transformers lacks something hf_ctxopt hooks into; the message names it."""


class DoesNotFitError(CtxoptError, ValueError):
    """No setting makes the model fit the memory.

    Args:
        shortfall: bytes that are missing.
        what: what does not fit.
        remedies: what would fit, one sentence each.
    """

    def __init__(self, shortfall: int, what: str, remedies: tuple[str, ...] = ()) -> None:
        would = "".join(f"; {remedy}" for remedy in remedies)
        super().__init__(f"{what}: {shortfall:,} bytes ({shortfall / 2**30:.2f} GiB) are missing{would}")
        self.shortfall, self.what, self.remedies = shortfall, what, remedies

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.shortfall, self.what, self.remedies)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device, or the host, has no memory left. Does not import torch.

    Which errors do follows accelerate (`accelerate/utils/memory.py`, `should_reduce_batch_size`).
    """
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return type(error).__module__ in ("builtins", "torch") and any(sign in str(error) for sign in _NO_MEMORY)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; its type's name where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
