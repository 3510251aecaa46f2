"""Budgets: what is accepted, and how many pages each of several groups may have."""

from __future__ import annotations

from typing import Any

import pytest

from hf_ctxopt.errors import ConfigError
from hf_ctxopt.pages.budget import Budget, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1B", 1),
        ("800MB", 800 * 10**6),
        ("2GiB", 2 * 2**30),
        ("1.5 GB", 1_500_000_000),
        ("512mib", 512 * 2**20),
        (" 64 KiB ", 64 * 1024),
        ("0.5KiB", 512),
        ("3kb", 3000),
    ],
)
def test_sizes_in_bytes(text: str, size: int) -> None:
    assert parse_bytes(text) == size
    assert Budget(text).nbytes == size
    assert Budget(text).tokens is None


@pytest.mark.parametrize("text", ["", "2", "GiB", "0B", "0.4B", "-1GB", "1,5GB", "2 TiB", "2GiBB", "1e9B", "inf B"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Budget(text)
    assert (caught.value.field, caught.value.value) == ("budget", text)
    assert "2GiB" in caught.value.allowed


@pytest.mark.parametrize("value", [0, -1, True, False, 1.5, [4096], b"2GiB"])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Budget(value)
    assert caught.value.field == "budget"


def test_without_a_limit_there_is_none() -> None:
    assert Budget().most_pages(32, 100, 0) is None


@pytest.mark.parametrize(("tokens", "pages"), [(1, 0), (31, 0), (32, 1), (100, 3)])
def test_a_token_budget_counts_whole_pages_of_each_group(tokens: int, pages: int) -> None:
    assert Budget(tokens).most_pages(32, 10, others=5000) == pages


@pytest.mark.parametrize(("others", "pages"), [(0, 10), (99, 9), (210, 7), (2000, 0)])
def test_a_byte_budget_is_shared_with_the_other_groups(others: int, pages: int) -> None:
    assert Budget("1000B").most_pages(32, 100, others) == pages
