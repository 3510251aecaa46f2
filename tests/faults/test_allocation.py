"""Memory runs out at each allocation of a whole `generate` in turn: the cache stays whole and can go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from hf_ctxopt.errors import InterruptedStepError
from hf_ctxopt.pages.storage import LayerStorage
from tests.families import VOCAB
from tests.faults.runs import BY_NAME, SCENES, Collector, Scene

ERRORS: dict[str, Callable[[], BaseException]] = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory"),
    "cpu": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory"),
}
ALLOCATING = ("__init__", "resize", "compacted", "compacted_sealed")


@contextmanager
def failing(number: int, error: Callable[[], BaseException]) -> Iterator[list[str]]:
    """The `number`-th time that storage is made, grown or moved fails; yields a list that then names it.

    It fails in the middle: a storage's keys are allocated, its values are not.
    """
    count, failed = [0], list[str]()
    new_zeros = torch.Tensor.new_zeros

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def allocating(storage: LayerStorage, *args: Any) -> Any:
            if name == "resize" and args == (storage.capacity, storage.sealed_capacity):
                return original(storage, *args)
            count[0] += 1
            if count[0] != number:
                return original(storage, *args)
            failed.append(name)
            made: list[int] = []

            def second_fails(*args: Any, **kwargs: Any) -> torch.Tensor:
                made.append(1)
                if len(made) == 2:
                    raise error()
                return new_zeros(*args, **kwargs)

            with mock.patch.object(torch.Tensor, "new_zeros", second_fails):
                return original(storage, *args)

        return allocating

    with ExitStack() as stack:
        for name in ALLOCATING:
            stack.enter_context(mock.patch.object(LayerStorage, name, wrap(name, getattr(LayerStorage, name))))
        yield failed


def attempt(scene: Scene, number: int, error: Callable[[], BaseException], expected: torch.Tensor) -> str | None:
    """One run with the `number`-th allocation failing, continued to the end; returns what failed, if anything."""
    cache, stream = scene.make_cache(), Collector(scene.ids)
    with failing(number, error) as failed:
        try:
            out = scene.run(cache, stream)
        except (torch.OutOfMemoryError, RuntimeError) as raised:
            assert type(raised) is type(error())
            assert failed
            out = scene.resume(cache, stream.ids)
        else:
            assert failed in ([], ["compacted"], ["compacted_sealed"])  # giving memory back may be put off
    assert out.tolist() == expected.tolist(), f"allocation {number}"
    cache.check_integrity()
    return failed[0] if failed else None


@pytest.mark.parametrize(
    ("scene", "error"),
    [*((scene, "cuda") for scene in SCENES), (BY_NAME["sink_lookup"], "cpu"), (BY_NAME["paged_fused"], "cpu")],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_every_allocation_may_fail(scene: Scene, error: str) -> None:
    with scene.routed():
        expected = scene.run(scene.make_cache())
        assert expected.shape[1] == scene.prompt + scene.new
        failures: list[str] = []
        while (name := attempt(scene, len(failures) + 1, ERRORS[error], expected)) is not None:
            failures.append(name)
    layers = scene.model.config.num_hidden_layers
    assert failures.count("__init__") == layers
    if scene.cache == "ctx_paged":  # the sliding layers of Gemma 3 have all they need from the start
        assert failures.count("resize") >= (layers if scene.family == "llama" else 1)
    if scene.name == "sink_lookup":
        assert "compacted" in failures


def test_a_reset_cache_serves_again_after_memory_ran_out() -> None:
    scene = BY_NAME["sink_fused_long_prompt"]
    with scene.routed():
        expected = scene.run(scene.make_cache())
        cache = scene.make_cache()
        with failing(2, ERRORS["cuda"]), pytest.raises(torch.OutOfMemoryError):
            scene.run(cache)
        cache.reset()
        assert cache.nbytes == 0
        assert scene.run(cache).tolist() == expected.tolist()
        assert cache.stats()["pages"]["used"] <= cache.stats()["pages"]["total"]


@pytest.mark.parametrize("error", ERRORS)
def test_a_long_second_turn_of_a_hybrid_model(error: str) -> None:
    """The sliding layers, which come first, have let go of old tokens when the full layer finds no memory."""
    scene = BY_NAME["gemma3_paged"]
    ids = torch.randint(2, VOCAB, (1, 50), generator=torch.Generator().manual_seed(3))
    with scene.routed(), torch.no_grad():
        expected = scene.model(ids, past_key_values=scene.make_cache()).logits
        for number in range(1, 20):
            cache = scene.make_cache()
            scene.model(ids[:, :12], past_key_values=cache)
            with failing(number, ERRORS[error]) as failed:
                try:
                    scene.model(ids[:, 12:], past_key_values=cache)
                except (torch.OutOfMemoryError, RuntimeError) as raised:
                    assert type(raised) is type(ERRORS[error]())
            if not failed:
                break
            try:
                cache.settle()
            except InterruptedStepError:
                cache.reset()
            cache.check_integrity()
            seen = cache.get_seq_length()
            assert seen in (0, 12)
            logits = scene.model(ids[:, seen:], past_key_values=cache).logits
            torch.testing.assert_close(logits, expected[:, seen:], atol=1e-4, rtol=0)
        assert number > 1
