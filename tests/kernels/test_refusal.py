"""Which pages the kernels refuse to read, on which cards."""

from __future__ import annotations

import pytest
import torch

from hf_ctxopt.kernels import paged
from hf_ctxopt.kernels.paged import refusal

CONSUMER, TESLA_T4 = 101376, 65536  # bytes of shared memory of one program


def pages(size: int, dim: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(2, 3, size, dim, dtype=dtype)


@pytest.mark.parametrize(
    ("room", "size", "dim", "dtype", "read"),
    [
        (CONSUMER, 128, 128, torch.bfloat16, True),
        (CONSUMER, 128, 192, torch.bfloat16, False),  # compiled: 143,360 bytes
        (CONSUMER, 64, 256, torch.bfloat16, True),
        (CONSUMER, 64, 256, torch.float32, False),
        (TESLA_T4, 64, 128, torch.float16, True),
        (TESLA_T4, 128, 128, torch.float16, False),
        (None, 128, 256, torch.float32, True),
    ],
)
def test_shared_memory(
    room: int | None, size: int, dim: int, dtype: torch.dtype, read: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged, "shared_room", lambda device: room)
    reason = refusal(pages(size, dim, dtype), None)
    assert (reason is None) == read
    if reason is not None:
        assert str(size) in reason
        assert str(dim) in reason


def test_other_reasons() -> None:
    assert "page_size 24" in str(refusal(pages(24, 64), None))
    assert "float64" in str(refusal(pages(16, 64, torch.float64), None))
    assert "16 bits" in str(refusal(pages(16, 64), (8, 16)))
    assert refusal(pages(16, 64), (8, 2)) is None
