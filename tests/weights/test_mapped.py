"""Pages of a mapped file are given back, and nothing else is touched."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_ctxopt
from hf_ctxopt.weights import pack_op
from hf_ctxopt.weights.mapped import real_paths, release

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="madvise and /proc are Linux's")
MB = 1 << 20


def resident_file_pages() -> int:
    """Bytes of file pages that this process has mapped in."""
    return int(Path("/proc/self/statm").read_text().split()[2]) * mmap.PAGESIZE


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_file({"a": torch.randn(2, MB), "b": torch.randn(16, MB)}, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def test_pages_are_dropped_and_read_again(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.safetensors"  # as in the Hub's cache
    link.symlink_to(file)
    with safe_open(link, framework="pt") as opened:
        weight = opened.get_slice("b")[...]
        copy = weight.clone()
        before = resident_file_pages()
        dropped = release(weight, real_paths([link]))
        assert weight.numel() * 4 - 2 * mmap.PAGESIZE <= dropped <= weight.numel() * 4
        assert before - resident_file_pages() > 0.9 * dropped
        assert torch.equal(weight, copy)


def test_a_neighbour_that_was_written_to_keeps_its_values(file: Path) -> None:
    """Its bytes share a page with the end of the weight that is dropped."""
    with safe_open(file, framework="pt") as opened:
        first, second = opened.get_slice("a")[...], opened.get_slice("b")[...]
        second[0, 0] = 42.0
        first[-1, -1] = 43.0  # in the last page, which is not whole
        assert 0 < release(first, real_paths([file])) <= first.numel() * 4
        assert second[0, 0] == 42.0


def test_memory_that_is_no_view_of_the_file_is_left_alone(file: Path) -> None:
    own = torch.ones(4 * MB)
    assert release(own, real_paths([file])) == 0
    with safe_open(file, framework="pt") as opened:
        mapped = opened.get_slice("b")[...]
        assert release(mapped, real_paths([file.with_name("other.safetensors")])) == 0
        assert release(mapped, frozenset()) == 0
        assert release(mapped.T, real_paths([file])) == 0
        assert release(mapped.new_empty(0), real_paths([file])) == 0
    assert bool((own == 1).all())


def test_every_packed_weight_is_given_back_while_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(
        vocab_size=96, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    found: list[tuple[int, int]] = []

    def spy(weight: Tensor, files: frozenset[str]) -> int:
        found.append((weight.numel() * weight.element_size(), release(weight, files)))
        return found[-1][1]

    monkeypatch.setattr(pack_op, "release", spy)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=hf_ctxopt.GgufQuantConfig())
    assert len(found) == len(model.config.quantization_config.types)
    assert all(dropped >= size - 2 * mmap.PAGESIZE for size, dropped in found)
