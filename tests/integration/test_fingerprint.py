"""The fingerprint changes with whatever changes a model's states, and with nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_ctxopt.integration import fingerprint as module
from hf_ctxopt.integration.fingerprint import fingerprint, place_of
from tests.families import build

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def model() -> Any:
    return build("llama")


content = module._content


@pytest.mark.parametrize("words", [1, 3, 4096, 4096 * 2 + 5, 4096 * 300])
def test_any_single_bit_counts(words: int) -> None:
    """Signs among them: their bit is the last of a word, which even weights would lose."""
    generator = torch.Generator().manual_seed(words)
    flat = torch.randn(2 * words, generator=generator)
    bits = flat.view(torch.int64)
    before = content(flat)
    places = {0, words - 1, *torch.randint(0, words, (6,), generator=generator).tolist()}
    for at in places:
        for bit in range(0, 64, 1 if words < 5000 else 9):
            flip = -(2**63) if bit == 63 else 1 << bit
            bits[at] ^= flip
            assert content(flat) != before
            bits[at] ^= flip
    assert content(flat) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 33, 5000])
def test_any_single_element_counts_whatever_its_size(dtype: torch.dtype, count: int) -> None:
    tensor = (torch.rand(count) * 100).to(dtype)
    before = content(tensor)
    for at in {0, count // 2, count - 1}:
        changed = tensor.clone()
        changed[at] = changed[at] + 1
        assert content(changed) != before


def test_the_order_counts() -> None:
    values = torch.randn(4096 * 6)
    before = content(values)
    for one, other in ((0, 1), (0, 2), (3, 4096), (8192, 16384), (10, 24570)):
        moved = values.clone()
        moved[[one, other]] = moved[[other, one]]
        assert content(moved) != before
    mirrored = torch.tensor([1.0, 2.0, 1.0, -2.0] * 8)
    assert content(mirrored) != content(mirrored.view(-1, 2).flip(0).flatten())
    assert content(values.view(12, -1).t()) == content(values.view(12, -1).t().contiguous())


def test_any_changed_weight_of_a_model(model: Any) -> None:
    seen = {fingerprint(model)}
    weights = dict(model.named_parameters())
    for number, weight in enumerate(weights.values(), 2):
        with torch.no_grad():
            weight.view(-1)[-1] *= -1
        seen.add(fingerprint(model))
        assert len(seen) == number


def test_weights_that_change_places_count(model: Any) -> None:
    before = fingerprint(model)
    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    first.k_proj, second.k_proj = second.k_proj, first.k_proj
    swapped = fingerprint(model)
    assert swapped != before
    first.k_proj, second.k_proj = second.k_proj, first.k_proj
    assert fingerprint(model) == before


def test_equal_models_are_equal_and_others_are_not(model: Any) -> None:
    assert fingerprint(build("llama")) == fingerprint(model)
    found = {
        fingerprint(build("llama")),
        fingerprint(build("llama").to(torch.bfloat16)),
        fingerprint(build("mistral")),
    }
    assert len(found) == 3
    assert place_of(model) == ("torch.float32", ("cpu",))
    assert place_of(build("llama").half())[0] == "torch.float16"


def test_rotary_settings_count_and_names_do_not(model: Any) -> None:
    def like(**settings: Any) -> str:
        twin = build("llama")
        for name, value in settings.items():
            setattr(twin.config, name, value)
        return fingerprint(twin)

    before = fingerprint(model)
    rotary = dict(model.config.rope_parameters)
    assert like(_name_or_path="elsewhere", use_cache=False) == before
    assert like(rope_parameters={**rotary, "rope_theta": 5e5}) != before
    assert like(rope_parameters={**rotary, "rope_type": "linear", "factor": 2.0}) != before
    assert like(sliding_window=7) != before


def test_kept_buffers_count() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("scale", torch.ones(3))

    model = Scaled()
    before = fingerprint(model)
    with torch.no_grad():
        model.scale[1] = 2
    assert fingerprint(model) != before


def test_it_is_worked_out_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(tensor: torch.Tensor) -> bytes:
        calls.append(1)
        return content(tensor)

    monkeypatch.setattr(module, "_content", counted)
    before = fingerprint(model)
    worked = len(calls)
    assert worked == len(list(model.parameters()))
    for _ in range(5):
        model(torch.tensor([[1, 2, 3]]))
        assert fingerprint(model) == before
    assert len(calls) == worked
    with torch.no_grad():
        model.lm_head.weight.add_(0)
    assert fingerprint(model) == before  # written, but with what was there
    assert len(calls) == 2 * worked
    model.load_state_dict(build("llama").state_dict())
    assert fingerprint(model) == before
    assert len(calls) == 3 * worked


def test_it_is_equal_in_another_process(model: Any) -> None:
    code = (
        "from tests.families import build; from hf_ctxopt.integration.fingerprint import fingerprint; "
        "print(fingerprint(build('llama')))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "17"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env, cwd=ROOT)
    assert out.stdout.split()[-1] == fingerprint(model)


def test_weights_that_cannot_be_read_belong_to_this_object_only() -> None:
    with torch.device("meta"):
        one, other = build("llama"), build("llama")
    assert fingerprint(one) == fingerprint(one)
    assert fingerprint(one) != fingerprint(other)


def test_adapters_count(model: Any) -> None:
    peft = pytest.importorskip("peft")
    plain = fingerprint(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted.eval()
    inner = adapted.base_model.model
    on = fingerprint(inner)
    with adapted.disable_adapter():
        off = fingerprint(inner)
    assert fingerprint(inner) == on
    adapted.merge_adapter()
    merged = fingerprint(inner)
    adapted.unmerge_adapter()
    adapted.add_adapter("other", config)
    adapted.set_adapter("other")
    other = fingerprint(inner)
    assert len({plain, on, off, merged, other}) == 5
    inner.model.layers[0].self_attn.q_proj.scaling["other"] *= 2
    assert fingerprint(inner) != other
