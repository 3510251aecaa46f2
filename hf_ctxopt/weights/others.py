"""Weight formats of other projects, packed by transformers' quantizers or their own: one table, no code of ours.

They pack linear layers only: embedding, head and norms keep 16 bits. Bytes are those of the formats: bitsandbytes
LLM.int8 (a float32 for each row) and nf4 (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, section 3); HQQ, quanto and
torchao with the group sizes below; GPTQ and AWQ checkpoints as usually published, 4 bits in groups of 128.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..errors import ConfigError, CtxoptError

GROUP = 128  # weights that share a scale in what is packed here, where the format leaves a choice


@dataclass(frozen=True)
class Other:
    """One format.

    Args:
        method: transformers' `quant_method` of it.
        bits: of a weight's code.
        group: weights that share a scale, or 0 for a row.
        group_bytes: scale and zero point of a group.
        needs: module that must be importable -> what pip calls it.
        make: (dtype of the activations) -> transformers' config, which packs while loading.
        pack: (model in memory, dtype of the activations, device): packs it in place by the project's own function,
            where transformers' quantizer cannot. With neither, the checkpoint holds packed weights and their config.
        cuda: it runs on CUDA devices only.
        column_bytes: what is held for each input column besides.
    """

    method: str
    bits: int
    group: int
    group_bytes: float
    needs: Mapping[str, str]
    make: Callable[[Any], Any] | None = None
    pack: Callable[[Any, Any, Any], None] | None = None
    cuda: bool = False
    column_bytes: int = 0


def _config(name: str, **values: Any) -> Any:
    return getattr(importlib.import_module("transformers"), name)(**values)


def _torchao(name: str, **values: Any) -> Any:
    kind = getattr(importlib.import_module("torchao.quantization"), name)
    return _config("TorchAoConfig", quant_type=kind(**values))


def _hqq(model: Any, dtype: Any, device: Any, **values: Any) -> None:
    # transformers 5.17 to 5.24 know HqqConfig and raise NotImplementedError at the first weight.
    config = importlib.import_module("hqq.core.quantize").BaseQuantizeConfig(axis=1, **values)
    packer = importlib.import_module("hqq.models.hf.base").AutoHQQHFModel
    packer.quantize_model(model, quant_config=config, compute_dtype=dtype, device=str(device))


_ACCELERATE = {"accelerate": "accelerate"}
_BITSANDBYTES = {"bitsandbytes": "bitsandbytes", **_ACCELERATE}
_HQQ = {"hqq": "hqq", **_ACCELERATE}
_QUANTO = {"optimum.quanto": "optimum-quanto", **_ACCELERATE}
_TORCHAO = {"torchao": "torchao", **_ACCELERATE}
_GPTQ = {"gptqmodel": "gptqmodel", "optimum": "optimum", **_ACCELERATE}
_AWQ = {"gptqmodel": "gptqmodel", **_ACCELERATE}

# nf4 keeps a byte for each 64 weights and a float32 for each 256 of those bytes; its tables are beside the point.
OTHERS: dict[str, Other] = {
    "int8": Other("bitsandbytes", 8, 0, 4, _BITSANDBYTES, lambda _: _config("BitsAndBytesConfig", load_in_8bit=True)),
    "nf4": Other("bitsandbytes", 4, 64, 1 + 4 / 256, _BITSANDBYTES, lambda dtype: _config(
        "BitsAndBytesConfig", load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype)),
    "hqq8": Other("hqq", 8, GROUP, 4, _HQQ, pack=partial(_hqq, nbits=8, group_size=GROUP)),
    "hqq4": Other("hqq", 4, 64, 4, _HQQ, pack=partial(_hqq, nbits=4, group_size=64)),
    "quanto-int8": Other("quanto", 8, 0, 2, _QUANTO, lambda _: _config("QuantoConfig", weights="int8")),
    "quanto-int4": Other("quanto", 4, GROUP, 4, _QUANTO, lambda _: _config("QuantoConfig", weights="int4")),
    "torchao-int8": Other("torchao", 8, 0, 2, _TORCHAO, lambda _: _torchao("Int8WeightOnlyConfig")),
    "torchao-int4": Other("torchao", 4, GROUP, 4, _TORCHAO,
                          lambda _: _torchao("Int4WeightOnlyConfig", group_size=GROUP), cuda=True),
    "gptq": Other("gptq", 4, GROUP, 2.5, _GPTQ, column_bytes=4),
    "awq": Other("awq", 4, GROUP, 2.5, _AWQ),
}  # fmt: skip


def other(name: str) -> Other:
    """The row of `name`. Raises `ConfigError` for another name."""
    if name not in OTHERS:
        raise ConfigError("weights", name, ", ".join(OTHERS))
    return OTHERS[name]


def install_line(name: str) -> str:
    """What to type for `name`, as far as pip can tell."""
    return f"pip install {' '.join(other(name).needs.values())}"


def check_other(name: str, device: str) -> None:
    """Whether `name` can be used here, before anything is loaded.

    Args:
        name: key of `OTHERS`.
        device: type of the device that the model is to run on: "cuda", "cpu" …

    Raises:
        ConfigError: an unknown name, or a format that needs CUDA.
        CtxoptError: a package is missing.
    """
    row = other(name)
    missing = [pip for module, pip in row.needs.items() if not _installed(module)]
    if missing:
        raise CtxoptError(
            f"weights={name!r} needs the package{'s' * (len(missing) > 1)} {' and '.join(missing)}: "
            f"pip install {' '.join(missing)}"
        )
    if row.cuda and device != "cuda":
        raise ConfigError("weights", name, f"a format that runs on {device}: this one needs a CUDA device")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it is missing
        return False


def other_bytes(rows: int, columns: int, name: str) -> int:
    """Bytes of a packed linear (rows outputs, columns inputs)."""
    row = other(name)
    groups = rows if not row.group else -(-rows * columns // row.group)
    total = -(-rows * columns * row.bits // 8) + math.ceil(groups * row.group_bytes)
    return total + columns * row.column_bytes
