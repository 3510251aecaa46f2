"""The equality matrix: every family, in every mode, with every cache that has room for all, on every route.

`ctx_paged` keeps everything and so must `ctx_sink` while its window is longer than the text: tokens are exactly
DynamicCache's, float32 logits within 1e-4. References run under the same attention implementation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

import hf_ctxopt
from tests.families import FAMILIES, assistant_for, model_for
from tests.feeding import routed
from tests.modes import EXCLUDED, MODES, Case, Outcome
from tests.references import reference

TOLERANCE = 1e-4
BF16_TOLERANCE = 0.1
"""Raw bf16 logits here are up to 4, where neighbours are 0.03 apart; a few roundings may differ."""
OPTIONS: dict[str, dict[str, Any]] = {
    "ctx_paged": {"page_size": 4},
    "ctx_sink": {"window": 256, "sinks": 4, "page_size": 8},
    "ctx_prefix": {"page_size": 4, "store": "equality"},
    "ctx_priority": {"page_size": 4, "budget": 256},
}
EAGER_MODES = ("left_padding", "multi_turn")
"""Modes that run under eager too, where sdpa is the family's own: masks differ there, generation does not."""
PRIORITY_FAMILIES = ("llama", "gemma3", "gpt_oss", "phi", "cohere")
"""`ctx_priority` shares all code with `ctx_sink` while nothing is evicted; it has tests of its own for the rest."""
VARIANT_MODES = ("left_padding", "multi_turn")
"""Modes of a family that only varies another one."""


class Cell(NamedTuple):
    """One cell of the matrix; `attn` is the attention implementation of a dense route, None for the family's."""

    family: str
    mode: str
    cache: str
    route: str
    attn: str | None = None


def _cells() -> list[Any]:
    """All cells, each a pytest parameter in its family's xdist group."""
    cells = []
    for family, mode, cache in itertools.product(FAMILIES.values(), MODES, OPTIONS):
        if (family.name, mode) in EXCLUDED or (family.variant and mode not in VARIANT_MODES):
            continue
        if family.variant and cache == "ctx_prefix":
            continue
        if cache == "ctx_priority" and family.name not in PRIORITY_FAMILIES:
            continue
        cells.append(Cell(family.name, mode, cache, "dense"))
        if family.fused:
            cells.append(Cell(family.name, mode, cache, "fused"))
        if family.attn == "sdpa" and not family.variant and mode in EAGER_MODES:
            cells.append(Cell(family.name, mode, cache, "dense", "eager"))
    return [
        pytest.param(cell, id="-".join(part for part in cell if part), marks=pytest.mark.xdist_group(cell.family))
        for cell in cells
    ]


def _run(cell: Cell, options: dict[str, Any]) -> Outcome:
    """The cell's mode with our cache: named in generate on the dense route, left to the patch on the fused one."""
    spec = MODES[cell.mode]
    ids, mask = spec.prompt()
    role = "fused" if cell.route == "fused" else "dense"
    model = model_for(cell.family, role, spec.dtype, cell.attn)
    named = {"cache_implementation": cell.cache, "cache_config": options}
    cache = {} if cell.route == "fused" and cell.mode != "saved_config" else named
    assistant = assistant_for(cell.family) if cell.mode == "assisted" else None
    with routed(cell.route, model, cell.cache, **options):
        return spec.run(Case(model=model, ids=ids, mask=mask, cache=cache, assistant=assistant))


def _check_ours(cell: Cell, outcome: Outcome) -> None:
    """The cache that ran is ours, is whole, and took the route it was asked to take."""
    if outcome.cache is None:
        return
    cache = getattr(outcome.cache, "self_attention_cache", outcome.cache)
    stats = cache.stats()
    assert stats["cache"] == cell.cache
    assert stats["steps"][cell.route] > 0
    assert sum(stats["steps"].values()) == stats["steps"][cell.route]
    reads_pages = FAMILIES[cell.family].builds_dense is None or cell.route == "dense"
    assert (stats["fallbacks"] == {}) == reads_pages
    cache.check_integrity()


def _same_bf16(expected: Outcome, got: Outcome) -> None:
    """Logits agree up to bf16 rounding, row by row, until a row's tokens part at a near-tie."""
    steps = expected.logits.shape[0]
    for row in range(len(expected.sequences)):
        apart = (expected.sequences[row, -steps:] != got.sequences[row, -steps:]).nonzero()
        shared = steps if len(apart) == 0 else int(apart[0]) + 1
        torch.testing.assert_close(
            got.logits[:shared, row].float(), expected.logits[:shared, row].float(), atol=BF16_TOLERANCE, rtol=0
        )


@pytest.mark.parametrize("cell", _cells())
def test_equals_dynamic_cache(cell: Cell) -> None:
    """`ctx_prefix` runs twice: with an empty store, and with one that has the text."""
    expected = reference(cell.family, cell.mode, cell.attn)
    for _ in range(2 if cell.cache == "ctx_prefix" else 1):
        got = _run(cell, OPTIONS[cell.cache])
        if cell.mode == "bf16" and (cell.route == "fused" or cell.cache == "ctx_prefix"):  # prompts read in parts
            _same_bf16(expected, got)
        else:
            assert torch.equal(got.sequences, expected.sequences)
            torch.testing.assert_close(got.logits, expected.logits, atol=TOLERANCE, rtol=0)
        _check_ours(cell, got)


@pytest.fixture(autouse=True)
def _no_stores() -> Iterator[None]:
    """Nothing that one cell stored is found by another."""
    yield
    for name in hf_ctxopt.stores():
        hf_ctxopt.drop_store(name)


@pytest.mark.parametrize("route", ["dense", "fused"])
@pytest.mark.parametrize("options", [{}, {"page_size": 1}, {"page_size": 128}, {"budget": 2048}, {"budget": "4MiB"}])
@pytest.mark.parametrize("cache", list(OPTIONS))
def test_options_that_drop_nothing_change_nothing(cache: str, options: dict[str, Any], route: str) -> None:
    """Other page sizes and a budget that is large enough give the same tokens."""
    if cache == "ctx_priority" and options == {"budget": "4MiB"}:
        options = {"budget": 4096}  # bytes become tokens with the first states: too late for rows of unequal padding
    expected = reference("llama", "left_padding")
    got = _run(Cell("llama", "left_padding", cache, route), options)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(got.logits, expected.logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("route", ["dense", "fused"])
@pytest.mark.parametrize("cache", list(OPTIONS))
def test_a_model_can_assist_itself(cache: str, route: str) -> None:
    """Assistant and model are one object: the name of the cache, or the patch, is seen by both."""
    spec = MODES["assisted"]
    ids, mask = spec.prompt()
    model, options = model_for("llama", route), OPTIONS[cache]
    named = {} if route == "fused" else {"cache_implementation": cache, "cache_config": options}
    with routed(route, model, cache, **options):
        got = spec.run(Case(model=model, ids=ids, mask=mask, cache=named, assistant=model))
    assert torch.equal(got.sequences, reference("llama", "greedy").sequences)


@pytest.mark.parametrize("family", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in FAMILIES])
def test_the_patch_leaves_nothing_behind(family: str) -> None:
    """After the fused cells of a family, its model runs as before with transformers' own cache."""
    if not FAMILIES[family].fused:
        model = model_for(family, "dense")
    else:
        model = model_for(family, "fused")
        with hf_ctxopt.patched(model, cache="ctx_paged"):
            pass
    spec = MODES["left_padding"]
    ids, mask = spec.prompt()
    got = spec.run(Case(model=model, ids=ids, mask=mask))
    expected = reference(family, "left_padding")
    assert type(got.cache) is type(expected.cache)
    assert torch.equal(got.sequences, expected.sequences)
