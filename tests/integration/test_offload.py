"""Embedding and head on the host. Without a GPU, transfers are only recorded; with one, the tests below use it."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import dispatch_model
from torch import nn

import hf_ctxopt
from hf_ctxopt.integration import offload
from hf_ctxopt.integration.record import record_of
from tests.families import VOCAB, build
from tests.integration.test_patch import state

IDS = torch.randint(2, VOCAB, (2, 12), generator=torch.Generator().manual_seed(3))
CALL: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
AWAY = torch.device("meta")  # stands for the GPU

Log = list[tuple[str, torch.device]]


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> Log:
    """Pretends that models compute on a GPU: what would travel is recorded and stays."""
    log: Log = []

    def send(states: torch.Tensor, device: torch.device) -> torch.Tensor:
        log.append(("states" if states.is_floating_point() else "ids", device))
        return states

    monkeypatch.setattr(offload, "compute_device", lambda model: AWAY)
    monkeypatch.setattr(offload, "_send", send)
    monkeypatch.setattr(offload, "_move", lambda module, device: log.append((type(module).__name__, device)))
    return log


def test_ids_go_to_the_host_and_states_come_back(moves: Log) -> None:
    model = build("llama")
    want = model.generate(IDS, **CALL)
    hf_ctxopt.patch_model(model, on_host=["embedding"])
    assert moves == [("Embedding", offload.HOST)]
    moves.clear()
    assert torch.equal(model.generate(IDS, **CALL), want)
    assert moves == [("ids", offload.HOST), ("states", AWAY)] * 5
    moves.clear()
    hf_ctxopt.unpatch_model(model)
    assert moves == [("Embedding", AWAY)]
    model.generate(IDS, **CALL)
    assert len(moves) == 1


def test_the_head_too(moves: Log) -> None:
    model = build("llama")
    want = model(IDS).logits
    with hf_ctxopt.patched(model, on_host=("head", "embedding")):
        moves.clear()
        assert torch.equal(model(IDS).logits, want)
        assert moves == [("ids", offload.HOST), ("states", AWAY), ("states", offload.HOST), ("states", AWAY)]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_undone_without_a_trace(family: str, moves: Log) -> None:
    model = build(family)
    hf_ctxopt.register()
    before, keys = state(model), list(model.state_dict())
    hf_ctxopt.patch_model(model, on_host=["embedding", "head"])
    assert state(model) != before
    assert next(iter(model.parameters())) is not model.get_input_embeddings().weight  # `model.device` is the GPU
    hf_ctxopt.unpatch_model(model)
    assert state(model) == before
    assert list(model.state_dict()) == keys


def test_a_tied_matrix_moves_whole_or_not_at_all(moves: Log, caplog: pytest.LogCaptureFixture) -> None:
    model = build("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for alone in ("embedding", "head"):
        caplog.clear()
        with caplog.at_level(logging.WARNING), hf_ctxopt.patched(model, on_host=[alone]):
            assert not moves
            assert not record_of(model).moved
        assert "one matrix" in caplog.text
    with hf_ctxopt.patched(model, on_host=["embedding", "head"]):
        assert [name for name, _ in moves] == ["Embedding", "Linear"]
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_copies_and_files(moves: Log, tmp_path: Path) -> None:
    model = build("llama")
    want = model.generate(IDS, **CALL)
    hf_ctxopt.patch_model(model, on_host=["embedding"])
    twin = copy.deepcopy(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert not loaded.model.embed_tokens._forward_hooks
    assert torch.equal(loaded.generate(IDS, **CALL), want)
    hf_ctxopt.unpatch_model(model)
    moves.clear()
    assert torch.equal(twin.generate(IDS, **CALL), want)
    assert moves
    hf_ctxopt.unpatch_model(twin)
    assert not twin.model.embed_tokens._forward_hooks
    assert not twin.model.embed_tokens._forward_pre_hooks


def test_hooks_of_others_stay(moves: Log) -> None:
    model = build("llama")
    calls: list[int] = []
    handle = model.model.embed_tokens.register_forward_hook(lambda *_: calls.append(1))
    with hf_ctxopt.patched(model, on_host=["embedding"]):
        model(IDS)
    model(IDS)
    assert len(calls) == 2
    handle.remove()


def test_an_earlier_patch_comes_back_with_its_parts(moves: Log) -> None:
    model = hf_ctxopt.patch_model(build("llama"), on_host=["embedding"])
    with hf_ctxopt.patched(model, "ctx_sink"):
        assert not model.model.embed_tokens._forward_hooks
    assert len(model.model.embed_tokens._forward_hooks) == 1


def test_nothing_to_move_on_a_cpu() -> None:
    model = build("llama")
    with hf_ctxopt.patched(model, on_host=["embedding", "head"]):
        assert not record_of(model).moved
        assert not model.model.embed_tokens._forward_hooks


@pytest.mark.parametrize("bad", ["embedding", ["embeddings"], 3, [1], None, {"k": 1}])
def test_bad_values(bad: Any) -> None:
    model = build("llama")
    before = state(model)
    with pytest.raises(hf_ctxopt.ConfigError, match="on_host"):
        hf_ctxopt.patch_model(model, on_host=bad)
    assert state(model) == before


def test_models_that_are_spread_or_quantized_are_refused(moves: Log) -> None:
    spread = dispatch_model(build("llama"), {"": "cpu"}, force_hooks=True)
    with pytest.raises(hf_ctxopt.ConfigError, match="device_map"):
        hf_ctxopt.patch_model(spread, on_host=["embedding"])
    quantized = build("llama")
    quantized.lm_head.weight = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(hf_ctxopt.UnsupportedModelError, match="head"):
        hf_ctxopt.patch_model(quantized, on_host=["head"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU to leave")
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("parts", [["embedding"], ["embedding", "head"]], ids=str)
def test_on_a_gpu(family: str, parts: list[str]) -> None:
    model = build(family).cuda()
    want = model.generate(IDS.cuda(), **CALL)
    before = torch.cuda.memory_allocated()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with hf_ctxopt.patched(model, on_host=parts):
        moved = not tied or len(parts) == 2
        assert (model.get_input_embeddings().weight.device.type == "cpu") == moved
        assert (torch.cuda.memory_allocated() < before) == moved
        assert model.device.type == "cuda"
        assert torch.equal(model.generate(IDS.cuda(), **CALL), want)
    assert {part.device.type for part in model.parameters()} == {"cuda"}
