"""A `.gguf` file as a transformers model whose weights stay packed."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError, CorruptFileError, first_line
from .codecs import decode
from .config import GgufQuantConfig
from .experts import experts_part
from .gguf_checks import check_metadata, check_shapes, describing
from .gguf_complete import complete, refuse
from .gguf_file import GgufFile, need_gguf
from .gguf_names import NamedTensor, named_tensors
from .gguf_rope import FREQUENCIES, scaling_in
from .gguf_vocabulary import named_as_in
from .mixes import MIXES
from .precise import left_dense
from .selection import is_embedding, is_linear
from .shapes import meta_model
from .upstream import reading_once

logger = logging.getLogger(__name__)


def load_gguf(path: str | os.PathLike[str], dtype: torch.dtype | None = None, **options: Any) -> tuple[Any, Any]:
    """The model of a `.gguf` file with its blocks as they are, and its tokenizer.

    Linears, `Conv1D`s, embeddings and experts whose tensors have one of our block types stay packed; other tensors
    (norms, experts whose gate and up differ in type) are decoded to `dtype`.

    Args:
        path: the file.
        dtype: of activations and of what is not packed; default torch's own default.
        options: for the model's `from_pretrained`, e.g. `device_map`, `attn_implementation`.

    Returns:
        The model in evaluation mode, which `save_pretrained` knows as packed; the tokenizer, or `None` where the file
        holds none that transformers can read.

    Raises:
        ConfigError: there is no such file; options that contradict the file; a dtype that is not floating.
        CorruptFileError: the file is no sound GGUF file, its metadata and tensors contradict each other, or it lacks
            tensors of its model.
        UnsupportedModelError: an architecture that transformers or we cannot convert.
        CtxoptError: the package `gguf` is missing.
    """
    taken = sorted({"config", "state_dict", "gguf_file", "quantization_config"} & set(options))
    if taken:
        raise ConfigError("options", taken, "those that the file does not decide")
    dtype = dtype or torch.get_default_dtype()
    if not dtype.is_floating_point:
        raise ConfigError("dtype", str(dtype), "a floating dtype")
    if not os.path.isfile(path):
        raise ConfigError("path", str(path), "a .gguf file")
    need_gguf()
    file = GgufFile(path)
    with reading_once():
        config, tokenizer = gguf_config(file), _tokenizer(file)
    with describing(file):
        skeleton = meta_model(config)
        state, types = _state(file, skeleton, dtype)
    check_shapes(file, skeleton, state, types)
    _share_types(skeleton, state, types)
    if types:
        config.quantization_config = GgufQuantConfig(file.mix or next(iter(MIXES)), types=types).to_dict()
    kind: Any = type(skeleton)
    model, report = kind.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True, **options
    )
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise CorruptFileError(file.header.path, f"tensors are missing for {missing}")
    return model.eval(), tokenizer


def gguf_config(file: GgufFile) -> Any:
    """transformers' config of an open file, with what it leaves out (`gguf_complete.py`) and rotary scaling.

    Raises:
        UnsupportedModelError: an architecture that transformers cannot convert.
        CorruptFileError: metadata that describe no model, or another than the tensors are of.
        CtxoptError: the package `gguf` is missing.
    """
    from transformers import AutoConfig

    need_gguf()
    place = Path(file.header.path)
    check_metadata(file)
    refuse(file)
    with describing(file):
        config = AutoConfig.from_pretrained(place.parent, gguf_file=place.name, local_files_only=True)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    _scale_rotary(file, config)
    complete(file, config.get_text_config())
    return config


def _scale_rotary(file: GgufFile, config: Any) -> None:
    """Put the file's rotary scaling, which transformers does not read, in the config of its full-attention layers."""
    text = config.get_text_config()
    rotary = getattr(text, "rope_parameters", None) or {}
    own = rotary.get("full_attention", rotary)
    divisors = file.dense(FREQUENCIES, torch.float32) if FREQUENCIES in file.tensors else None
    found = scaling_in(file.metadata, file.architecture, divisors, float(own.get("rope_theta") or 10000.0))
    if not found:
        return
    scaled = {**own, **found}
    text.rope_parameters = {**rotary, "full_attention": scaled} if "full_attention" in rotary else scaled


def _state(file: GgufFile, model: nn.Module, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Values of the parameters, and name -> block type of what is packed, as of `selection.types_of`."""
    state: dict[str, Tensor] = {}
    types: dict[str, str] = {}
    halves: dict[str, dict[str, Tensor]] = {}
    decoded = []
    stacks: dict[str, dict[str | None, NamedTensor]] = {}
    dense = left_dense(model)
    for named in named_tensors(file, model):
        module, _, leaf = named.parameter.rpartition(".")
        if named.type is not None and experts_part(model, named.parameter) is not None:
            stacks.setdefault(named.parameter, {})[named.part] = named
            continue
        fits = leaf == "weight" and module not in dense
        if named.type is not None and fits and _packable(model.get_submodule(module), named):
            types[module] = named.type
            # A copy: the file may be cut or rewritten while the model lives.
            state[named.parameter] = named.data.clone()
            continue
        if named.type is not None:
            decoded.append(named.parameter)
        values = named.data if named.type is None else decode(named.data, named.type, dtype)
        values = values.T if named.transposed else values
        if named.part is None:
            state[named.parameter] = values.to(dtype, copy=True).contiguous()
        else:
            halves.setdefault(named.parameter, {})[named.part] = values.to(dtype)
    for parameter, found in stacks.items():
        kinds = {named.type for named in found.values()}
        if len(kinds) == 1 and halves.get(parameter) is None:
            types[parameter] = next(iter(found.values())).type or ""
            halves[parameter] = {part or "": named.data for part, named in found.items()}
            continue
        decoded.append(parameter)  # rows of two types are one parameter
        for part, named in found.items():
            halves.setdefault(parameter, {})[part or ""] = decode(named.data, named.type or "", dtype)
    for parameter, parts in halves.items():
        if set(parts) == {""}:
            state[parameter] = parts[""].clone()
            continue
        if set(parts) != {"gate", "up"}:
            raise CorruptFileError(file.header.path, f"tensors are missing for {parameter}")
        state[parameter] = torch.cat([parts["gate"], parts["up"]], dim=-2)
    if decoded:
        logger.warning("%d tensors are held in %s, not packed: %s …", len(decoded), dtype, decoded[0])
    return state, types


def _packable(module: nn.Module, named: NamedTensor) -> bool:
    if named.transposed:
        return isinstance(module, Conv1D)
    return is_linear(module) or is_embedding(module)


def _share_types(model: Any, state: Mapping[str, Tensor], types: dict[str, str]) -> None:
    """A tied head, and the embeddings of encoder and decoder, are packed as what they are tied to: one tensor.

    Not one that the file has a tensor of its own for: transformers then does not tie it.
    """
    for tied, source in model.all_tied_weights_keys.items():
        owner = source.removesuffix(".weight")
        if owner in types and source.endswith(".weight") and tied not in state:
            types[tied.removesuffix(".weight")] = types[owner]


def _tokenizer(file: GgufFile) -> Any:
    from transformers import AutoTokenizer

    place = Path(file.header.path)
    if "tokenizer.ggml.model" not in file.metadata:
        return None
    try:
        read = AutoTokenizer.from_pretrained(place.parent, gguf_file=place.name, local_files_only=True)
        return named_as_in(file, read)
    except Exception as error:  # `tokenizers` raises no type of its own for merges and tokens that do not agree
        logger.warning("%s: transformers cannot read its tokenizer: %s", place, first_line(error))
        return None
