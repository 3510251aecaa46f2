"""The header of a `.gguf` file: metadata and the tensors' places, checked against the file before anything is used.

Stricter than the `gguf` package's reader, which trusts counts and lengths; the rules on tensor data are llama.cpp's
(`ggml/src/gguf.cpp`): tensors follow each other without gaps but for the padding to the alignment.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import CorruptFileError
from .gguf_cursor import LONGEST_KEY, LONGEST_NAME, Cursor
from .gguf_types import ALIGNMENT, MAGIC, TENSOR_TYPES, VERSIONS

SMALLEST_VALUE = 8 + 1 + 4 + 1  # bytes of a key of one letter, its type and one byte of value
SMALLEST_TENSOR = 8 + 1 + 4 + 8 + 4 + 8  # bytes of a name of one letter, one dimension, type and offset
MOST_TENSORS = MOST_VALUES = 1 << 16
MOST_DIMENSIONS = 4
LARGEST_ALIGNMENT = 1 << 20


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies.

    Args:
        name: llama.cpp's name.
        type: name of its type, a key of `BLOCKS` or another of `TENSOR_TYPES`.
        shape: rows first, as torch has it; the file lists dimensions the other way round.
        offset: bytes from the start of the file.
        nbytes: bytes of its data.
        row_bytes: bytes of a row, i.e. of the last dimension.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    row_bytes: int


@dataclass(frozen=True)
class Header:
    """What a checked header says. `data` is the mapped file."""

    path: str
    version: int
    metadata: Mapping[str, object]
    tensors: Mapping[str, TensorPlace]
    alignment: int
    data: mmap.mmap = field(repr=False)


def read_header(path: str | os.PathLike[str]) -> Header:
    """Reads and checks the header of `path`; allocates no more than the header's own size.

    Raises:
        CorruptFileError: anything in it is impossible, or the file is shorter or longer than it says.
        OSError: the file cannot be opened.
    """
    with Path(path).open("rb") as file:
        if os.fstat(file.fileno()).st_size < 24:
            raise CorruptFileError(str(path), "shorter than a GGUF header")
        # A private copy: torch wants writable memory; nothing is written to the file.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    cursor = Cursor(data, str(path))
    if data[cursor.need(4, "the magic") : 4] != MAGIC:
        cursor.fail(f"begins with {data[:4]!r}, not {MAGIC!r}")
    version = cursor.u32("the version")
    if version not in VERSIONS:
        cursor.fail(f"GGUF version {version} (0x{version:08x}); read are {VERSIONS}, little-endian")
    tensors, values = cursor.u64("the number of tensors"), cursor.u64("the number of values")
    if tensors > MOST_TENSORS or values > MOST_VALUES:
        cursor.fail(f"{tensors} tensors and {values} values; allowed is {MOST_TENSORS} of each")
    if tensors * SMALLEST_TENSOR + values * SMALLEST_VALUE > cursor.size - cursor.at:
        cursor.fail(f"{tensors} tensors and {values} values do not fit {cursor.size} bytes")
    metadata = _metadata(cursor, values)
    alignment = _alignment(cursor, metadata)
    places = _places(cursor, tensors, alignment)
    return Header(str(path), version, metadata, places, alignment, data)


def _metadata(cursor: Cursor, count: int) -> dict[str, object]:
    metadata: dict[str, object] = {}
    for _ in range(count):
        key = cursor.name("a key", LONGEST_KEY)
        if key in metadata:
            cursor.fail(f"the key {key} comes twice")
        metadata[key] = cursor.value(key)
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        cursor.fail("general.architecture is missing or no string")
    return metadata


def _alignment(cursor: Cursor, metadata: Mapping[str, object]) -> int:
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= LARGEST_ALIGNMENT or alignment & (alignment - 1):
        cursor.fail(f"general.alignment is {alignment!r}; allowed is a power of two up to {LARGEST_ALIGNMENT}")
    return alignment


def _places(cursor: Cursor, count: int, alignment: int) -> dict[str, TensorPlace]:
    found: dict[str, TensorPlace] = {}
    for _ in range(count):
        place = _place(cursor, alignment)
        if place.name in found:
            cursor.fail(f"the tensor {place.name} comes twice")
        found[place.name] = place
    start = _padded(cursor.at, alignment)
    end = 0
    for place in sorted(found.values(), key=lambda place: place.offset):
        if place.offset != end:
            fault = "overlaps the one before it" if place.offset < end else "leaves a gap"
            cursor.fail(f"the tensor {place.name} at {place.offset} of the data {fault}, which ends at {end}")
        last = place.offset + place.nbytes
        if last > cursor.size - start:
            cursor.fail(f"the tensor {place.name} ends at byte {start + last}, the file at {cursor.size}")
        end = _padded(last, alignment)
    if cursor.size > start + end:
        cursor.fail(f"{cursor.size - start - end} bytes after the last tensor")
    return {
        name: TensorPlace(name, p.type, p.shape, start + p.offset, p.nbytes, p.row_bytes) for name, p in found.items()
    }


def _place(cursor: Cursor, alignment: int) -> TensorPlace:
    name = cursor.name("a tensor's name", LONGEST_NAME)
    dimensions = cursor.u32(f"the dimensions of {name}")
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        cursor.fail(f"the tensor {name} has {dimensions} dimensions; allowed is 1 to {MOST_DIMENSIONS}")
    sizes = [cursor.u64(f"a dimension of {name}") for _ in range(dimensions)]
    number, offset = cursor.u32(f"the type of {name}"), cursor.u64(f"the offset of {name}")
    if number not in TENSOR_TYPES:
        cursor.fail(f"the tensor {name} has the unknown type {number}")
    kind, block, nbytes = TENSOR_TYPES[number]
    if min(sizes) < 1 or sizes[0] % block:
        cursor.fail(f"the tensor {name} has the dimensions {sizes}; {kind} takes rows of whole blocks of {block}")
    if offset % alignment:
        cursor.fail(f"the tensor {name} is at {offset}, no multiple of the alignment {alignment}")
    row = sizes[0] // block * nbytes
    return TensorPlace(name, kind, tuple(reversed(sizes)), offset, row * math.prod(sizes[1:]), row)


def _padded(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
