"""cuDNN is off inside our own calls and as before outside of them."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from hf_ctxopt.kernels.sdpa import sdpa, without_cudnn

ON_GPU = SimpleNamespace(is_cuda=True)


@pytest.mark.parametrize("before", [True, False])
def test_the_switch_is_off_inside_and_restored(before: bool) -> None:
    original = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before)
    try:
        with without_cudnn(ON_GPU):
            assert not torch.backends.cuda.cudnn_sdp_enabled()
            with without_cudnn(ON_GPU):
                assert not torch.backends.cuda.cudnn_sdp_enabled()
            assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.cudnn_sdp_enabled() == before
        with pytest.raises(RuntimeError), without_cudnn(ON_GPU):
            raise RuntimeError
        assert torch.backends.cuda.cudnn_sdp_enabled() == before
    finally:
        torch.backends.cuda.enable_cudnn_sdp(original)


def test_threads_do_not_restore_each_others_switch() -> None:
    original = torch.backends.cuda.cudnn_sdp_enabled()

    def work() -> None:
        for _ in range(200):
            with without_cudnn(ON_GPU):
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.backends.cuda.cudnn_sdp_enabled() == original


def test_it_is_torchs_own() -> None:
    query, keys, values = torch.randn(3, 1, 4, 6, 8).unbind()
    want = functional.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=0.2)
    assert torch.equal(sdpa(query, keys, values, is_causal=True, scale=0.2), want)
