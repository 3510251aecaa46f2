"""What a `.gguf` file's metadata must agree with: itself, the file's tensors, and the model made of it.

`gguf_header.py` checks the format; a well-formed file may still describe no model, or another than its tensors are of.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError, CorruptFileError, CtxoptError, UnsupportedModelError, first_line
from .blocks import packed_columns
from .gguf_file import GgufFile
from .gguf_rope import FREQUENCIES

_BLOCK = re.compile(r"(?:enc\.)?blk\.(\d+)\.")
_EMBEDDING = "token_embd.weight"
# Their head counts and widths are one a layer, or zero: layers without attention.
_BY_LAYER = ("deci", "gemma3n", "gemma4", "lfm2", "mamba")
_SIZES = ("feed_forward_length", "attention.key_length", "attention.value_length", "context_length", "vocab_size",
          "rope.scaling.original_context_length")  # fmt: skip
_SCALES = ("rope.scaling.factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow")
_EPSILONS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
_COUNTS = ("expert_count", "expert_used_count", "expert_feed_forward_length", "expert_shared_feed_forward_length")
_UNKNOWN = re.compile(r"not supported|[Uu]nrecognized")  # of transformers, about an architecture
_BAD = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RuntimeError, StrictDataclassError)


def check_metadata(file: GgufFile) -> None:
    """Check the sizes that a model is built from, before one is.

    Raises:
        CorruptFileError: a size that is no positive integer, sizes that do not divide, or that are not those of the
            file's tensors.
    """
    blocks = [int(found[1]) for name in file.tensors if (found := _BLOCK.match(name))]
    count = _size(file, "block_count")
    if count is None or count != 1 + max(blocks, default=-1):
        _fail(file, f"block_count is {count}; its tensors are of {1 + max(blocks, default=-1)} blocks")
    width = _size(file, "embedding_length")
    if _EMBEDDING in file.tensors and file.tensors[_EMBEDDING].shape[-1] != width:
        _fail(file, f"embedding_length is {width}; {_EMBEDDING} has {file.tensors[_EMBEDDING].shape[-1]} columns")
    if file.architecture not in _BY_LAYER:
        for key in _SIZES:
            _size(file, key)
        _check_heads(file, width)
    for key in _EPSILONS:
        value = _value(file, key)
        if value is not None and not (_number(value) and 0 <= value < 1):  # type: ignore[operator]
            _fail(file, f"{key} is {value!r}; allowed is a number from 0 to 1")
    for key in _COUNTS:
        value = _value(file, key)
        if value is not None and (type(value) is not int or value < 0):
            _fail(file, f"{key} is {value!r}; allowed is an integer that is not negative")
    _check_rotary(file)


def _check_heads(file: GgufFile, width: int | None) -> None:
    heads, groups = _size(file, "attention.head_count"), _size(file, "attention.head_count_kv")
    if heads is None:
        return
    if groups is not None and heads % groups:
        _fail(file, f"attention.head_count is {heads}, no multiple of the {groups} of keys and values")
    if width is not None and width % heads and _value(file, "attention.key_length") is None:
        _fail(file, f"attention.head_count is {heads}, which does not divide embedding_length, {width}")
    for key, leaf in (("key", "k"), ("value", "v")):
        size, name = _size(file, f"attention.{key}_length"), f"blk.0.attn_{leaf}.weight"
        rows = file.tensors[name].shape[0] if name in file.tensors else None
        if size is not None and rows is not None and rows != size * (groups or heads):
            _fail(file, f"attention.{key}_length is {size}; {name} has {rows} rows for {groups or heads} heads")


def _check_rotary(file: GgufFile) -> None:
    channels = _value(file, "rope.dimension_count")
    if channels is not None and (type(channels) is not int or channels < 0 or channels % 2):
        _fail(file, f"rope.dimension_count is {channels!r}; allowed is an even number")
    base = _value(file, "rope.freq_base")
    if base is not None and not (_number(base) and base > 0):  # type: ignore[operator]
        _fail(file, f"rope.freq_base is {base!r}; allowed is a positive number")
    kind = _value(file, "rope.scaling.type")
    if kind is not None and not isinstance(kind, str):
        _fail(file, f"rope.scaling.type is {kind!r}; allowed is a name")
    for key in _SCALES:
        value = _value(file, key)
        if value is not None and not (_number(value) and value >= 0):  # type: ignore[operator]
            _fail(file, f"{key} is {value!r}; allowed is a number that is not negative")
    if FREQUENCIES not in file.tensors:
        return
    held = file.tensors[FREQUENCIES]
    heads, width = _value(file, "attention.head_count"), _value(file, "embedding_length")
    sizes = {channels, _value(file, "attention.key_length")}
    if type(heads) is int and type(width) is int and heads > 0:
        sizes.add(width // heads)
    if len(held.shape) != 1 or 2 * held.shape[0] not in sizes:
        _fail(file, f"{FREQUENCIES} has the shape {held.shape}; allowed is half of the channels that are rotated")
    values = file.dense(FREQUENCIES, torch.float32)
    if not bool((values > 0).all()):
        _fail(file, f"{FREQUENCIES} has values that are not positive")


def check_shapes(file: GgufFile, model: nn.Module, state: Mapping[str, Tensor], types: Mapping[str, str]) -> None:
    """Check that each value is of its parameter's shape.

    Args:
        file: named in errors.
        model: one on the meta device.
        state: parameter -> values, packed ones uint8 (..., bytes of a row).
        types: module, or parameter of experts -> block type of what is packed.

    Raises:
        CorruptFileError: another shape, or columns that are no whole number of blocks.
    """
    parameters = model.state_dict()
    for name, values in state.items():
        if name not in parameters:
            continue
        module = name.rpartition(".")[0]
        type = types.get(name) or (types.get(module) if name.endswith(".weight") else None)
        shape = tuple(parameters[name].shape)
        wanted = shape
        if type is not None:
            wanted = shape[::-1] if isinstance(model.get_submodule(module), Conv1D) else shape
            try:
                wanted = (*wanted[:-1], packed_columns(wanted[-1], type))
            except ConfigError as error:
                raise CorruptFileError(file.header.path, f"{name} of the shape {shape} is no {type}") from error
        if tuple(values.shape) != wanted:
            what = f"{tuple(values.shape)}{' bytes' if type is not None else ''}"
            _fail(file, f"the tensor of {name} is {what}; its metadata make it {wanted}")


@contextmanager
def describing(file: GgufFile) -> Iterator[None]:
    """Errors of others, while they make a model of the file's metadata, as ours.

    Raises:
        UnsupportedModelError: transformers does not know the architecture.
        CorruptFileError: any other error over the values.
    """
    try:
        yield
    except CtxoptError:
        raise
    except torch.OutOfMemoryError:
        raise
    except _BAD as error:
        reason = first_line(error)
        if isinstance(error, ValueError) and _UNKNOWN.search(reason):
            said = f"{file.header.path}: transformers cannot convert {file.architecture}: {reason}"
            raise UnsupportedModelError(said) from error
        raise CorruptFileError(file.header.path, f"its metadata describe no {file.architecture}: {reason}") from error


def _value(file: GgufFile, key: str) -> object:
    return file.metadata.get(f"{file.architecture}.{key}")


def _size(file: GgufFile, key: str) -> int | None:
    value = _value(file, key)
    if value is None:
        return None
    if type(value) is not int or value < 1:
        _fail(file, f"{key} is {value!r}; allowed is a positive integer")
    return value


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _fail(file: GgufFile, reason: str) -> NoReturn:
    raise CorruptFileError(file.header.path, reason)
