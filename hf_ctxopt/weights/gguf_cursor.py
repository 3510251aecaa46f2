"""A bounded cursor over a GGUF header: every read is checked against the file's size before it happens."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Sequence
from typing import NoReturn, overload

import numpy as np

from ..errors import CorruptFileError
from .gguf_types import ARRAY, BOOL, SCALARS, STRING

LONGEST_KEY = 65535  # bytes, of the format
LONGEST_NAME = 255  # bytes of a tensor's name; ggml's own limit is 64
LONGEST_TEXT = 1 << 24  # bytes of a string; the longest in use is a tokenizer's JSON
MOST_STRINGS = 1 << 21  # in all arrays; a vocabulary of 262,144 has as many tokens and twice as many merges


class Strings(Sequence[str]):
    """An array of strings, decoded one at a time when asked for: a vocabulary has 100,000 and more."""

    def __init__(self, data: mmap.mmap, spans: np.ndarray, path: str) -> None:
        self._data, self._spans, self._path = data, spans, path

    def __len__(self) -> int:
        return len(self._spans)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, size = self._spans[index].tolist()
        try:
            return self._data[start : start + size].decode()
        except UnicodeDecodeError as error:
            raise CorruptFileError(self._path, f"a string of an array at byte {start} is not UTF-8") from error

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


class Cursor:
    """Reads values from `data` in order.

    Args:
        data: the whole file, mapped.
        path: for the errors.
    """

    def __init__(self, data: mmap.mmap, path: str) -> None:
        self.data, self.path = data, path
        self.at, self.size = 0, len(data)
        self.strings = 0  # in arrays so far

    def fail(self, reason: str) -> NoReturn:
        raise CorruptFileError(self.path, reason)

    def need(self, count: int, what: str) -> int:
        """Where `count` bytes of `what` begin; moves past them. Raises `CorruptFileError` if the file is shorter."""
        if count > self.size - self.at:
            self.fail(f"{what} at byte {self.at} needs {count} bytes, the file has {self.size - self.at} left")
        start, self.at = self.at, self.at + count
        return start

    def u32(self, what: str) -> int:
        return int(struct.unpack_from("<I", self.data, self.need(4, what))[0])

    def u64(self, what: str) -> int:
        return int(struct.unpack_from("<Q", self.data, self.need(8, what))[0])

    def text(self, what: str, longest: int = LONGEST_TEXT, shortest: int = 0) -> str:
        """A string of `shortest` to `longest` bytes."""
        size = self.u64(f"the length of {what}")
        if not shortest <= size <= longest:
            self.fail(f"{what} has {size} bytes; allowed is {shortest} to {longest}")
        start = self.need(size, what)
        try:
            return self.data[start : start + size].decode()
        except UnicodeDecodeError:
            self.fail(f"{what} at byte {start} is not UTF-8")

    def name(self, what: str, longest: int) -> str:
        """A key or a tensor's name: printable ASCII."""
        found = self.text(what, longest, 1)
        if not (found.isascii() and found.isprintable()):
            self.fail(f"{what} {found[:80]!r} has characters that are not printable ASCII")
        return found

    def value(self, key: str) -> object:
        """A metadata value: a scalar, a `str`, a numpy array (a view of the file) or `Strings`."""
        return self._value(self.u32(f"the type of {key}"), key)

    def _value(self, kind: int, key: str) -> object:
        if kind == STRING:
            return self.text(f"the value of {key}")
        if kind == ARRAY:
            return self._array(key)
        code = SCALARS.get(kind)
        if code is None:
            self.fail(f"{key} has the unknown value type {kind}")
        item = np.frombuffer(self.data, code, 1, self.need(np.dtype(code).itemsize, f"the value of {key}"))[0].item()
        if kind == BOOL and item > 1:
            self.fail(f"{key} is a truth value of {item}")
        return bool(item) if kind == BOOL else item

    def _array(self, key: str) -> object:
        kind, length = self.u32(f"the type of {key}"), self.u64(f"the length of {key}")
        if kind == ARRAY:
            self.fail(f"{key} is an array of arrays")
        if kind == STRING:
            return self._strings(key, length)
        code = SCALARS.get(kind)
        if code is None:
            self.fail(f"{key} is an array of the unknown type {kind}")
        start = self.need(length * np.dtype(code).itemsize, f"the array {key}")
        return np.frombuffer(self.data, code, length, start) if length else np.empty(0, code)

    def _strings(self, key: str, length: int) -> Strings:
        if length * 8 > self.size - self.at:  # each string has at least its length
            self.fail(f"the array {key} has {length} strings, the file {self.size - self.at} bytes left")
        self.strings += length
        if self.strings > MOST_STRINGS:
            self.fail(f"the arrays up to {key} have {self.strings} strings; allowed is {MOST_STRINGS}")
        spans = np.empty((length, 2), np.int64)
        read, data, at, size = struct.Struct("<Q").unpack_from, self.data, self.at, self.size
        for i in range(length):
            if at + 8 > size:
                self.fail(f"the array {key} ends after {i} of {length} strings")
            count = read(data, at)[0]
            at += 8
            if count > size - at:
                self.fail(f"string {i} of {key} has {count} bytes, the file {size - at} left")
            spans[i] = at, count
            at += count
        self.at = at
        return Strings(self.data, spans, self.path)
