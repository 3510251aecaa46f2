"""Compiles `attention.cpp` and `gguf.cpp` for this machine's processor, once, and loads them with ctypes.

A library knows nothing of torch: plain pointers, a build of a few seconds, no dependence on torch's ABI. It is kept in
`$CTXOPT_CACHE_DIR/native` (default `$XDG_CACHE_HOME/hf_ctxopt`), a folder that only its owner may write, under a
name made of source, processor, compiler and flags: a home folder shared by unlike machines holds one for each.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

SOURCE, GGUF_SOURCE = (Path(__file__).with_name(name) for name in ("attention.cpp", "gguf.cpp"))
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-w")
_TIMEOUT = 120  # seconds; the build takes three on an idle machine

logger = logging.getLogger(__name__)


class NotBuilt(Exception):
    """There is no library, and the message says why. Never reaches the user."""


def library() -> ctypes.CDLL:
    """The loaded library of attention, compiled if need be.

    Raises:
        NotBuilt: it is switched off, or there is no compiler, or it failed; not tried again in this process.
    """
    return _or_raise(_loaded(SOURCE))


def gguf_library() -> ctypes.CDLL:
    """The loaded library over GGUF blocks, compiled if need be. Raises `NotBuilt`, as `library` does."""
    return _or_raise(_loaded(GGUF_SOURCE))


def _or_raise(found: ctypes.CDLL | str) -> ctypes.CDLL:
    if isinstance(found, str):
        raise NotBuilt(found)
    return found


def forget() -> None:
    """Forget what was loaded or failed: the next call tries again."""
    _loaded.cache_clear()


def compiler() -> str:
    """The path of the compiler. Raises `NotBuilt`: it is switched off, or there is none; nothing is compiled here."""
    if os.environ.get("CTXOPT_NATIVE", "1") == "0":
        raise NotBuilt("CTXOPT_NATIVE=0 switches the CPU kernel off")
    found = shutil.which("g++") if os.name == "posix" else None
    if found is None:
        raise NotBuilt("there is no g++ to compile the CPU kernel with")
    return found


@cache
def _loaded(source: Path) -> ctypes.CDLL | str:
    try:
        path = _build(compiler(), source)
        loaded = ctypes.CDLL(str(path))
    except NotBuilt as error:
        return str(error)
    except subprocess.CalledProcessError as error:
        return f"g++ could not compile the CPU kernel: {(error.stderr or '').strip()[:500]}"
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:  # RuntimeError: there is no home folder
        return f"the CPU kernel could not be built or loaded: {error}"
    number, pointer, real = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
    arguments: dict[str, tuple[Any, ...]] = {
        "ctxopt_attend": (pointer, *[number] * 5, real, real, pointer, pointer, number, pointer),
        "ctxopt_gguf_matmul": (number, pointer, pointer, *[number] * 4, pointer),
        "ctxopt_gguf_decode": (number, pointer, number, number, pointer),
    }
    for name, types in arguments.items():
        function = getattr(loaded, name, None)
        if function is not None:
            function.argtypes, function.restype = types, None
    return loaded


def _build(compiler: str, source: Path) -> Path:
    """The library's path; compiled under a temporary name, so that no process ever loads half of it."""
    runtime = _openmp()
    words = [_processor(), compiler, *FLAGS, *runtime, torch.__version__, platform.machine()]
    key = hashlib.sha256(source.read_bytes() + "\0".join(words).encode()).hexdigest()[:24]
    folder = _folder()
    path = folder / f"{source.stem}-{key}.so"
    if not path.exists():
        handle, name = tempfile.mkstemp(suffix=".so.tmp", dir=folder)
        os.close(handle)
        try:
            logger.info("compiling the CPU kernel once, into %s", path)
            command = [compiler, *FLAGS, "-o", name, str(source), "-Wl,--as-needed", *runtime]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT)
            Path(name).replace(path)
        finally:
            Path(name).unlink(missing_ok=True)
    return path


def _folder() -> Path:
    """Where libraries are kept.

    Raises:
        PermissionError: others could put code there.
    """
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_ctxopt"
    folder = Path(os.environ.get("CTXOPT_CACHE_DIR") or kept) / "native"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder} must belong to you and be writable by nobody else")
    return folder


def _openmp() -> list[str]:
    """The OpenMP library torch has loaded, to link with: two of them would wait for each other's threads."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text(encoding="utf-8").splitlines() if maps.exists() else []
    return sorted({line.split()[-1] for line in lines if "/libgomp" in line})[:1]


def _processor() -> str:
    """Model and instruction sets, as Linux names them."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(names)}))
