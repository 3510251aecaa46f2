"""The tensors of a `.gguf` file under transformers' names, packed ones as they are.

Names come from transformers' own maps, values of plain tensors (norms and the like) from its own processors; only
the orders of packed rows are applied here, by llama.cpp's rules.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CorruptFileError, UnsupportedModelError
from .blocks import BLOCKS
from .gguf_file import GgufFile, need_gguf
from .row_orders import bloom_interleaved, rotary_to_halves
from .upstream import name_map, plain_processor, processors

logger = logging.getLogger(__name__)

_EXPERTS = re.compile(r"(?P<stem>.*\.ffn_(?P<part>gate|up|down)_exps)\.weight$")
# Architectures whose converters change values in a way that is not undone here (transformers keeps qwen35 packed
# itself; mixture files of gpt-oss hold MXFP4, which it repacks), or that are no language model.
_OTHERS = {"qwen35", "qwen35moe", "gpt-oss", "gpt_oss", "t5encoder"}
_GPT2_TRANSPOSED = ("attn_qkv.weight", "ffn_down.weight", "ffn_up.weight", "attn_output.weight")


@dataclass(frozen=True)
class NamedTensor:
    """One tensor of the file.

    Args:
        parameter: transformers' name, e.g. `model.layers.0.self_attn.q_proj.weight`.
        type: block type of `data`, or `None` for plain values.
        data: uint8 (..., bytes of a row), rows in transformers' order; or floating, as the parameter wants it.
        part: "gate" or "up" where the parameter is `gate_up_proj` (experts, gate rows then up rows, columns).
        transposed: `data` has the rows of a linear (outputs, inputs), the parameter is a `Conv1D`'s
            (inputs, outputs). Only for packed ones.
    """

    parameter: str
    type: str | None
    data: Tensor
    part: str | None = None
    transposed: bool = False


def named_tensors(file: GgufFile, model: Any) -> Iterator[NamedTensor]:
    """The file's tensors one by one; nothing is read of one before it is its turn.

    Tensors that transformers has no parameter for (rotary tables) are left out, as transformers itself leaves them.

    Args:
        file: an open file.
        model: the model to fill; one on the meta device will do.

    Raises:
        UnsupportedModelError: an architecture whose conversion is not known.
        CorruptFileError: heads of the config do not divide the rows of q or k; values that are not finite.
        CtxoptError: the package `gguf` is missing.
    """
    need_gguf()
    architecture = file.architecture
    if architecture in _OTHERS:
        raise UnsupportedModelError(f"{file.header.path}: architecture {architecture} is not loaded packed")
    config = model.config.get_text_config()
    facts = {key: value for key, value in config.to_dict().items() if value is not None}
    facts.setdefault("num_key_value_heads", facts.get("num_attention_heads"))
    processor = processors().get(architecture, plain_processor())(config=facts)
    try:  # by the file's architecture: a Mistral's file is a llama's, and gguf knows no other name for it
        names = name_map(model, processor, architecture)
    except NotImplementedError as error:
        raise UnsupportedModelError(
            f"{file.header.path}: gguf does not know the architecture {architecture}"
        ) from error
    for name in file.tensors:
        experts = _EXPERTS.match(name)
        key = name if name in names else (experts["stem"] if experts else name)
        if architecture == "gpt2" and name == "output.weight":
            parameter: str | None = "lm_head.weight"
        else:
            parameter = names.get(key)
        if parameter is None:
            if name.startswith("blk."):
                logger.warning("%s: the model has no place for %s", file.header.path, name)
            continue
        file.check_finite(name)
        yield _converted(file, name, parameter, config, processor, experts["part"] if experts else None)


def _converted(
    file: GgufFile, name: str, parameter: str, config: Any, processor: Any, part: str | None
) -> NamedTensor:
    kind = file.tensors[name].type
    part = part if part in ("gate", "up") and "gate_up" in parameter else None
    if kind in BLOCKS and len(file.tensors[name].shape) > 1:
        data = file.packed(name)
        order = _order(file, name, data.shape[0], config)
        transposed = file.architecture == "gpt2" and name.endswith(_GPT2_TRANSPOSED)
        return NamedTensor(parameter, kind, data if order is None else data[order], part, transposed)
    values = file.dense(name)
    if "_exps" in name or (file.architecture == "gpt2" and name == "output.weight"):
        return NamedTensor(parameter, None, values, part)
    if values.dtype == torch.bfloat16:  # numpy has none
        values = values.float()
    result = processor.process(weights=values.numpy(), name=name, tensor_key_mapping={}, parsed_parameters={})
    return NamedTensor(parameter, None, torch.from_numpy(result.weights.copy()))


def _order(file: GgufFile, name: str, rows: int, config: Any) -> Tensor | None:
    """Order of a packed weight's rows, or `None` where transformers has them as the file does."""
    rotary = file.architecture == "llama" and re.search(r"\.attn_[qk]\.", name)
    if not rotary and not (file.architecture == "bloom" and "attn_qkv" in name):
        return None
    heads = config.num_attention_heads
    if rotary and ".attn_k." in name:
        heads = getattr(config, "num_key_value_heads", None) or heads
    unit = heads * (2 if rotary else 3)
    if rows % unit:
        raise CorruptFileError(file.header.path, f"the tensor {name} has {rows} rows for {heads} heads")
    return rotary_to_halves(rows, heads) if rotary else bloom_interleaved(rows, heads)
