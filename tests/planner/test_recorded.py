"""What plans promised, held to what running them took: `gpu_plans.json`, of allocators capped at 8, 12 and 24 GiB."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import hf_ctxopt
from hf_ctxopt.planner.curve import curve
from hf_ctxopt.planner.plan import Plan

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
CASES = json.loads((RESULTS / "gpu_plans.json").read_text())["cases"]
MODELS = json.loads((RESULTS.parent / "models.json").read_text())


@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_recorded_plan(number: int) -> None:
    """The peak within 5 %, the time per token within 30 %, at each context that was run to its end."""
    row = CASES[number]
    plan, shape = Plan.from_dict(row["plan"]), MODELS[row["case"]["shape"]]
    outside = plan.bytes["cuda_context"] + plan.bytes["reserve"]
    for run in row["runs"]:
        predicted = sum(curve(shape, plan, [run["context"]])[0].values()) - outside
        assert predicted == pytest.approx(run["peak"], rel=0.05), run["context"]
        if not plan.on_host:
            assert expected(shape, plan, run["context"]) == pytest.approx(run["ms"], rel=0.3), run["context"]
    if "beyond" in row:
        assert row["beyond"]["too_much"], "a tenth more would have fitted"


def expected(shape: dict[str, Any], plan: Plan, context: int) -> float | None:
    """Milliseconds per token that a plan for the H200 has for the same settings."""
    bits = dict(plan.kv_bits)
    return hf_ctxopt.plan(shape, gpu="h200", weights=plan.weights, kv_bits=bits, context=context).ms_per_token


def test_what_was_recorded() -> None:
    """Every plan was run to the context it was made for, and to all that its pages hold."""
    assert len(CASES) >= 11
    for row in CASES:
        contexts = {run["context"] for run in row["runs"]}
        assert {row["plan"]["context"], row["plan"]["capacity"] or row["plan"]["context"]} == contexts
        assert all("peak" in run for run in row["runs"])
