"""A GGUF file built byte by byte, with the place of each field: what the fault tests damage."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Recipe:
    """Emits the fields of a header in order. `fields` maps a label to (first byte, width)."""

    body: bytearray = field(default_factory=bytearray)
    fields: dict[str, tuple[int, int]] = field(default_factory=dict)

    def put(self, label: str, raw: bytes) -> None:
        self.fields[label] = (len(self.body), len(raw))
        self.body += raw

    def u32(self, label: str, value: int) -> None:
        self.put(label, struct.pack("<I", value))

    def u64(self, label: str, value: int) -> None:
        self.put(label, struct.pack("<Q", value))

    def text(self, label: str, value: bytes) -> None:
        self.u64(f"{label} length", len(value))
        self.put(label, value)


def values() -> list[tuple[bytes, int, bytes]]:
    """(key, type, bytes) of a small model's metadata, one of each kind of value."""

    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    tokens = b"".join(text(f"token{i}".encode()) for i in range(20))
    return [
        (b"general.architecture", 8, text(b"llama")),
        (b"general.alignment", 4, struct.pack("<I", 32)),
        (b"llama.block_count", 4, struct.pack("<I", 2)),
        (b"llama.rope.freq_base", 6, struct.pack("<f", 1e4)),
        (b"llama.flag", 7, b"\1"),
        (b"llama.big", 10, struct.pack("<Q", 1 << 40)),
        (b"tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 20) + tokens),
        (b"tokenizer.ggml.token_type", 9, struct.pack("<IQ", 5, 20) + bytes(80)),
    ]


TENSORS = [
    (b"token_embd.weight", (64, 20), 8, 20 * 2 * 34),
    (b"blk.0.attn_q.weight", (64, 64), 2, 64 * 2 * 18),
    (b"blk.0.ffn_down.weight", (256, 3), 12, 3 * 144),
    (b"blk.0.attn_norm.weight", (64,), 0, 256),
    (b"output_norm.weight", (56,), 0, 224),
]
"""(name, dimensions as stored, type, bytes of data)."""


def build(
    metadata: list[tuple[bytes, int, bytes]] | None = None,
    tensors: list[tuple[bytes, tuple[int, ...], int, int]] | None = None,
    offsets: dict[bytes, int] | None = None,
    alignment: int = 32,
) -> Recipe:
    """A file of these values and tensors; `offsets` replaces the offset of some tensors."""
    metadata = values() if metadata is None else metadata
    tensors = TENSORS if tensors is None else tensors
    made = Recipe()
    made.put("magic", b"GGUF")
    made.u32("version", 3)
    made.u64("tensor count", len(tensors))
    made.u64("value count", len(metadata))
    for i, (key, kind, raw) in enumerate(metadata):
        made.text(f"key {i}", key)
        made.u32(f"kind {i}", kind)
        if kind == 9:
            made.u32(f"item kind {i}", struct.unpack_from("<I", raw)[0])
            made.u64(f"array length {i}", struct.unpack_from("<Q", raw, 4)[0])
            made.put(f"items {i}", raw[12:])
        elif kind == 8:
            made.u64(f"string length {i}", struct.unpack_from("<Q", raw)[0])
            made.put(f"string {i}", raw[8:])
        else:
            made.put(f"value {i}", raw)
    at = 0
    for i, (name, dimensions, kind, nbytes) in enumerate(tensors):
        made.text(f"name {i}", name)
        made.u32(f"dimensions {i}", len(dimensions))
        for d, size in enumerate(dimensions):
            made.u64(f"size {i} {d}", size)
        made.u32(f"type {i}", kind)
        made.u64(f"offset {i}", (offsets or {}).get(name, at))
        at += -(-nbytes // alignment) * alignment
    made.body += bytes(-len(made.body) % alignment)
    made.fields["data"] = (len(made.body), at)
    made.body += np.random.default_rng(0).integers(0, 256, at, dtype=np.uint8).tobytes()
    return made
