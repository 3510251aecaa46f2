"""Which parts of a model are taken over while a step is captured, and that they compute what they did."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_ctxopt
from hf_ctxopt.integration import fused as parts
from hf_ctxopt.integration.compat import cache_in
from hf_ctxopt.integration.fused import ROTARY, FusedParts
from hf_ctxopt.kernels import fused
from hf_ctxopt.kernels.dispatch import FusedKernels
from hf_ctxopt.kernels.fused import NormForm
from tests.device import pretend_gpu
from tests.families import FAMILIES, VOCAB, model_for

IDS = torch.randint(2, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """References in the kernels' place, counted."""
    seen: Counter[str] = Counter()

    def norm(*given: Any) -> Tensor:
        seen["norm"] += 1
        return fused.rms_norm(*given)

    def rotary(*given: Any) -> tuple[Tensor, Tensor]:
        seen["rotary"] += 1
        return fused.rotary(*given)

    monkeypatch.setattr(parts, "fused_kernels", lambda device: FusedKernels(norm, rotary))
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name, row in FAMILIES.items() if not row.encoder_decoder])
def test_same_logits_and_nothing_left_behind(name: str, dtype: torch.dtype, calls: Counter[str]) -> None:
    model = model_for(name, "fused", dtype)
    with torch.no_grad():
        want = model(IDS).logits
        with FusedParts().inside(model):
            got = model(IDS).logits
        before = Counter(calls)
        model(IDS)
    assert torch.equal(got, want)
    assert calls == before
    assert not any("forward" in vars(part) for part in model.modules())


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2"])
def test_every_norm_is_recognized(name: str, calls: Counter[str]) -> None:
    model = model_for(name, "fused", torch.bfloat16)
    norms = [part for part in model.modules() if type(part).__name__.endswith("RMSNorm")]
    with torch.no_grad(), FusedParts().inside(model):
        assert all("forward" in vars(part) for part in norms)
        model(IDS)
    assert calls["norm"] == len(norms) > 0
    assert calls["rotary"] == model.config.num_hidden_layers or name in ("phi3", "olmo2")


class Odd(nn.Module):
    """A norm in everything but its formula."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.eps = kind, 1e-6
        self.weight = nn.Parameter(torch.ones(8))
        if kind == "bias":
            self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        size = x.pow(2).mean(-1, keepdim=True)
        if self.kind == "asserts":
            assert x.dim() == 2
        if self.kind == "eps outside":
            return self.weight * (x / (size.sqrt() + self.eps))
        if self.kind == "centred":
            x = x - x.mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(size + self.eps))


@pytest.mark.parametrize("kind", ["eps outside", "centred", "bias", "asserts"])
def test_another_formula_stays(kind: str, calls: Counter[str]) -> None:
    part = nn.Sequential(Odd(kind))
    with torch.no_grad(), FusedParts().inside(part):
        part(torch.randn(2, 8))
    assert calls["norm"] == 0


def test_two_of_one_class_are_told_apart(calls: Counter[str]) -> None:
    part = nn.Sequential(Odd("plain"), Odd("centred"))
    x = torch.randn(2, 8)
    want = part(x)
    with torch.no_grad(), FusedParts().inside(part):
        assert torch.equal(part(x), want)


def test_other_calls_take_the_models_own_way(calls: Counter[str]) -> None:
    """A gate, a keyword, another number of channels, another dtype."""

    class Gated(Odd):
        def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
            plain = super().forward(x)
            return plain if gate is None else plain * gate

    part = Gated("plain")
    x, gate = torch.randn(2, 8), torch.randn(2, 8)
    with torch.no_grad(), FusedParts().inside(nn.Sequential(part)):
        assert torch.equal(part(x, gate), Gated.forward(part, x, gate))
        assert torch.equal(part(x=x), Gated.forward(part, x))
        assert torch.equal(part(x[:, :1]), Gated.forward(part, x[:, :1]))
        before = calls["norm"]
        part(x.double())
    assert calls["norm"] == before
    one = nn.Sequential(Odd("plain"))
    one[0].weight = nn.Parameter(torch.ones(1))
    with torch.no_grad(), FusedParts().inside(one):
        assert torch.equal(one(x), Odd.forward(one[0], x))


def test_models_of_one_file_may_overlap(calls: Counter[str]) -> None:
    first, second = model_for("llama", "fused"), model_for("llama", "other")
    file = sys.modules[type(first).__module__]
    own = getattr(file, ROTARY)
    one, two = FusedParts().inside(first), FusedParts().inside(second)
    with torch.no_grad():
        one.__enter__()
        two.__enter__()
        one.__exit__(None, None, None)
        second(IDS)
        assert calls == {"norm": 5, "rotary": 2}
        two.__exit__(None, None, None)
    assert getattr(file, ROTARY) is own


def test_the_plain_formula_is_taken(calls: Counter[str]) -> None:
    part = nn.Sequential(Odd("plain"))
    x = torch.randn(2, 8)
    with torch.no_grad(), FusedParts().inside(part):
        assert torch.equal(part(x), part[0].forward(x))
    assert calls["norm"] == 2


def test_somebody_elses_forward_stays(calls: Counter[str]) -> None:
    model = model_for("llama", "fused")
    own = model.model.norm.forward = lambda x: 0 * x
    try:
        with torch.no_grad(), FusedParts().inside(model):
            model(IDS)
            assert model.model.norm.forward is own
        assert calls["norm"] == 4
    finally:
        del model.model.norm.forward


def test_an_error_inside_restores_everything(calls: Counter[str]) -> None:
    model = model_for("llama", "fused")
    file = sys.modules[type(model).__module__]
    before = getattr(file, ROTARY)

    def broken() -> None:
        with FusedParts().inside(model):
            assert getattr(file, ROTARY) is not before
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert getattr(file, ROTARY) is before
    assert not any("forward" in vars(part) for part in model.modules())


def test_gradients_take_the_models_own_way(calls: Counter[str]) -> None:
    model = model_for("llama", "fused")
    with FusedParts().inside(model):
        model(IDS).logits.sum().backward()
    assert not calls
    model.zero_grad()


def test_another_interleaving_is_not_taken(calls: Counter[str]) -> None:
    def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        def turn(x: Tensor) -> Tensor:
            pair = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
            return x * cos[:, None] + pair * sin[:, None]

        return turn(q), turn(k)

    assert not parts._is_plain_rotary(interleaved, torch.device("cpu"), torch.float32)
    assert parts._is_plain_rotary(fused.rotary, torch.device("cpu"), torch.bfloat16)


def test_graphs_hold_the_kernels(calls: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-up and capture take them; replays repeat them."""
    model = model_for("llama", "fused")
    call = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with hf_ctxopt.patched(model, cache="ctx_paged", page_size=8, graph=False):
        want = model.generate(IDS, **call)
    assert not calls
    with pretend_gpu(monkeypatch), hf_ctxopt.patched(model, cache="ctx_paged", page_size=8):
        got = model.generate(IDS, **call)
    taken = sum(cache_in(got).stats()["graph"][key] for key in ("warm-ups", "captures"))
    assert calls["norm"] >= 5 * taken > 0
    assert calls["norm"] / 5 == calls["rotary"] / 2
    assert torch.equal(got.sequences, want.sequences)
    for mine, theirs in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_forms_differ() -> None:
    """Each form is told from the others in half precision."""
    x, weight = torch.randn(4, 64).bfloat16(), torch.randn(64).bfloat16()
    results = [fused.rms_norm(x, weight, 1e-6, form) for form in NormForm]
    assert not any(torch.equal(results[a], results[b]) for a, b in [(0, 1), (0, 2), (1, 2)])
