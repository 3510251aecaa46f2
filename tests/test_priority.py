"""`ctx_priority`: which tokens stay, against a from-scratch reference on exactly those, in every mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_ctxopt
from hf_ctxopt.errors import ConfigError, UnsupportedModelError
from hf_ctxopt.integration.compat import cache_in, generate_argument
from hf_ctxopt.pages.integrity import check
from tests.families import build, model_for
from tests.feeding import routed
from tests.streaming_reference import kept_logits

SIZE, BUDGET = 8, 48
RANGES = [[0, 12, 90], [24, 32, 60], [40, 48, 5]]
TEXT = torch.randint(2, 90, (160,), generator=torch.Generator().manual_seed(5))
OPTIONS: dict[str, Any] = {"budget": BUDGET, "page_size": SIZE, "priorities": RANGES}


class Keeper:
    """The rule again, in plain loops: pages of a text, dropped by priority and then by age."""

    def __init__(self, ranges: list[Any], budget: int = BUDGET, decode: int = 35) -> None:
        self.ranges, self.budget, self.decode = ranges, budget, decode
        self.pages: list[int] = []
        self.worth: dict[int, int] = {}
        self.seen = 0

    def step(self, count: int) -> list[int]:
        """Feed `count` tokens; returns the earlier tokens that they see."""
        while True:
            held = [t for page in self.pages for t in range(page * SIZE, min(page * SIZE + SIZE, self.seen))]
            old = [page for page in self.pages if page < (self.seen - 1) // SIZE]
            if len(held) <= max(self.budget - count, self.budget // 2) or not old:
                break
            self.pages.remove(min(old, key=lambda page: (self.worth[page], page)))
        for page in range(-(-self.seen // SIZE), -(-(self.seen + count) // SIZE)):
            self.pages.append(page)
            inside = [worth for start, end, worth in self.ranges if start <= page * SIZE < (end or 1 << 30)]
            self.worth[page] = self.decode if count == 1 else (inside or [35])[0]
        self.seen += count
        return held


def plan(counts: list[int], keeper: Keeper) -> list[tuple[int, int, list[int]]]:
    """The steps of a text for `kept_logits`."""
    steps, start = [], 0
    for count in counts:
        steps.append((start, start + count, keeper.step(count)))
        start += count
    return steps


def feed(model: Any, cache: Any, counts: list[int], ids: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
    """Logits of all positions, the cache's accounts checked after every step."""
    logits, start = [], 0
    for count in counts:
        given = {} if mask is None else {"attention_mask": mask[:, : start + count]}
        if mask is not None:
            given["position_ids"] = (mask[:, : start + count].cumsum(-1) - 1).clamp(min=0)[:, start:]
        with torch.no_grad():
            chunk = ids[:, start : start + count]
            logits.append(model(chunk, use_cache=True, **{generate_argument(): cache}, **given).logits)
        start += count
        for group in cache.groups:
            check(group, strict=True)
    return torch.cat(logits, dim=1)


COUNTS = [[1] * 160, [20, 13, *[1] * 40, 30, 1, 1, 7, *[1] * 47], [40] * 4, [8] * 20, [160]]


@pytest.mark.parametrize("counts", COUNTS, ids=lambda counts: "-".join(map(str, counts[:4])))
@pytest.mark.parametrize("route", ["dense", "fused"])
def test_logits_are_those_of_exactly_the_kept_tokens(counts: list[int], route: str) -> None:
    model = model_for("llama", route)
    keeper = Keeper(RANGES)
    want = kept_logits(model, TEXT, plan(counts, keeper))
    with routed(route, model, "ctx_priority", **OPTIONS):
        cache = hf_ctxopt.make_cache(model, "ctx_priority", **OPTIONS)
        got = feed(model, cache, counts, TEXT[None])[0]
    torch.testing.assert_close(got, want, atol=2e-4, rtol=0)
    held = [page for page, _ in cache.groups[0].rows[0].pages()]
    assert held == keeper.pages
    if counts[-1] == 1:
        assert cache.stats()["tokens_held"] <= BUDGET
        assert {0, 1} <= set(held) or set(counts) == {1}  # the range of 90; one-token steps have none
        assert 5 not in held


def test_nothing_is_pinned() -> None:
    model = model_for("llama", "dense")
    cache = hf_ctxopt.make_cache(model, "ctx_priority", budget=32, page_size=8, priorities=[[0, None, 100]])
    feed(model, cache, [20, 20, 20, 20], TEXT[None])
    assert [page for page, _ in cache.groups[0].rows[0].pages()] == [6, 7, 8, 9]


def test_recency_alone_loses_what_a_priority_keeps() -> None:
    model = model_for("llama", "dense")
    held = {}
    for name, ranges in (("ranked", [[0, 16, 90]]), ("recent", None)):
        cache = hf_ctxopt.make_cache(model, "ctx_priority", budget=48, page_size=8, priorities=ranges)
        feed(model, cache, [16] * 10, TEXT[None])
        held[name] = [page for page, _ in cache.groups[0].rows[0].pages()]
    assert held["ranked"][:2] == [0, 1]
    assert 0 not in held["recent"]


def test_priorities_end_with_their_duration() -> None:
    from hf_ctxopt.caches import PriorityCache
    from hf_ctxopt.caches.options import PriorityOptions

    model, now = model_for("llama", "dense"), [0.0]
    ranges = [{"start": 0, "end": 16, "priority": 90, "duration": 5.0}]
    options = PriorityOptions(budget=48, page_size=8, priorities=ranges)
    cache = PriorityCache(model.config, options, clock=lambda: now[0])
    feed(model, cache, [16] * 5, TEXT[None])
    assert [page for page, _ in cache.groups[0].rows[0].pages()][:2] == [0, 1]
    now[0] = 6.0
    with torch.no_grad():
        model(TEXT[None, 80:96], use_cache=True, **{generate_argument(): cache})
    assert 0 not in dict(cache.groups[0].rows[0].pages())


def test_generated_tokens_have_a_priority_of_their_own() -> None:
    model = model_for("llama", "dense")
    for worth, kept in ((90, True), (0, False)):
        cache = hf_ctxopt.make_cache(model, "ctx_priority", budget=48, page_size=8, decode_priority=worth)
        feed(model, cache, [16, *[1] * 16, 16, 16, 16], TEXT[None])
        pages = dict(cache.groups[0].rows[0].pages())
        assert (2 in pages and 3 in pages) == kept


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi", "gpt_oss"])
@pytest.mark.parametrize("route", ["dense", "fused"])
def test_with_room_for_all_it_is_dynamic_cache(family: str, route: str) -> None:
    model = build(family)
    want = model.generate(TEXT[None, :30], max_new_tokens=20, do_sample=False)
    with routed(route, model, "ctx_priority", budget=64, page_size=4):
        named = {} if route == "fused" else {"cache_implementation": "ctx_priority",
                                             "cache_config": {"budget": 64, "page_size": 4}}  # fmt: skip
        got = model.generate(TEXT[None, :30], max_new_tokens=20, do_sample=False, **named)
    assert torch.equal(got, want)


@pytest.mark.parametrize("route", ["dense", "fused"])
@pytest.mark.parametrize("kv_bits", [16, 8])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_both_routes_agree_while_pages_go(family: str, route: str, kv_bits: int) -> None:
    """Generation far past the budget: tokens held, bytes held and the other route's logits."""
    outs = {}
    for way in ("dense", "fused"):
        model = build(family)
        options = {**OPTIONS, "kv_bits": kv_bits}
        with routed(way, model, "ctx_priority", **options):
            named = {} if way == "fused" else {"cache_implementation": "ctx_priority", "cache_config": options}
            outs[way] = model.generate(TEXT[None, :100], max_new_tokens=40, do_sample=False, output_logits=True,
                                       return_dict_in_generate=True, **named)  # fmt: skip
    tolerance = 1e-4 if kv_bits == 16 else 5e-3
    for one, other in zip(outs["dense"].logits[:4], outs["fused"].logits[:4], strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=0)
    cache = cache_in(outs[route])
    assert cache.stats()["tokens_held"] <= BUDGET
    full = next(group for group in cache.groups if group.policy.most_held is None)
    assert sum(full.arena.used) <= BUDGET // SIZE
    assert full.arena.capacity.open <= BUDGET // SIZE + 1  # memory is given back after the prompt


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}, {"num_beams": 1}])
def test_rows_of_unequal_padding_on_the_fused_route(mode: dict[str, Any]) -> None:
    """Each row of a batch gives what it gives alone."""
    model = build("llama")
    texts = [TEXT[:70], TEXT[20:75]]
    ids = torch.stack([texts[0], torch.cat([torch.zeros(15, dtype=torch.long), texts[1]])])
    mask = torch.ones_like(ids)
    mask[1, :15] = 0
    with hf_ctxopt.patched(model, cache="ctx_priority", **OPTIONS):
        call = {"max_new_tokens": 12, "do_sample": False, "prefill_chunk_size": 10_000, **mode}
        torch.manual_seed(1)
        got = model.generate(ids, attention_mask=mask, **call)
        if "do_sample" in mode:
            assert got.shape[0] == 4
            return
        for row, text in enumerate(texts):
            alone = model.generate(text[None], **call)
            assert torch.equal(got[row, -12:], alone[0, -12:])


def test_dense_rows_of_unequal_padding_are_refused_where_pages_must_go() -> None:
    model = build("llama")
    ids = TEXT[None, :40].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    call = {"attention_mask": mask, "cache_implementation": "ctx_priority", "cache_config": OPTIONS}
    with pytest.raises(ConfigError, match="padding"):
        model.generate(ids, max_new_tokens=20, **call)
    model.generate(ids, max_new_tokens=2, **call)


def test_what_was_evicted_cannot_be_cropped_into() -> None:
    model = model_for("llama", "dense")
    cache = hf_ctxopt.make_cache(model, "ctx_priority", **OPTIONS)
    feed(model, cache, [40, *[1] * 9], TEXT[None])
    with pytest.raises(ConfigError, match="evicted"):
        cache.crop(-5)
    assert cache.get_seq_length() == 49
    want = feed(model, cache, [4], TEXT[None, 49:])
    cache.crop(-4)
    got = feed(model, cache, [4], TEXT[None, 49:])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_assisted_decoding_takes_back_what_it_tried() -> None:
    model = build("llama")
    with hf_ctxopt.patched(model, cache="ctx_priority", budget=200, page_size=8):
        want = model.generate(TEXT[None, :60], max_new_tokens=30, do_sample=False)
        got = model.generate(TEXT[None, :60], max_new_tokens=30, do_sample=False, prompt_lookup_num_tokens=4)
    assert torch.equal(got, want)


@pytest.mark.parametrize("route", ["dense", "fused"])
def test_assisted_decoding_keeps_the_budget(route: str) -> None:
    model = build("llama")
    with routed(route, model, "ctx_priority", **OPTIONS):
        named = {} if route == "fused" else {"cache_implementation": "ctx_priority", "cache_config": OPTIONS}
        out = model.generate(TEXT[None, :60], max_new_tokens=40, do_sample=False, prompt_lookup_num_tokens=4,
                             return_dict_in_generate=True, **named)  # fmt: skip
    cache = cache_in(out)
    cache.check_integrity()
    assert cache.get_seq_length() >= 99
    assert cache.stats()["tokens_held"] <= BUDGET + 5  # the step's own candidates
    assert [0, 1] == [page for page, _ in cache.groups[0].rows[0].pages()][:2]


def test_bytes_are_a_budget_too() -> None:
    model = build("llama")
    page = SIZE * 512
    options = {"budget": f"{7 * page}B", "page_size": SIZE}
    cache = hf_ctxopt.make_cache(model, "ctx_priority", **options)
    feed(model, cache, [8] * 15, TEXT[None])
    assert cache.groups[0].arena.page_bytes == page
    assert cache.nbytes <= 7 * page
    assert cache.stats()["tokens_held"] > 40


@pytest.mark.parametrize(
    "options",
    [{"budget": None}, {"budget": 8}, {"budget": 15}, {"budget": "10B"}, {"priorities": [[3, 1, 2]]},
     {"decode_priority": 200}, {"decode_duration": 0}, {"window": 4}],
    ids=str,
)  # fmt: skip
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    model = build("llama")
    with pytest.raises(ConfigError):
        model.generate(TEXT[None, :20], cache_implementation="ctx_priority",
                       cache_config={"page_size": 8, **options}, max_new_tokens=2)  # fmt: skip


def test_a_model_that_only_slides_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="slides"):
        hf_ctxopt.make_cache(build("mistral"), "ctx_priority", **OPTIONS)


def test_position_biases_are_refused_before_a_token() -> None:
    model = build("bloom")
    with pytest.raises(UnsupportedModelError, match="ctx_priority"):
        model.generate(TEXT[None, :40], cache_implementation="ctx_priority", cache_config=OPTIONS, max_new_tokens=20)


def test_no_query_sees_a_later_token() -> None:
    model = model_for("llama", "dense")
    counts = [30, *[1] * 30, 20, 20]
    logits = []
    for change in (None, 70):
        ids = TEXT[None, :100].clone()
        if change is not None:
            ids[0, change:] = (ids[0, change:] + 1) % 90
        cache = hf_ctxopt.make_cache(model, "ctx_priority", **OPTIONS)
        logits.append(feed(model, cache, counts, ids)[0])
    assert torch.equal(logits[0][:70], logits[1][:70])
    assert not torch.allclose(logits[0][70], logits[1][70])
