"""Storage hands full pages to the device's sealing kernel where there is one, and gets the codec's own codes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from hf_ctxopt.kernels.dispatch import _triton_seal
from hf_ctxopt.pages import storage as module
from hf_ctxopt.pages.codec import Codec
from hf_ctxopt.pages.pool import SEALED
from hf_ctxopt.pages.sealed import Codecs
from hf_ctxopt.pages.storage import LayerStorage


def sealed(bits: tuple[int, int]) -> LayerStorage:
    """Two of four open pages sealed into the third and the first of five sealed ones."""
    draw = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(1, 2, 3, 32, generator=draw) for _ in "kv")
    codecs = Codecs(Codec(bits[0], over_tokens=True), Codec(bits[1], over_tokens=False))
    storage = LayerStorage(keys, values, page_size=16, capacity=4, codecs=codecs, sealed=5)
    storage.keys.normal_(generator=draw)
    storage.values.normal_(generator=draw)
    storage.seal([(3, SEALED + 2), (1, SEALED)])
    return storage


@pytest.mark.parametrize("bits", [(8, 4), (2, 8), (16, 4)])
def test_codes_are_the_codecs(monkeypatch: pytest.MonkeyPatch, bits: tuple[int, int]) -> None:
    want, calls = sealed(bits), []

    def kernel(pages: object, pairs: torch.Tensor, margins: tuple[float, float]) -> None:
        calls.append(pairs.tolist())
        _triton_seal(pages, pairs, margins)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "seal_kernel", lambda device: kernel)
    got = sealed(bits)
    assert calls == ([] if 16 in bits else [[[3, 2], [1, 0]]])
    for first, second in zip(want.tensors, got.tensors, strict=True):
        assert torch.equal(first, second)
