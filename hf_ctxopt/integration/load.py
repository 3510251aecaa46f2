"""`load`: from a plan to the running model and its tokenizer."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, CtxoptError
from ..planner.plan import Plan
from ..planner.schemes import LOADED, PLAIN
from ..weights.config import GgufQuantConfig
from ..weights.in_memory import quantize_
from ..weights.mixes import MIXES
from ..weights.roles import NAMES, Role
from .patch import patch_model
from .register import register

LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError)  # what transformers raises for bad models
_PARTS = {"embedding": Role.EMBEDDING, "head": Role.HEAD}


def load(plan: Plan | Mapping[str, Any], device: Any = None, **options: Any) -> tuple[Any, Any]:
    """Load what a plan names, with its weights packed as planned, and patch it.

    Args:
        plan: a plan made from a folder, a `.gguf` file or a Hub id; or what `Plan.to_dict` made of one.
        device: where it is to run; by default the plan's device if it is here, else the first GPU, else the CPU.
        **options: go to `from_pretrained` (e.g. `local_files_only=True`).

    Returns:
        The model, patched and ready to generate, and its tokenizer.

    Raises:
        ConfigError: the plan is of a model in memory or of a config, which there is nothing to load of.
        CtxoptError: transformers cannot load it; the message is its first line.
    """
    found = plan if isinstance(plan, Plan) else Plan.from_dict(plan)
    if found.weights == LOADED:
        raise ConfigError("plan.weights", LOADED, "a scheme to load with: this plan is of a model that is loaded")
    register()
    place = _place(found, device)
    source, extra = source_of(found.model)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **extra)
        model = _model(found, source, {**extra, **options}, place)
    except LOAD_ERRORS as error:
        if isinstance(error, CtxoptError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CtxoptError(f"cannot load {found.model!r} as planned: {reason}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return patch_model(model.eval(), plan=found), tokenizer


def source_of(name: str) -> tuple[str, dict[str, Any]]:
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    return str(path) if path.exists() else name, {}


def _place(plan: Plan, device: Any) -> torch.device:
    if device is not None:
        return torch.device(device)
    if plan.device == "cpu" or plan.device.split(":")[0] in ("cuda", "xpu", "mps"):
        return torch.device(plan.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _dtype(place: torch.device) -> torch.dtype:
    native = place.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def _model(plan: Plan, source: str, options: dict[str, Any], place: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    options = {"dtype": _dtype(place), **options}
    kept = [_pattern(_PARTS[part]) for part in plan.on_host]
    late = plan.weights in MIXES and "gguf_file" in options  # such a file is unpacked first, and then packed again
    if plan.weights != PLAIN and not late:
        options["quantization_config"] = _quantization(plan.weights, kept, options["dtype"])
    # Straight to the device where accelerate can do it; else through the host, whose memory then holds the model once.
    direct = place.type != "cpu" and not kept and not late and importlib.util.find_spec("accelerate") is not None
    if direct:
        options["device_map"] = {"": str(place)}
    model = AutoModelForCausalLM.from_pretrained(source, **options)
    if late:
        quantize_(model, plan.weights, exclude=kept)
    if not direct and place.type != "cpu":
        _move(model, place, plan.on_host)
    return model


def _quantization(scheme: str, kept: list[str], dtype: torch.dtype) -> Any:
    if scheme in MIXES:
        return GgufQuantConfig(scheme, exclude=kept)
    from transformers import BitsAndBytesConfig, HqqConfig

    if scheme == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if scheme == "hqq4":
        return HqqConfig(nbits=4, group_size=64)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _pattern(role: Role) -> str:
    return rf"(^|\.)({'|'.join(NAMES[role])})$"


def _move(model: Any, place: torch.device, on_host: tuple[str, ...]) -> None:
    """Move all but the parts that stay on the host; `patch_model` hooks those."""
    ends = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    staying = [ends[name] for name in on_host]
    for module in model.modules():
        if not any(module is part for part in staying):
            module._apply(lambda tensor: tensor.to(place), recurse=False)
