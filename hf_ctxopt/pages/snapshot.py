"""Pages in a file: safetensors with a checksum, written atomically, and checked in full before memory is taken.

The format is that of safetensors (huggingface/safetensors, `README.md`, "Format"): 8 bytes of header length, a JSON
header, then the tensors without holes. Ours adds two metadata strings: `body`, the caller's JSON, and `digest`,
SHA-256 over everything else. Nothing in a file is ever executed: no pickle.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CorruptFileError

_MOST_HEADER = 8 << 20  # bytes: 8 MiB describe over 100,000 tensors
_PIECE = 1 << 20
_STALE = 3600  # seconds after which nobody is still writing a part
_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8, "I64": torch.int64,
          "F64": torch.float64}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A checked file.

    Args:
        path: where it lies.
        body: the caller's values.
        shapes: name → dtype and shape of each tensor.
        inode: tells the file from one that has taken its name since.
    """

    path: Path
    body: dict[str, Any]
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    inode: int

    def tensors(self) -> Any:
        """The open file, for `get_tensor(name)`: tensors are read one at a time.

        Raises:
            CorruptFileError: another file has taken its place since it was checked.
        """
        opened = safe_open(str(self.path), framework="pt")
        if self.path.stat().st_ino != self.inode:
            raise CorruptFileError(
                str(self.path), "another file has taken its place since it was checked; load it again"
            )
        return opened


def write(path: str | Path, tensors: Mapping[str, Tensor], body: Mapping[str, Any]) -> None:
    """Write a file that only its owner may read. Whatever interrupts this, `path` is the old file or the new one.

    Args:
        path: the file.
        tensors: by name, on the CPU.
        body: values that JSON can hold.
    """
    path = Path(path)
    _sweep(path)
    text = json.dumps(body)
    # A folder of mode 0700: the library that writes has temporary files of its own beside the one it is told.
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    try:
        part = folder / "pages"
        held = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(held, part, metadata={"body": text, "digest": "0" * 64})
        _sign(part)
        part.chmod(0o600)
        os.replace(part, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _sync(path.parent)


def read(path: str | Path) -> Stored:
    """Check a file: its header against its size, then its checksum. Takes a few MiB, whatever the file claims.

    Raises:
        CorruptFileError: it is damaged, truncated or not one of ours.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:  # one file from here on, whoever saves to this name meanwhile
            size, inode = os.fstat(file.fileno()).st_size, os.fstat(file.fileno()).st_ino
            header, start = _header(file, size)
            shapes = _shapes(header, size - start)
            meta = header["__metadata__"]
            if not isinstance(meta, dict) or set(meta) != {"body", "digest"}:
                raise ValueError("not a file of saved pages")
            if meta["digest"] != _digest(file, header, start):
                raise ValueError("its checksum is not that of its content")
        body = json.loads(meta["body"])
        if not isinstance(body, dict):
            raise ValueError("its body is not an object")
    except (ValueError, KeyError, TypeError, OSError, RecursionError, OverflowError) as error:
        raise CorruptFileError(str(path), str(error) or type(error).__name__) from error
    return Stored(path, body, shapes, inode)


def _sweep(path: Path) -> None:
    """Remove the parts of saves that were killed; younger ones may be another process's, which is still writing."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        try:
            if time.time() - part.stat().st_mtime > _STALE:
                shutil.rmtree(part)
        except OSError:
            continue


def _header(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(file.read(8), "little")
    if size < 10 or length > min(size - 8, _MOST_HEADER):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    raw = file.read(length)
    if not raw.startswith(b"{"):
        raise ValueError("the header is not JSON")
    header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    if not isinstance(header, dict):
        raise ValueError("the header is not an object")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in the header")
    return found


def _shapes(header: dict[str, Any], data: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Every tensor's dtype and shape, if they and their places fill the data without holes."""
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    places: list[tuple[int, int]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if set(entry) != {"dtype", "shape", "data_offsets"} or entry["dtype"] not in _TYPES:
            raise ValueError(f"tensor {name!r} is not described as it should be")
        shape, (low, high) = entry["shape"], entry["data_offsets"]
        if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 48 for n in (*shape, low, high)):
            raise ValueError(f"tensor {name!r} has impossible numbers")
        dtype = _TYPES[entry["dtype"]]
        if math.prod(shape) * dtype.itemsize != high - low:
            raise ValueError(f"tensor {name!r} is not as long as its shape")
        found[name] = dtype, tuple(shape)
        places.append((low, high))
    at = 0
    for low, high in sorted(places):
        if low != at:
            raise ValueError("tensors overlap, or leave holes")
        at = high
    if at != data:
        raise ValueError(f"{data} bytes of tensors where {at} are described")
    return found


def _digest(file: BinaryIO, header: dict[str, Any], start: int) -> str:
    """SHA-256 over the header without its digest, and the data."""
    rest = {**header, "__metadata__": {"body": header["__metadata__"]["body"]}}
    total = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    file.seek(start)
    while piece := file.read(_PIECE):
        total.update(piece)
    return total.hexdigest()


def _sign(path: Path) -> None:
    """Put the digest in the place that was left for it, and bring the file to the disk."""
    with path.open("r+b") as file:
        header, start = _header(file, path.stat().st_size)
        digest = _digest(file, header, start)
        file.seek(0)
        raw = file.read(start)
        place = raw.index(b'"digest":"' + b"0" * 64) + len(b'"digest":"')
        file.seek(place)
        file.write(digest.encode())
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
