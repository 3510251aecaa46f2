"""Damaged `.gguf` files: every one is refused with a reason, at once, and without memory to speak of.

The damage is chosen to make the file invalid. A bit flipped in a metadata value, a token or a weight leaves a valid
file with another content, which no reader can tell; such flips are not among these.
"""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_ctxopt.errors import CorruptFileError
from hf_ctxopt.weights.gguf_file import GgufFile
from tests.weights.gguf_bytes import TENSORS, Recipe, build, values

LIMIT_S, LIMIT_BYTES = 0.5, 50e6


def flipped(made: Recipe, label: str, bit: int) -> bytes:
    body = bytearray(made.body)
    body[made.fields[label][0] + bit // 8] ^= 1 << bit % 8
    return bytes(body)


def replaced(made: Recipe, label: str, value: int) -> bytes:
    at, width = made.fields[label]
    body = bytearray(made.body)
    body[at : at + width] = struct.pack("<I" if width == 4 else "<Q", value)
    return bytes(body)


def truncations(made: Recipe) -> Iterator[tuple[str, bytes]]:
    """Up to the last byte of the last tensor, which ends without padding."""
    end = len(made.body)
    for part in range(60):
        size = part * (end - 1) // 59
        yield f"cut to {size}", bytes(made.body[:size])


def flips(made: Recipe) -> Iterator[tuple[str, bytes]]:
    """Bits of the structure: magic, version (not 3 -> 2), counts, lengths, high bits of types, sizes, offsets."""
    bits = {"magic": (0, 9, 31), "version": (1, 2, 16, 24), "tensor count": range(0, 64, 7)}
    bits |= {"value count": range(0, 64, 7)}
    for i in range(len(values())):
        bits |= {f"key {i} length": (0, 3, 16, 40, 63), f"kind {i}": (4, 17, 31)}
    for i, row in enumerate(TENSORS):
        bits |= {f"name {i} length": (0, 4, 33), f"dimensions {i}": (0, 2, 31), f"type {i}": (0, 5, 30)}
        bits |= {f"offset {i}": (0, 5, 12, 40, 63)} | {f"size {i} {d}": (0, 1, 20, 62) for d in range(len(row[1]))}
    bits |= {f"array length {i}": (0, 20, 63) for i in (6, 7)} | {f"item kind {i}": (4, 31) for i in (6, 7)}
    for label, places in bits.items():
        for bit in places:
            yield f"bit {bit} of {label}", flipped(made, label, bit)


def absurd(made: Recipe) -> Iterator[tuple[str, bytes]]:
    """Numbers that a parser would allocate or loop by."""
    labels = ["tensor count", "value count", "key 0 length", "string length 0", "array length 6", "array length 7"]
    labels += ["name 1 length", "size 1 0", "size 1 1", "offset 2", "items 6"]
    for label in labels:
        for value in (1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1):
            if label != "items 6":
                yield f"{label} = {value}", replaced(made, label, value)
                continue
            body, at = bytearray(made.body), made.fields[label][0]
            body[at : at + 8] = struct.pack("<Q", value)  # the first token's length
            yield f"a token of {value} bytes", bytes(body)


def contradictions() -> Iterator[tuple[str, bytes]]:
    """Well-formed headers that contradict themselves or the format."""

    def without(key: bytes) -> list[tuple[bytes, int, bytes]]:
        return [row for row in values() if row[0] != key]

    yield "no architecture", bytes(build(without(b"general.architecture")).body)
    yield (
        "a numeric architecture",
        bytes(build([(b"general.architecture", 4, bytes(4)), *without(b"general.architecture")]).body),
    )
    yield "the same key twice", bytes(build([*values(), values()[2]]).body)
    for alignment in (0, 3, 48, 1 << 31):
        row = (b"general.alignment", 4, struct.pack("<I", alignment))
        yield f"alignment {alignment}", bytes(build([*without(b"general.alignment"), row]).body)
    yield (
        "alignment as text",
        bytes(build([*without(b"general.alignment"), (b"general.alignment", 8, struct.pack("<Q", 2) + b"32")]).body),
    )
    nested = (b"llama.nested", 9, struct.pack("<IQIQ", 9, 1, 4, 0))
    yield "an array of arrays", bytes(build([*values(), nested]).body)
    yield "a truth value of 2", bytes(build([*without(b"llama.flag"), (b"llama.flag", 7, b"\2")]).body)
    yield "a key that is not UTF-8", bytes(build([*values(), (b"llama.\xff\xfe", 4, bytes(4))]).body)
    yield "an empty key", bytes(build([*values(), (b"", 4, bytes(4))]).body)
    yield "a text that is not UTF-8", bytes(build([*values(), (b"x.y", 8, struct.pack("<Q", 1) + b"\xff")]).body)
    yield "an unknown array", bytes(build([*values(), (b"x.y", 9, struct.pack("<IQ", 13, 0))]).body)
    yield "the same tensor twice", bytes(build(tensors=[*TENSORS, TENSORS[3]]).body)
    yield "an empty name", bytes(build(tensors=[*TENSORS, (b"", (64,), 0, 256)]).body)
    yield "a name with a line break", bytes(build(tensors=[*TENSORS, (b"a\nb", (64,), 0, 256)]).body)
    yield "overlapping tensors", bytes(build(offsets={TENSORS[2][0]: 1376}).body)
    yield "all at the same place", bytes(build(offsets={row[0]: 0 for row in TENSORS}).body)
    yield "a gap", bytes(build(offsets={TENSORS[4][0]: 8192}).body)
    yield "unaligned data", bytes(build(offsets={TENSORS[1][0]: 1361}).body)
    yield "a dimension of 0", bytes(build(tensors=[*TENSORS, (b"empty", (0, 4), 0, 0)]).body)
    yield "no dimension", bytes(build(tensors=[*TENSORS, (b"scalar", (), 0, 4)]).body)
    yield "five dimensions", bytes(build(tensors=[*TENSORS, (b"five", (1,) * 5, 0, 4)]).body)
    yield "sizes whose product overflows", bytes(build(tensors=[*TENSORS, (b"wide", (1 << 32, 1 << 32), 0, 32)]).body)
    yield "a size beyond 2^63", bytes(build(tensors=[*TENSORS, (b"wide", (1 << 63, 2), 0, 32)]).body)
    yield "rows of half a block", bytes(build(tensors=[*TENSORS, (b"half", (16, 2), 8, 34)]).body)
    for kind in (4, 5, 31, 99, 1 << 31):
        yield f"tensor type {kind}", bytes(build(tensors=[*TENSORS, (b"odd", (32,), kind, 128)]).body)
    yield "bytes after the data", bytes(build().body) + bytes(64)
    yield "another file", b"PK\3\4" + bytes(500)
    yield "big-endian", b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(100)
    yield "empty", b""


def damaged() -> list[tuple[str, bytes]]:
    made = build()
    return [*truncations(made), *flips(made), *absurd(made), *contradictions()]


def test_the_undamaged_file_is_read(tmp_path):
    path = tmp_path / "fine.gguf"
    path.write_bytes(build().body)
    file = GgufFile(path)
    assert list(file.tensors) == [row[0].decode() for row in TENSORS]
    assert list(file.metadata["tokenizer.ggml.tokens"]) == [f"token{i}" for i in range(20)]
    assert file.metadata["llama.flag"] is True
    assert file.dense("output_norm.weight").shape == (56,)


def test_damaged_files_are_refused(tmp_path):
    cases = damaged()
    assert len(cases) >= 200
    path = tmp_path / "damaged.gguf"
    accepted, slow, large = [], [], []
    for what, body in cases:
        path.write_bytes(body)
        tracemalloc.start()
        started = time.process_time()
        try:
            GgufFile(path)
            accepted.append(what)
        except CorruptFileError as error:
            if error.path != str(path) or not error.reason:
                accepted.append(f"{what}: {error}")
        taken = time.process_time() - started
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        if taken > LIMIT_S:
            slow.append((what, taken))
        if peak > LIMIT_BYTES:
            large.append((what, peak))
    assert not accepted
    assert not slow
    assert not large


def sparse(tmp_path: Path, body: bytes) -> Path:
    """`body` followed by 1 GB of zeros that take no room: long enough for what it claims."""
    path = tmp_path / "sparse.gguf"
    path.write_bytes(body)
    with path.open("r+b") as file:
        file.truncate(10**9)
    return path


@pytest.mark.parametrize("case", ["values", "tensors", "strings", "text"])
def test_a_large_file_of_lies_costs_little(tmp_path, case):
    made = build()
    if case == "values":
        body = replaced(made, "value count", 10**7)
    elif case == "tensors":
        body = replaced(made, "tensor count", 10**7)
    elif case == "text":
        body = replaced(made, "string length 0", 9 * 10**8)
    else:  # zeros are 100 million empty strings
        body = bytes(build([*values(), (b"x.y", 9, struct.pack("<IQ", 8, 10**8))], []).body)
    path = sparse(tmp_path, body)
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(CorruptFileError):
        GgufFile(path)
    taken, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < LIMIT_S
    assert peak < LIMIT_BYTES
