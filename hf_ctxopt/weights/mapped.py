"""Gives back the file pages behind a weight that has been read and is not needed any more.

transformers maps a safetensors file and hands out views of it: every page that was read stays in the process's
resident memory until the file is closed, so packing a model while it is loaded would hold all of its dense bytes. The
kernel can be told that the pages of one tensor are not wanted; another look at them would read the file again.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

MAPS = Path("/proc/self/maps")


def real_paths(files: Iterable[str | os.PathLike[str]] | None) -> frozenset[str]:
    """The files as the kernel names them: absolute and without links."""
    return frozenset(os.path.realpath(file) for file in files or ())


def release(weight: Tensor, files: frozenset[str]) -> int:
    """Drop the resident pages of `weight` if it is a view of one of `files`.

    Only whole pages inside the tensor are dropped, and only where the address lies in a mapping of such a file:
    dropping anonymous memory would turn it into zeros. What was written to a private mapping is lost too, so this is
    for tensors that nobody but the loader has seen.

    Args:
        weight: any tensor.
        files: from `real_paths`.

    Returns:
        Bytes of the pages; 0 where the tensor is no view of such a file, or the system is not Linux.
    """
    if not files or weight.device.type != "cpu" or not weight.is_contiguous() or not weight.numel():
        return 0
    advise = _madvise()
    start, size = weight.data_ptr(), weight.numel() * weight.element_size()
    if advise is None or not _is_mapped(start, size, files):
        return 0
    page = mmap.PAGESIZE
    first, last = -(-start // page) * page, (start + size) // page * page
    if first >= last or advise(first, last - first, mmap.MADV_DONTNEED) != 0:
        return 0
    return last - first


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """libc's `madvise`; `None` where its meaning is another."""
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return function


def _is_mapped(start: int, size: int, files: frozenset[str]) -> bool:
    """Whether all of the bytes from `start` lie in one mapping of one of `files`."""
    try:
        lines = MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    for line in lines:
        span, *_, name = line.split(None, 5)
        low, _, high = span.partition("-")
        if int(low, 16) <= start < int(high, 16):
            return name in files and start + size <= int(high, 16)
    return False
