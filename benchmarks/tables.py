"""The README's tables of measured figures, made from the JSON in `benchmarks/results`.

`python benchmarks/tables.py` writes them between their markers; a test holds README and JSON together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"


def quality(data: dict[str, Any]) -> str:
    """KL, agreement and perplexity of quantized caches against the dense model."""
    lines = ["| cache | bits per value | KL (nats) | same top-1 | perplexity ratio |", "|---|---:|---:|---:|---:|"]
    names = {
        "int8": "`kv_bits=8`", "k8v4": '`kv_bits={"k": 8, "v": 4}`', "int4": "`kv_bits=4`", "int2": "`kv_bits=2`",
        "hqq8": "transformers, hqq 8", "fp8": "transformers, fp8", "quanto4": "transformers, quanto 4",
        "hqq4": "transformers, hqq 4", "quanto2": "transformers, quanto 2", "hqq2": "transformers, hqq 2",
    }  # fmt: skip
    rows = {row["cache"]: row for row in data["rows"]}
    for key, name in names.items():
        row = rows[key]
        bits = row["bits_per_value_bf16"] or row["bits_per_value"]
        lines.append(f"| {name} | {bits:.1f} | {row['kl']:.2g} | {100 * row['top1_agreement']:.1f}% | "
                     f"{row['perplexity_ratio']:.{4 if row['perplexity_ratio'] < 10 else 1}f} |")  # fmt: skip
    where = data["environment"]
    return "\n".join(lines) + (
        f"\n\nSmolLM2-135M-Instruct, fp32, {data['settings']['tokens']} tokens of real text read in chunks, so that "
        "later tokens meet quantized\nhistory; bits with every scale and open page of a bf16 cache counted. "
        f"{where['processor']}, transformers {where['versions']['transformers']}."
    )


def decode(data: dict[str, Any]) -> str:
    """Milliseconds per token through `generate`."""
    rows = {(row["context"], row["batch"], row["cache"]): row for row in data["decode"]}
    points = [(2048, 1), (32768, 1), (131072, 1), (32768, 8)]
    head = "| cache | " + " | ".join(f"{c // 1024} k" + (f", batch {b}" if b > 1 else "") for c, b in points) + " |"
    lines = [head, "|---|" + "---:|" * len(points)]
    names = {"ctx_paged": "`ctx_paged`, patched", "ctx_paged compiled": "same, `compile=True`",
             "ctx_paged int8": "`kv_bits=8`", "ctx_paged int4": "`kv_bits=4`", "ctx_sink": "`ctx_sink` 4 + 1020",
             "dynamic": "DynamicCache", "hqq4": "QuantizedCache hqq 4",
             "static": "StaticCache"}  # fmt: skip
    for key, name in names.items():
        cells = [rows.get((context, batch, key)) for context, batch in points]
        lines.append(f"| {name} | " + " | ".join("" if c is None else f"{c['ms']:.1f}" for c in cells) + " |")
    return "\n".join(lines) + (
        f"\n\nMilliseconds per token, Llama-3.1-8B shape, random bf16 weights, one {data['device']}, torch "
        f"{data['torch']}, transformers {data['transformers']},\ncuDNN attention off; medians of one run."
    )


def fit(data: dict[str, Any]) -> str:
    """Contexts on an emulated 8 GB card."""
    lines = ["| cache | context | ms per token | peak GiB |", "|---|---:|---:|---:|"]
    for row in data["fit"]:
        if "tokens" in row:
            flat = "flat" if row["flat"] else "not flat"
            lines.append(f"| `ctx_sink`, a stream | {row['tokens']:,} ({flat}) | | {row['peak_gib']:.2f} |")
        elif row["fits"]:
            lines.append(f"| {row['cache']} | {row['fits']:,} | {row['ms']:.1f} | {row['peak_gib']:.2f} |")
        else:
            lines.append(f"| {row['cache']} | not {row['refused_at']:,} | | |")
    card = data["card"]
    return "\n".join(lines) + (
        f"\n\nLlama-2-7B shape, nf4 weights ({card['weights_gib']:.2f} GiB), an allocator limit of "
        f"{card['limit_gib']:.2f} GiB (8 GiB less the CUDA context) on one {data['device']};\ntrue prefill by "
        "`generate`, the first context tried of each cache."
    )


def agents(data: dict[str, Any]) -> str:
    """Hit rates of the agents' trace by budget, and SmolLM2's times to the first token."""
    ways = [(0, "recency"), (1, "recency"), (1, "priority"), (2, "recency"), (2, "priority")]
    curves = {(c["floods"], c["kind"]): c["hit_rate"] for c in data["hit_rates"] if c["answers"]}
    lines = [
        "| store's budget (tokens) | no floods | 1 flood, recency | 1, priority | 2 floods, recency | 2, priority |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for budget in ("8192", "12288", "16384", "24576", "32768"):
        cells = " | ".join(f"{100 * curves[way][budget]:.1f}%" for way in ways)
        lines.append(f"| {int(budget):,} | {cells} |")
    turns, line, salts, where = data["turns"], data["line"], data["salts"], data["environment"]
    warm, cold, settings = 1000 * turns["later_seconds"], 1000 * turns["later_cold_seconds"], data["settings"]
    clock = "seconds of the processor" if settings.get("clock") == "cpu" else "a busy machine, so the times say little"
    slope, apart = 1000 * line["seconds_per_token"], salts["other_salt_over_unknown"]
    lines += [
        "",
        "Hit rate of the agents' prompt tokens: 8 agents, 12 turns each in shuffled order, a system prompt of 1,024",
        "tokens, roles of 128, 64 tokens asked and 64 answered a turn; a flood is a request of 1,024 tokens that",
        f"nobody repeats, after every call. On SmolLM2-135M, {settings['agents']} agents with "
        f"{settings['system_tokens']} shared tokens, the first token",
        f"of a later turn came after {warm:.0f} ms (median), without a store after {cold:.0f} ms: "
        f"{turns['times_lower']:.1f} times lower. Time against",
        f"uncached tokens is a line of {slope:.1f} ms a token (R² {line['r_squared']:.3f}). A text that only",
        f"another salt has takes {apart:.2f} times as long as one that nobody has. {where['processor']}, "
        f"{where['threads']} threads\n({clock}), transformers {where['versions']['transformers']}.",
    ]
    return "\n".join(lines)


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "agents-table": ("agents.json", agents),
    "quality-table": ("quality.json", quality),
    "gpu-decode-table": ("gpu_decode.json", decode),
    "gpu-fit-table": ("gpu_fit_8gb.json", fit),
}


def filled(text: str) -> str:
    """`text` with every table between its markers made anew."""
    for name, (file, table) in TABLES.items():
        made = table(json.loads((RESULTS / file).read_text(encoding="utf-8")))
        block = re.compile(rf"<!-- {name} -->\n.*?<!-- /{name} -->", re.DOTALL)
        if not block.search(text):
            raise ValueError(f"the README has no markers of {name}")
        text = block.sub(lambda _, name=name, made=made: f"<!-- {name} -->\n{made}\n<!-- /{name} -->", text)
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
