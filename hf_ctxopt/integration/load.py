"""`load`: from a plan to the running model and its tokenizer."""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, CtxoptError, first_line
from ..planner.plan import Plan
from ..planner.schemes import LOADED
from ..planner.search import plan as make_plan
from ..weights.gguf_file import GgufFile
from ..weights.gguf_load import gguf_config, load_gguf
from ..weights.gguf_vocabulary import named_as_in
from ..weights.mixes import MIXES
from ..weights.others import OTHERS, check_other
from ..weights.roles import NAMES, Role
from ..weights.stored import stored_of, unpacking
from .packing import check_scheme, loading_config, pack_loaded
from .patch import patch_model
from .register import register

LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError)
"""What transformers raises for models that are missing, foreign or broken."""
_READING = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")
_PARTS = {"embedding": Role.EMBEDDING, "head": Role.HEAD}


def load(
    plan: Plan | Mapping[str, Any] | str | os.PathLike[str], device: Any = None, *, weights: str | None = None,
    **options: Any
) -> tuple[Any, Any]:  # fmt: skip
    """Load what a plan names, with its weights packed as planned, and patch it.

    A `.gguf` file's blocks stay as they are where the plan's weights are the file's, as they are by default. For other
    weights, and for parts on the host, it is unpacked to 16 bits first and packed again: that loses precision twice.

    Args:
        plan: a plan made from a folder, a `.gguf` file or a Hub id; or what `Plan.to_dict` made of one; or such a
            folder, file or id itself, which is then planned for with the defaults of `hf_ctxopt.plan`.
        device: where it is to run; by default the plan's device if it is here, else the first GPU, else the CPU.
        weights: with a folder, file or id: how its weights are to be stored, one of `planner.schemes.SCHEMES`.
        **options: go to `from_pretrained` (e.g. `local_files_only=True`).

    Returns:
        The model, patched and ready to generate, and its tokenizer.

    Raises:
        ConfigError: an option of `hf_ctxopt.plan`; a plan of a model in memory or of a config, of which nothing can
            be loaded; a scheme that does not run on the device, or that the checkpoint rules out; a `dtype` of other
            than two bytes; a device that is not here.
        CtxoptError: a package that the scheme needs is missing; transformers cannot load it: the message is its first
            line.
        DoesNotFitError: of the planning.
    """
    _check_planning(options)
    found = _plan(plan, device, weights)
    if found.weights == LOADED:
        raise ConfigError("plan.weights", LOADED, "a scheme to load with: this plan is of a model that is loaded")
    _check_dtype(options)
    register()
    place = _place(found, device)
    if found.weights in OTHERS:
        check_other(found.weights, place.type)  # before anything is read
    source, extra = source_of(found.model)
    try:
        file = _as_it_is(found, source, extra)
        model, tokenizer = (None, None) if file is None else _packed(file, options, place)
        tokenizer = tokenizer or _tokenizer(source, {**extra, **_hub(options)}, file)
        model = model or _model(found, source, {**extra, **options}, place)
    except LOAD_ERRORS as error:
        if isinstance(error, CtxoptError):
            raise
        raise CtxoptError(f"cannot load {found.model!r} as planned: {first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return patch_model(model.eval(), plan=found), tokenizer


def _check_planning(options: Mapping[str, Any]) -> None:
    """Refuses what belongs to a plan, which `from_pretrained` would find odd. Raises `ConfigError`."""
    for name in set(options) & set(inspect.signature(make_plan).parameters):
        raise ConfigError(name, options[name], f"unset here: load(hf_ctxopt.plan(..., {name}=...)) plans with it")


def _plan(plan: Any, device: Any, weights: str | None) -> Plan:
    if isinstance(plan, str | os.PathLike):
        return make_plan(os.fspath(plan), device=device, weights=weights)
    if weights is not None:
        raise ConfigError("weights", weights, "None beside a plan, which has its own")
    return plan if isinstance(plan, Plan) else Plan.from_dict(plan)


def _check_dtype(options: Mapping[str, Any]) -> None:
    """Plans count two bytes for what is not packed and for keys and values."""
    for name in ("dtype", "torch_dtype"):
        given = options.get(name)
        dtype = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
        if given in (None, "auto"):
            continue
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize != 2:
            allowed = "a dtype of two bytes, as plans count them; a model in another is planned for as it stands, by "
            raise ConfigError(name, given, allowed + "patch_model(model)")


def _hub(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that say where and how to read, which the config and the tokenizer need too."""
    return {name: options[name] for name in _READING if name in options}


def source_of(name: str) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` loads `name` from, a path or a Hub id, and what it must be told of a `.gguf` file."""
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    return str(path) if path.exists() else name, {}


def _place(plan: Plan, device: Any) -> torch.device:
    """Where the model is to run. Raises `ConfigError`: there is no such device here."""
    try:
        place = torch.device(plan.device if device is None else device)
    except (RuntimeError, TypeError):  # the profile of a card, or no device at all
        place = None
    accelerator = torch.accelerator.current_accelerator()
    count = 0 if accelerator is None else torch.accelerator.device_count()
    kinds = {"cpu": 1} if accelerator is None else {"cpu": 1, accelerator.type: count}
    if place is not None and (place.index or 0) < kinds.get(place.type, 0):
        return place
    if device is not None:
        here = ", ".join(f"{kind}:{index}" for kind, number in kinds.items() for index in range(number))
        raise ConfigError("device", device, f"one of {here}")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _dtype(place: torch.device) -> torch.dtype:
    native = place.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def _as_it_is(plan: Plan, source: str, extra: Mapping[str, Any]) -> GgufFile | None:
    """The `.gguf` file of a plan that takes its weights as they are; other plans unpack it, and pack again."""
    if "gguf_file" not in extra or plan.on_host:
        return None
    file = GgufFile(Path(source) / extra["gguf_file"])
    return file if file.mix == plan.weights else None


def _tokenizer(source: str, options: dict[str, Any], file: GgufFile | None) -> Any:
    """The tokenizer beside the weights, or in the file that holds them."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except LOAD_ERRORS as error:
        if file is None:
            raise
        where = file.header.path
        raise CtxoptError(
            f"{where} has no vocabulary: write it with save_gguf(..., tokenizer=), or use load_gguf"
        ) from error
    if "gguf_file" in options:
        return named_as_in(GgufFile(Path(source) / options["gguf_file"]), tokenizer)
    return tokenizer


def _packed(file: GgufFile, options: Mapping[str, Any], place: torch.device) -> tuple[Any, Any]:
    """Model and tokenizer of a `.gguf` file whose blocks stay as they are."""
    options = {"dtype": _dtype(place), **options}
    dtype = options.pop("dtype")
    dtype = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    model, tokenizer = load_gguf(file.header.path, dtype, **options)
    return model.to(place), tokenizer


def _model(plan: Plan, source: str, options: dict[str, Any], place: torch.device) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {"dtype": _dtype(place), **options}
    kept = [_pattern(_PARTS[part]) for part in plan.on_host]
    from_gguf = "gguf_file" in options  # such a file is unpacked first, and then packed as planned
    stored, unpacked = None, False
    if from_gguf:
        options["config"] = gguf_config(GgufFile(Path(source) / options["gguf_file"]))
    else:
        own = AutoConfig.from_pretrained(source, **_hub(options))
        stored = stored_of(own)
        if unpacked := unpacking(own):
            options["config"] = own
    ready = check_scheme(plan.weights, place.type, stored)
    config = None if ready else loading_config(plan.weights, kept, options["dtype"])
    late = not ready and (from_gguf or unpacked or config is None)
    if late and config is not None and plan.weights not in MIXES:
        what = "a .gguf file" if from_gguf else "a checkpoint that is unpacked first"
        raise ConfigError("plan.weights", plan.weights, f"one of {', '.join(MIXES)} for {what}")
    if config is not None and not late:
        options["quantization_config"] = config
    # Straight to the device where accelerate can do it; else through the host, whose memory then holds the model once.
    direct = place.type != "cpu" and not kept and not late and importlib.util.find_spec("accelerate") is not None
    if direct:
        options["device_map"] = {"": str(place)}
    model = AutoModelForCausalLM.from_pretrained(source, **options)
    if late:
        pack_loaded(model, plan.weights, kept, place)
    if not direct and place.type != "cpu":
        _move(model, place, plan.on_host)
    return model


def _pattern(role: Role) -> str:
    return rf"(^|\.)({'|'.join(NAMES[role])})$"


def _move(model: Any, place: torch.device, on_host: tuple[str, ...]) -> None:
    """Move all but the parts that stay on the host; `patch_model` hooks those."""
    ends = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    staying = [ends[name] for name in on_host]
    for module in model.modules():
        if not any(module is part for part in staying):
            module._apply(lambda tensor: tensor.to(place), recurse=False)
