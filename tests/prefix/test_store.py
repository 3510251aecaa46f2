"""The store: isolation, priorities, the second tier, budgets, leaks and interruptions."""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest
import torch

import hf_ctxopt
from hf_ctxopt.caches.store import PrefixStore
from hf_ctxopt.errors import CacheFullError, ConfigError, IntegrityError
from hf_ctxopt.integration.compat import cache_in
from hf_ctxopt.pages import radix_node
from tests.families import build
from tests.prefix.rig import STORE, draw, reused, same, say, store


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama")


def test_a_thousand_salts_see_nothing(model: Any) -> None:
    text = draw(33, 1)
    say(model, text, {"salt": "tenant-a"}, max_new_tokens=1)
    hits = sum(reused(say(model, text, {"salt": f"tenant-{n}"}, max_new_tokens=1)) > 0 for n in range(1_000))
    assert hits == 0
    assert reused(say(model, text, {"salt": "tenant-a"}, max_new_tokens=1)) == 32
    assert reused(say(model, text, {"salt": "tenant-7"}, max_new_tokens=1)) == 32


def test_salt_and_model_are_not_glued_together(model: Any) -> None:
    text = draw(33, 1)
    other = build("llama")
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.5)
    say(model, text, {}, max_new_tokens=1)
    got = say(other, text, {})
    assert reused(got) == 0
    same(got, say(other, text))
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.1)  # the same model, with new weights
    got = say(other, text, {})
    assert reused(got) == 0
    same(got, say(other, text))


def test_equal_hashes_do_no_harm(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(radix_node, "page_key", lambda page: 0)
    for seed in range(6):
        for text in (draw(40, seed), draw(20, 0) + draw(20, seed)):
            same(say(model, text, {}), say(model, text))
    store().check_integrity()
    gc.collect()
    hf_ctxopt.drop_store(STORE)  # its keys are no hashes


def test_another_layout_needs_another_store(model: Any) -> None:
    say(model, draw(20, 1), {}, max_new_tokens=1)
    with pytest.raises(ConfigError, match="store"):
        say(model, draw(20, 1), {"page_size": 16}, max_new_tokens=1)
    with pytest.raises(ConfigError, match="store"):
        say(build("gemma3"), draw(20, 1), {}, max_new_tokens=1)
    store().clear()
    gc.collect()
    say(model, draw(20, 1), {"page_size": 16}, max_new_tokens=1)


@pytest.mark.parametrize(
    "config",
    [{"store": ""}, {"store": 3}, {"salt": 4}, {"priorities": [[0, 5, 101]]}, {"decode_priority": -1},
     {"steps_to_next": -1}, {"cpu_budget": 5}, {"cpu_budget": "much"}, {"offload_priority": 200}, {"budget": 3},
     {"sort": 1}],
    ids=str,
)  # fmt: skip
def test_bad_options_are_refused_before_anything(model: Any, config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        model.generate(torch.tensor([draw(20, 1)]), cache_implementation="ctx_prefix",
                       cache_config={"page_size": 8, **config}, max_new_tokens=2)  # fmt: skip
    assert STORE not in hf_ctxopt.stores()


def trace(model: Any, floods: int, ranked: bool) -> float:
    """Share of the agents' prompt tokens that were reused (systems.md, 6(e)4 and 8(e)2; a quarter of its lengths)."""
    rng = random.Random(0)

    def some(count: int) -> list[int]:
        return [rng.randrange(3, 90) for _ in range(count)]

    system = some(256)
    texts = [system + some(32) for _ in range(8)]
    config: dict[str, Any] = {"page_size": 4, "budget": 4096}
    high = {"priorities": [[0, None, 80]], "decode_priority": 80} if ranked else {}
    low = {"priorities": [[0, None, 10]], "decode_priority": 10} if ranked else {}
    prompt = hits = 0
    for _ in range(12):
        for agent in rng.sample(range(8), 8):
            ids = texts[agent] + some(16)
            out = say(model, ids, {**config, **high}, max_new_tokens=2, min_new_tokens=2)
            figures = cache_in(out).stats()["prefix"]
            prompt, hits = prompt + figures["prompt_tokens"], hits + figures["reused_tokens"]
            texts[agent] = ids + some(16)  # what an answer of 16 tokens would be: fed with the next turn
            for _ in range(floods):
                say(model, some(256), {**config, **low}, max_new_tokens=1)
    store().check_integrity()
    return hits / prompt


def test_priorities_keep_agents_through_floods() -> None:
    tiny = build("llama", num_hidden_layers=1)
    recent, ranked = trace(tiny, 1, ranked=False), trace(tiny, 1, ranked=True)
    assert ranked > recent + 0.12
    assert ranked > 0.88  # answers are not generated here, so their 16 tokens are computed once more than there


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("bits", [16, 4])
def test_pages_come_back_from_the_host(family: str, bits: int) -> None:
    model = build(family)
    texts = [draw(200, seed) for seed in range(5)]
    config = {"kv_bits": bits, "budget": 512, "cpu_budget": "16MiB"}
    wants = [say(model, text, config, max_new_tokens=6).sequences for text in texts]
    for text, tokens in zip(texts, wants, strict=True):
        got = say(model, text, config, max_new_tokens=6)
        assert bits < 16 or torch.equal(got.sequences, tokens)
        assert reused(got) >= 184
        del got
        store().check_integrity()
    stats = store().stats()
    assert stats["brought_back_pages"] > 40
    assert stats["evicted_pages"] == 0
    assert stats["host_bytes"] > 0


def test_the_host_keeps_what_is_worth_more(model: Any) -> None:
    texts = {worth: draw(96, worth) for worth in (90, 50, 20, 40)}
    page = 8 * 4 * 128  # tokens, layers and heads' float32 K and V
    for worth, text in texts.items():
        config = {"budget": 192, "cpu_budget": f"{12 * page}B", "priorities": [[0, None, worth]]}
        say(model, text, config, max_new_tokens=1)
    say(model, draw(180, 5), {**config, "priorities": [[0, None, 100]]}, max_new_tokens=1)
    stats = store().stats()
    assert stats["sent_away_pages"] > 0
    assert stats["evicted_pages"] > 0  # priority 20 is below offload_priority
    assert stats["host_bytes"] == 12 * page == 12 * store().arenas[0].page_bytes
    gc.collect()
    namespace = store().tree.roots()[0][0]
    held = {worth: len(store().tree.match(namespace, text).items) for worth, text in texts.items()}
    assert held[90] == 12
    assert held[20] == 0


def test_a_full_store_of_living_caches_refuses_and_harms_nothing(model: Any) -> None:
    text = draw(100, 1)
    out = say(model, text, {"budget": 128}, max_new_tokens=2)
    before = store().stats()
    with pytest.raises(CacheFullError):
        say(model, draw(120, 2), {"budget": 128}, max_new_tokens=2)
    gc.collect()
    store().check_integrity()
    assert store().stats()["tokens"] == before["tokens"]
    del out
    gc.collect()
    same(say(model, draw(100, 2), {"budget": 128}, max_new_tokens=2), say(model, draw(100, 2), max_new_tokens=2))


def test_an_interruption_leaves_the_store_whole(model: Any) -> None:
    text = draw(60, 1)

    class Stop(Exception):
        pass

    stopped = []

    for at in range(1, 5):
        calls = []

        def interrupt(module: Any, args: Any, calls: list[int] = calls, at: int = at) -> None:
            calls.append(1)
            if len(calls) == at:
                raise Stop

        hook = model.model.layers[1].register_forward_pre_hook(interrupt)
        try:
            say(model, [*text, at], {})
        except Stop:
            stopped.append(at)
        hook.remove()
        gc.collect()
        store().check_integrity()
        same(say(model, [*text, at], {}), say(model, [*text, at]))
    gc.collect()
    assert stopped == [1, 2, 3, 4]
    assert store().stats()["locked_pages"] == 0


def test_what_is_dropped_is_given_back(model: Any) -> None:
    for _ in range(20):
        say(model, draw(50, 3), {})
    gc.collect()
    kept = store()
    kept.check_integrity()
    assert kept.stats()["locked_pages"] == 0
    assert kept.arenas[0].used.open == kept.tree.pages
    kept.clear()
    kept.check_integrity()
    assert (kept.nbytes, kept.tree.pages, kept.arenas[0].used) == (0, 0, (0, 0))


def test_a_cache_without_a_store_shares_nothing_and_leaves_nothing(model: Any) -> None:
    before = dict(hf_ctxopt.stores())
    for _ in range(2):
        got = say(model, draw(40, 1), {"store": None})
        assert reused(got) == 0
    assert hf_ctxopt.stores() == before
    assert isinstance(cache_in(got).store, PrefixStore)


def test_accounts_that_are_wrong_are_found(model: Any) -> None:
    say(model, draw(40, 1), {})
    arena = store().arenas[0]
    arena.pool.share([0])
    with pytest.raises(IntegrityError, match="references"):
        store().check_integrity()
    arena.pool.rebuild(arena.holders()[0])
    store().check_integrity()
