"""A `.gguf` file as a transformers model whose weights stay packed."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError, CorruptFileError, UnsupportedModelError
from .codecs import decode
from .config import GgufQuantConfig
from .gguf_file import GgufFile, need_gguf
from .gguf_names import NamedTensor, named_tensors
from .selection import is_embedding, is_linear
from .sizes import meta_model

logger = logging.getLogger(__name__)


def load_gguf(path: str | os.PathLike[str], dtype: torch.dtype | None = None, **options: Any) -> tuple[Any, Any]:
    """The model of a `.gguf` file with its blocks as they are, and its tokenizer.

    Linears, `Conv1D`s and embeddings whose tensors have one of our block types stay packed; other tensors (norms,
    experts in one tensor) are decoded to `dtype`.

    Args:
        path: the file.
        dtype: of activations and of what is not packed; default torch's own default.
        options: for the model's `from_pretrained`, e.g. `device_map`, `attn_implementation`.

    Returns:
        The model in evaluation mode, which `save_pretrained` knows as packed; the tokenizer, or `None` where the file
        holds none that transformers can read.

    Raises:
        ConfigError: options that contradict the file; a dtype that is not floating.
        CorruptFileError: the file is no sound GGUF file, or lacks tensors of its model.
        UnsupportedModelError: an architecture that transformers or we cannot convert.
        CtxoptError: the package `gguf` is missing.
    """
    taken = sorted({"config", "state_dict", "gguf_file", "quantization_config"} & set(options))
    if taken:
        raise ConfigError("options", taken, "those that the file does not decide")
    dtype = dtype or torch.get_default_dtype()
    if not dtype.is_floating_point:
        raise ConfigError("dtype", str(dtype), "a floating dtype")
    need_gguf()
    file = GgufFile(path)
    config = _config(file)
    skeleton = meta_model(config)
    state, types = _state(file, skeleton, dtype)
    if getattr(config, "tie_word_embeddings", False):
        _share_type(skeleton, types)
    if types:
        config.quantization_config = GgufQuantConfig(types=types).to_dict()
    kind: Any = type(skeleton)
    model, report = kind.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True, **options
    )
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise CorruptFileError(file.header.path, f"tensors are missing for {missing}")
    return model.eval(), _tokenizer(file)


def _config(file: GgufFile) -> Any:
    from transformers import AutoConfig

    place = Path(file.header.path)
    try:
        config = AutoConfig.from_pretrained(place.parent, gguf_file=place.name, local_files_only=True)
    except ValueError as error:
        raise UnsupportedModelError(f"{place}: transformers cannot convert {file.architecture}: {error}") from error
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return config


def _state(file: GgufFile, model: nn.Module, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Values of the parameters, and module -> block type of those that are packed."""
    state: dict[str, Tensor] = {}
    types: dict[str, str] = {}
    halves: dict[str, dict[str, Tensor]] = {}
    decoded = []
    for named in named_tensors(file, model):
        module, _, leaf = named.parameter.rpartition(".")
        if named.type is not None and leaf == "weight" and _packable(model.get_submodule(module), named):
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
    for parameter, parts in halves.items():
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


def _share_type(model: Any, types: dict[str, str]) -> None:
    """A tied head is packed as its embedding is: they are one tensor."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = names[id(model.get_input_embeddings())], names[id(model.get_output_embeddings())]
    if embedding in types:
        types[head] = types[embedding]


def _tokenizer(file: GgufFile) -> Any:
    from transformers import AutoTokenizer

    place = Path(file.header.path)
    if "tokenizer.ggml.model" not in file.metadata:
        return None
    try:
        return AutoTokenizer.from_pretrained(place.parent, gguf_file=place.name, local_files_only=True)
    except (ValueError, KeyError, AttributeError, NotImplementedError, ImportError) as error:
        logger.warning("%s: transformers cannot read its tokenizer: %s", place, error)
        return None
