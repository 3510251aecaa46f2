"""Exceptions from the user's own code and Ctrl-C in the middle of a forward pass: the cache goes on afterwards."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from transformers import StoppingCriteria

from hf_ctxopt.errors import ConfigError, InterruptedStepError
from tests.families import VOCAB, build
from tests.faults.runs import BY_NAME, SCENES, Collector, Scene, StreamBroken, stopped_in

EACH_SCENE = pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
ONE_CHUNK = [scene for scene in SCENES if scene.prompt <= 10]
LONG = BY_NAME["sink_fused_long_prompt"]


class CriterionBroken(ValueError):
    """What the failing criterion raises."""


class Failing(StoppingCriteria):
    """Stops nothing; raises at its `call`-th call."""

    def __init__(self, call: int) -> None:
        self.call, self.calls = call, 0
        self.ids: torch.Tensor | None = None  # the text when it raised

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.call:
            self.ids = input_ids.clone()
            raise CriterionBroken(f"call {self.calls}")
        return torch.zeros(len(input_ids), dtype=torch.bool)


@EACH_SCENE
@pytest.mark.parametrize("call", [1, 2, 6])
def test_a_streamer_that_raises(scene: Scene, call: int) -> None:
    with scene.routed():
        expected = scene.run(scene.make_cache())
        cache, stream = scene.make_cache(), Collector(scene.ids, fail_at=call)
        with pytest.raises(StreamBroken, match=f"call {call}"):
            scene.run(cache, stream)
        cache.check_integrity()
        assert scene.resume(cache, stream.ids).tolist() == expected.tolist()


@EACH_SCENE
@pytest.mark.parametrize("call", [1, 7])
def test_a_stopping_criterion_that_raises(scene: Scene, call: int) -> None:
    with scene.routed():
        expected = scene.run(scene.make_cache())
        cache, criterion = scene.make_cache(), Failing(call)
        with pytest.raises(CriterionBroken, match=f"call {call}"):
            scene.extend(cache, scene.ids, scene.new, stopping_criteria=[criterion])
        cache.check_integrity()
        assert criterion.ids is not None
        assert criterion.ids.tolist() == expected[:, : scene.prompt + call].tolist()
        assert scene.resume(cache, criterion.ids).tolist() == expected.tolist()


@pytest.mark.parametrize("scene", ONE_CHUNK, ids=lambda scene: scene.name)
@pytest.mark.parametrize("call", [1, 2, 8])
def test_ctrl_c_between_layers_is_taken_back(scene: Scene, call: int) -> None:
    """The prompt fits the window, so every step of the run can be undone, the first one included."""
    with scene.routed():
        expected = scene.run(scene.make_cache())
        for index, layer in enumerate(scene.model.get_decoder().layers):
            cache, stream = scene.make_cache(), Collector(scene.ids)
            with stopped_in(layer, call, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
                scene.run(cache, stream)
            assert scene.resume(cache, stream.ids).tolist() == expected.tolist(), f"layer {index}"


@pytest.mark.parametrize("call", [5, 6, 12])
def test_ctrl_c_while_decoding_after_a_long_prompt(call: int) -> None:
    """Calls 1 to 4 are the chunks of the prompt; decode steps after them are always recoverable."""
    with LONG.routed():
        expected = LONG.run(LONG.make_cache())
        for layer in LONG.model.get_decoder().layers:
            cache, stream = LONG.make_cache(), Collector(LONG.ids)
            with stopped_in(layer, call, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
                LONG.run(cache, stream)
            assert stream.ids.shape[1] == LONG.prompt + call - 4
            assert LONG.resume(cache, stream.ids).tolist() == expected.tolist()


def test_generate_settles_by_itself() -> None:
    scene = BY_NAME["sink_dense"]
    with scene.routed():
        expected = scene.run(scene.make_cache())
        cache, stream = scene.make_cache(), Collector(scene.ids)
        with stopped_in(scene.model.get_decoder().layers[0], 4, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
            scene.run(cache, stream)
        assert scene.extend(cache, stream.ids, scene.new).tolist() == expected.tolist()


@pytest.mark.parametrize("route", ["dense", "fused"])
def test_a_manual_loop_is_told_to_settle(route: str) -> None:
    scene = Scene(name="", route=route, cache="ctx_sink", options={"sinks": 2, "window": 12, "page_size": 4})
    ids = torch.randint(2, VOCAB, (1, 30), generator=torch.Generator().manual_seed(3))
    with scene.routed(), torch.no_grad():
        model, cache, other = scene.model, scene.make_cache(), scene.make_cache()
        for start in range(20):
            model(ids[:, start : start + 1], past_key_values=cache)
            model(ids[:, start : start + 1], past_key_values=other)
        with stopped_in(model.get_decoder().layers[0], 1, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
            model(ids[:, 20:21], past_key_values=cache)
        with pytest.raises(InterruptedStepError, match=r"cache\.settle\(\)"):
            model(ids[:, 20:21], past_key_values=cache)
        cache.settle()
        for start in range(20, 30):
            expected = model(ids[:, start : start + 1], past_key_values=other).logits
            logits = model(ids[:, start : start + 1], past_key_values=cache).logits
            torch.testing.assert_close(logits, expected, atol=0, rtol=0)


@pytest.mark.parametrize("cache_name", ["ctx_paged", "ctx_sink"])
def test_crop_does_not_stand_in_for_settle(cache_name: str) -> None:
    """Layers behind the interrupt lack the step's copies of shared pages; cropping to the old length hid that."""
    import hf_ctxopt

    model = build("llama")
    ids = torch.randint(2, VOCAB, (1, 13), generator=torch.Generator().manual_seed(3))
    last = torch.tensor([[5], [9]])
    cache = hf_ctxopt.make_cache(model, cache_name, page_size=8)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        layer = model.get_decoder().layers[0]
        with stopped_in(layer, 1, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
            model(last, past_key_values=cache)
        with pytest.raises(InterruptedStepError, match=r"cache\.settle\(\)"):
            cache.crop(-1)
        cache.settle()
        cache.crop(-1)
        text = torch.cat([ids[:, :12].repeat(2, 1), last], dim=1)
        logits, expected = model(last, past_key_values=cache).logits[:, -1], model(text).logits[:, -1]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("call", [2, 3])
def test_an_interrupted_chunk_longer_than_the_window_needs_a_reset(call: int) -> None:
    with LONG.routed():
        expected = LONG.run(LONG.make_cache())
        cache = LONG.make_cache()
        with (
            stopped_in(LONG.model.get_decoder().layers[0], call, KeyboardInterrupt()),
            pytest.raises(KeyboardInterrupt),
        ):
            LONG.run(cache)
        for _ in range(2):  # asking again changes nothing
            with pytest.raises(InterruptedStepError, match=r"cache\.reset\(\)"):
                cache.settle()
        with pytest.raises(InterruptedStepError):
            LONG.run(cache)
        cache.check_integrity()
        cache.reset()
        assert (cache.nbytes, cache.get_seq_length()) == (0, 0)
        assert LONG.run(cache).tolist() == expected.tolist()


@pytest.mark.parametrize("route", ["dense", "fused"])
def test_a_first_chunk_longer_than_the_window_is_simply_forgotten(route: str) -> None:
    scene = Scene(name="", route=route, cache="ctx_sink", options={"sinks": 2, "window": 12, "page_size": 4})
    ids = torch.randint(2, VOCAB, (1, 50), generator=torch.Generator().manual_seed(3))
    with scene.routed(), torch.no_grad():
        expected = scene.model(ids, past_key_values=scene.make_cache()).logits
        cache = scene.make_cache()
        layer = scene.model.get_decoder().layers[0]
        with stopped_in(layer, 1, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
            scene.model(ids, past_key_values=cache)
        cache.settle()
        assert (cache.get_seq_length(), cache.stats()["tokens_held"]) == (0, 0)
        logits = scene.model(ids, past_key_values=cache).logits
        torch.testing.assert_close(logits, expected, atol=0, rtol=0)


def hybrid() -> Any:
    """Gemma 3 whose only sliding layer comes before its only full one: one group is done when the other starts."""
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    return build("gemma3", num_hidden_layers=3, layer_types=kinds)


@pytest.mark.parametrize("cache_name", ["ctx_paged", "ctx_sink"])
@pytest.mark.parametrize(("first", "queries"), [(0, 40), (0, 5), (20, 1), (8, 2)])
def test_a_hybrid_model_stopped_between_its_groups(cache_name: str, first: int, queries: int) -> None:
    import hf_ctxopt

    model, options = hybrid(), {"page_size": 4, **({"window": 64} if cache_name == "ctx_sink" else {})}
    ids = torch.randint(2, VOCAB, (1, 60), generator=torch.Generator().manual_seed(3))
    cache, other = (hf_ctxopt.make_cache(model, cache_name, **options) for _ in range(2))
    with torch.no_grad():
        for kept in (cache, other):
            if first:
                model(ids[:, :first], past_key_values=kept)
        layer = model.get_decoder().layers[1]
        with stopped_in(layer, 1, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
            model(ids[:, first : first + queries], past_key_values=cache)
        cache.settle()
        cache.check_integrity()
        assert [layer.get_seq_length() for layer in cache.layers] == [first] * 3
        for start, stop in ((first, first + queries), (first + queries, first + queries + 1)):
            expected = model(ids[:, start:stop], past_key_values=other).logits
            logits = model(ids[:, start:stop], past_key_values=cache).logits
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("cache_name", ["ctx_paged", "ctx_sink"])
def test_a_hybrid_model_stopped_in_a_long_chunk_needs_a_reset(cache_name: str) -> None:
    import hf_ctxopt

    model, options = hybrid(), {"page_size": 4, **({"window": 64} if cache_name == "ctx_sink" else {})}
    ids = torch.randint(2, VOCAB, (1, 60), generator=torch.Generator().manual_seed(3))
    cache = hf_ctxopt.make_cache(model, cache_name, **options)
    with torch.no_grad():
        expected = model(ids, past_key_values=hf_ctxopt.make_cache(model, cache_name, **options)).logits
        model(ids[:, :12], past_key_values=cache)
        layer = model.get_decoder().layers[1]
        with stopped_in(layer, 1, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
            model(ids[:, 12:], past_key_values=cache)
        for _ in range(2):
            with pytest.raises(InterruptedStepError, match=r"cache\.reset\(\)"):
                cache.settle()
        cache.reset()
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, expected, atol=1e-5, rtol=0)


def test_nothing_stays_on_the_model_after_an_interrupt() -> None:
    model = build("llama")
    decoder = model.get_decoder()
    ids = LONG.ids
    with stopped_in(decoder.layers[0], 6, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        model.generate(ids, max_new_tokens=9, do_sample=False, cache_implementation="ctx_sink",
                       cache_config={"sinks": 2, "window": 12})  # fmt: skip
    gc.collect()
    assert len(decoder._forward_pre_hooks) == 0
    out = model.generate(ids, max_new_tokens=9, do_sample=False)
    assert out.tolist() == build("llama").generate(ids, max_new_tokens=9, do_sample=False).tolist()


def test_taking_back_what_a_finished_long_chunk_let_go_is_refused_and_harmless() -> None:
    with LONG.routed(), torch.no_grad():
        cache = LONG.make_cache()
        LONG.model(LONG.ids, past_key_values=cache)
        was = cache.stats()
        with pytest.raises(ConfigError, match="tokens_to_remove=-1"):
            cache.crop(-1)
        assert cache.stats() == was
