"""The tables of the documentation's page of benchmarks, made from the JSON in `benchmarks/results`.

Those that the README shows too are the README's (`tables.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tables import RESULTS, TABLES

Table = Callable[[dict[str, Any]], str]


def made(name: str) -> str:
    """The table called `name`, from its file."""
    file, table = FIGURES[name]
    return table(_read(RESULTS / file)) if file else files()


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], below: str) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows), "", below])


def _where(data: dict[str, Any]) -> str:
    """Device and versions, of either kind of file."""
    if "environment" not in data:
        return (
            ", ".join([data["device"], f"torch {data['torch']}", data["dtype"], f"commit `{data['commit'][:7]}`"])
            + "."
        )
    where = data["environment"]
    return (
        f"{_machine(where)}, {where['threads']} threads, torch {where['versions']['torch']}, "
        f"transformers {where['versions']['transformers']}, commit `{where['commit'][:7]}`."
    )


def _machine(where: dict[str, Any]) -> str:
    """The GPU, or the processor where none took part."""
    device = str(where.get("device", ""))
    return device if device.startswith("NVIDIA") else str(where.get("processor", device))


def demo(data: dict[str, Any]) -> str:
    """Bytes, time and quality of three caches over one stream."""
    rows = [
        [row["cache"], f"{row['bytes_held'] / 2**20:.1f}", f"{row['ms_per_token_end']:.1f}",
         f"{abs(row['kl_vs_dense']):.2g}", f"{row['top1_agreement']:.1%}", f"{row['perplexity']:.2f}"]
        for row in data["rows"]
    ]  # fmt: skip
    head = ("cache", "MiB held", "ms/token at the end", "KL (nats)", "same top-1", "perplexity")
    tokens = data["settings"]["tokens"]
    return _table(head, rows, f"SmolLM2-135M-Instruct, fp32, a stream of {tokens:,} tokens. {_where(data)}")


def most(data: dict[str, Any]) -> str:
    """The largest contexts that the allocator allowed; rows that the run had no time for are left out."""
    rows = [
        [row["cache"], f"{row['fits']:,}", f"{row['refused_at']:,}", f"{row['ms']:.1f}", f"{row['peak_gib']:.2f}"]
        for row in data["fit"]
        if row.get("fits") and row.get("refused_at")
    ]
    limit = data["card"]["limit_gib"]
    below = f"The same model and limit ({limit:.2f} GiB), up to the first refusal. {_where(data)}"
    return _table(("cache", "context held", "refused at", "ms per token", "peak GiB"), rows, below)


def prefill(data: dict[str, Any]) -> str:
    """Seconds and peak memory of reading a prompt."""
    rows = [
        [
            row["way"],
            f"{row['context']:,}",
            f"{row['seconds']:.2f}",
            f"{row['peak_gib']:.2f}",
            f"{row['held_gib']:.2f}",
        ]
        for row in data["prefill"]
    ]
    weights = data["weights_gib"]
    below = f"Peak and held GiB besides the weights ({weights:.1f} GiB). {_where(data)}"
    return _table(("way", "prompt", "seconds", "peak GiB", "held GiB"), rows, below)


def attention(data: dict[str, Any]) -> str:
    """Microseconds of one layer's decode attention."""
    rows = []
    for row in data["decode_us"]:
        peer = row.get("sdpa_flash_us")
        cells = [f"{row['context']:,}", str(row["batch"]), str(row["bits"]), f"{row['cold_us']:.0f}"]
        rows.append([*cells, f"{row['floor_us']:.0f}", "" if peer is None else f"{peer:.0f}"])
    head = ("context", "batch", "bits", "µs, cold", "µs to read the bytes", "torch's FlashAttention")
    return _table(
        head, rows, f"One layer, {data['shape']}; each call finds its pages out of the L2 cache. {_where(data)}"
    )


def cpu(data: dict[str, Any]) -> str:
    """Speed of decoding on a CPU against DynamicCache in the same run."""
    names = list(dict.fromkeys(row["cache"] for row in data["rows"]))
    points = list(dict.fromkeys((row["dtype"], row["tokens"]) for row in data["rows"]))
    found = {(row["cache"], row["dtype"], row["tokens"]): row for row in data["rows"]}
    rows = []
    for name in names:
        cells = [found.get((name, *point)) for point in points]
        rows.append([name, *("" if cell is None else f"{cell['speed_to_dynamic']:.2f}" for cell in cells)])
    head = ("cache", *(f"{dtype}, {tokens:,}" for dtype, tokens in points))
    return _table(head, rows, f"Speed over DynamicCache's, SmolLM2-135M, by dtype and context. {_where(data)}")


def packed_quality(data: dict[str, Any]) -> str:
    """What packed weights cost."""
    rows = [[row["scheme"], f"{row['kl']:.2g}", f"{row['ratio']:.4f}"] for row in data["rows"]]
    below = (
        f"SmolLM2-135M-Instruct against its fp32 weights, {data['settings']['tokens']:,} tokens. {_where(data)}\n"
        "Not at equal size: rows of 576 are no multiple of 256, so that Q4_K falls back to Q5_0, of more bits. And\n"
        "these weights were themselves unpacked from a Q4_1 file, whose grid GGUF's types with a minimum share."
    )
    return _table(("weights", "KL (nats)", "perplexity ratio"), rows, below)


def packed_cpu(data: dict[str, Any]) -> str:
    """Speed and bytes of packed weights on a CPU."""
    rows = [
        [row["weights"], f"{row['bytes'] / 2**20:.0f}", f"{row['tokens_per_s']:.1f}", f"{row['speed_ratio']:.2f}"]
        for row in data["rows"]
    ]
    other = f"; llama-cpp-python {data['llama_cpp_python']} reads the same blocks" if data["llama_cpp_python"] else ""
    below = f"SmolLM2-135M-Instruct, medians of {data['settings']['rounds']} rounds{other}. {_where(data)}"
    return _table(("weights", "MiB", "tokens per second", "speed ratio"), rows, below)


def encoders(data: dict[str, Any]) -> str:
    """Errors of our block encoders over llama.cpp's: the worst tensor of each type."""
    worst: dict[tuple[str, bool], float] = {}
    for row in data["rows"]:
        key = (row["type"], row["importance"])
        worst[key] = max(worst.get(key, 0.0), row["ratio"])
    types = list(dict.fromkeys(kind for kind, _ in worst))
    rows = [[kind, *(f"{worst[kind, weighted]:.3f}" for weighted in (False, True))] for kind in types]
    head = ("type", "plain", "with importance weights")
    tensors = len({row["tensor"] for row in data["rows"]})
    below = f"Weighted RMSE over that of {data['llama_cpp']}, the worst of {tensors} tensors. {_where(data)}"
    return _table(head, rows, below)


def flat(data: dict[str, Any]) -> str:
    """Time per token against tokens seen."""
    marks = data["settings"]["marks"]
    rows = [
        [name, *(f"{ms:.2f}" for ms in curve["ms_per_token"]), f"{curve['drift']:.1%}"]
        for name, curve in data["figures"].items()
    ]
    head = ("cache", *(f"{mark:,}" for mark in marks), "drift")
    below = f"Milliseconds per token after so many tokens; a {data['settings']['model']} model. {_where(data)}"
    return _table(head, rows, below)


def memory(data: dict[str, Any]) -> str:
    """Peak allocations while a prompt is read."""
    prompts = data["settings"]["prompts"]
    rows = [
        [name, *(f"{peaks[str(prompt)] / 2**20:.1f}" for prompt in prompts), f"{data['peak_ratio'][name]:.2f}"]
        for name, peaks in data["peak_bytes"].items()
    ]
    head = ("cache", *(f"{prompt:,} tokens" for prompt in prompts), "ratio")
    return _table(head, rows, f"Peak MiB of a prompt on a {data['environment']['model']}. {_where(data)}")


def sinks(data: dict[str, Any]) -> str:
    """Perplexity with sinks, without them, and with the window recomputed."""
    name = "at the samples"
    rows = [[way, f"{values[name]:.2f}"] for way, values in data["perplexity"].items()]
    tokens, window = data["settings"]["tokens"], data["settings"]["window"]
    samples = len(data["positions"])
    below = f"SmolLM2-135M-Instruct, {tokens:,} tokens, a window of {window}, {samples} samples. {_where(data)}"
    return _table(("ctx_sink", "perplexity"), rows, below)


def plans(data: dict[str, Any]) -> str:
    """Plans and what running them took."""
    rows = []
    for case in data["cases"]:
        plan = case["plan"]
        for run in case["runs"]:
            rows.append(
                [f"{case['case']['shape']}, {case['case']['gib']} GiB", plan["weights"], str(plan["kv_bits"]["k"]),
                 f"{run['context']:,}", f"{run['peak'] / 2**30:.2f}", f"{run['ms']:.1f}"]
            )  # fmt: skip
    head = ("model, card", "weights", "bits of K and V", "tokens", "peak GiB", "ms per token")
    where = f"{data['device']}, torch {data['torch']}, commit `{data['commit'][:7]}`."
    return _table(head, rows, f"An allocator limit of the card less the CUDA context, random weights. {where}")


def pressure(data: dict[str, Any]) -> str:
    """The same session with and without a monitor."""
    rows = []
    for name, way in (("static", "the plan alone"), ("monitored", "with `Monitor`")):
        found = data[name]
        acts = ", ".join(f"{event['action']} at {event['tokens']:,}" for event in found["events"])
        end = "finished" if found["finished"] else "out of memory"
        rows.append([way, f"{found['tokens']:,}", end, acts or "none"])
    settings = data["settings"]
    below = f"Turns of {settings['turn']:,} tokens and {settings['new']} answered. {_where(data)}"
    return _table(("session", "tokens", "end", "actions"), rows, below)


def loaded(data: dict[str, Any]) -> str:
    """A checkpoint packed while it is read."""
    rows = [
        [str(row["layers"]), f"{row['held_gib']:.2f}", f"{row['peak_gib']:.2f}", f"{row['ratio']:.3f}"]
        for row in data["load"]
    ]  # fmt: skip
    where = f"{data['device']}, torch {data['torch']}, commit `{data['commit'][:7]}`."
    below = f"bf16 safetensors of Llama-2-7B's shape, read into Q4_K_M on the GPU. {where}"
    return _table(("layers", "GiB held", "peak GiB", "peak / held"), rows, below)


def matvec(data: dict[str, Any]) -> str:
    """One row times packed weights."""
    nf4 = {(row["outputs"], row["columns"]): row["us"] for row in data["matvec"] if row["type"] == "nf4"}
    rows = [
        [f"{row['type']}, {row['outputs']:,} x {row['columns']:,}", f"{row['us']:.1f}", f"{row['floor_us']:.1f}",
         f"{nf4[row['outputs'], row['columns']]:.1f}"]
        for row in data["matvec"] if row["type"] != "nf4"
    ]  # fmt: skip
    where = f"{data['device']}, torch {data['torch']}, commit `{data['commit'][:7]}`."
    below = f"Under a CUDA graph, weights rotated through 160 MB; the floor is bytes / 4.3 TB/s. {where}"
    return _table(("weight", "µs", "floor, µs", "bitsandbytes nf4, µs"), rows, below)


def packed_gpu(data: dict[str, Any]) -> str:
    """Whole decode steps of packed models."""
    rows = [
        [row["weights"] + (", `compile=True`" if row["compile"] else ""), f"{row['context']:,}", f"{row['ms']:.2f}"]
        for row in data["decode"] if "weights" in row and row["round"] == 0
    ]  # fmt: skip
    where = f"{data['device']}, torch {data['torch']}, commit `{data['commit'][:7]}`."
    below = f"Milliseconds per token, Llama-2-7B shape, `ctx_paged` with graph replay; nf4 of bitsandbytes. {where}"
    return _table(("weights", "context", "ms per token"), rows, below)


def files() -> str:
    """Every file of results, with the device, the versions and the commit that it is from."""
    rows = []
    for path in sorted(RESULTS.glob("*.json")):
        data = _read(path)
        where = data.get("environment", data)
        versions = where.get("versions", where)
        device = _machine(where)
        cells = [device, versions.get("torch", ""), versions.get("transformers", ""), str(where.get("seed", ""))]
        commit = where.get("commit", "")
        name = f"[`{path.name}`](../benchmarks/results/{path.name})"
        rows.append([name, *map(str, cells), f"`{commit[:7]}`" + (" (dirty)" if commit.endswith("-dirty") else "")])
    head = ("file", "device", "torch", "transformers", "seed", "commit")
    return _table(head, rows, "A commit that is `dirty` had changes that were not committed yet.")


FIGURES: dict[str, tuple[str, Table]] = {
    **TABLES,
    "demo-figures": ("demo.json", demo),
    "fit-most": ("gpu_fit_8gb_most.json", most),
    "prefill": ("gpu_prefill.json", prefill),
    "attention": ("gpu_attention.json", attention),
    "cpu-decode": ("cpu_decode.json", cpu),
    "plans": ("gpu_plans.json", plans),
    "pressure": ("gpu_pressure.json", pressure),
    "load": ("gpu_weights_load.json", loaded),
    "matvec": ("gpu_weights_matvec.json", matvec),
    "packed-gpu": ("gpu_weights.json", packed_gpu),
    "packed-quality": ("packed_quality.json", packed_quality),
    "packed-cpu": ("packed_cpu_decode.json", packed_cpu),
    "encoders": ("weight_encoders.json", encoders),
    "latency": ("latency.json", flat),
    "memory": ("memory.json", memory),
    "sinks": ("negative_control.json", sinks),
    "files": ("", lambda _: files()),
}
"""Name of a table -> its file and what makes it; the list of files has none."""
