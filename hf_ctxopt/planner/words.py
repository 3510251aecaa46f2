"""A plan in words and numbers: the rows that `print(plan)` and `ctxopt plan` show."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .plan import Plan

PART_NAMES = {
    "weights": "weights",
    "embeddings": "embedding and head",
    "kv": "keys and values",
    "activations": "prompt activations",
    "logits": "logits",
    "graph": "decode graph, workspaces",
    "cuda_context": "CUDA context",
    "others": "other processes",
    "reserve": "reserve",
}


def size(count: float) -> str:
    """Bytes in words, e.g. `"1.50 GiB"`."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def settings(plan: Plan) -> list[tuple[str, str]]:
    """(name, value) of every setting, for a person."""
    keys, values = plan.kv_bits["k"], plan.kv_bits["v"]
    rows = [
        ("model", plan.model),
        ("card", f"{plan.device}, {size(plan.vram)}"),
        ("weights", plan.weights),
        ("cache", plan.cache),
        ("bits of keys and values", str(keys) if keys == values else f"{keys} and {values}"),
        ("context", f"{plan.context:,} tokens" + (f" x {plan.batch}" if plan.batch > 1 else "")),
        ("room for", "a text of any length" if plan.capacity is None else f"{plan.capacity:,} tokens"),
    ]
    if plan.window is not None:
        rows.append(("kept", f"{plan.sinks} first and {plan.window:,} last tokens"))
    if plan.agents > 1:
        rows.append(("agents", str(plan.agents)))
    rows.append(("pages", f"{plan.pages:,} of {plan.page_size} tokens, {size(plan.page_bytes)} each"))
    rows.append(("prefill chunk", f"{plan.chunk:,} tokens"))
    if plan.on_host:
        rows.append(("in host memory", f"{' and '.join(plan.on_host)} ({size(plan.host_bytes)})"))
    speed = "unknown" if plan.ms_per_token is None else f"about {plan.ms_per_token:.1f} ms per token"
    return [*rows, ("speed", speed), ("quality", plan.quality)]


def parts(plan: Plan) -> list[tuple[str, int]]:
    """(name, bytes) of every part that takes any, for a person."""
    return [(PART_NAMES.get(name, name), count) for name, count in plan.bytes.items() if count]


def described(plan: Plan) -> str:
    """The whole plan as text."""
    lines = [f"{name + ':':<25} {value}" for name, value in settings(plan)]
    lines += ["", *(f"  {name:<25} {size(count):>10}" for name, count in parts(plan))]
    lines += [f"  {'in all':<25} {size(plan.total_bytes):>10} of {size(plan.vram)}", ""]
    return "\n".join([*lines, *(f"- {reason}" for reason in plan.reasons)])
