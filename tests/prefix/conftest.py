"""Every test begins and ends without a store."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

import hf_ctxopt


@pytest.fixture(autouse=True)
def _no_stores() -> Iterator[None]:
    for name in hf_ctxopt.stores():
        hf_ctxopt.drop_store(name)
    yield
    gc.collect()
    for name, store in hf_ctxopt.stores().items():
        store.check_integrity()
        hf_ctxopt.drop_store(name)
