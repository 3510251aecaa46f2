"""Priorities of token ranges, as TensorRT-LLM's own tests have them (`evictionPolicyTest.cpp`)."""

from __future__ import annotations

from typing import Any

import pytest

from hf_ctxopt.errors import ConfigError
from hf_ctxopt.policies.priority import Retention, TokenRange

TABLE = [
    # ranges, page size, tokens, expected per page
    ([(0, 65, 80), (65, 129, 30)], 64, 192, [80, 80, 30]),
    ([(0, 1, 80), (1, 2, 5)], 32, 128, [80, None, None, None]),
    ([(127, 193, 80)], 64, 256, [None, None, 80, 80]),
    ([(1, None, 80)], 64, 128, [None, 80]),
    ([(0, None, 80)], 64, 130, [80, 80, 80]),  # a begun last page counts
    ([], 64, 128, [None, None]),
]


@pytest.mark.parametrize(("ranges", "size", "tokens", "expected"), TABLE)
def test_a_page_has_the_priority_of_its_first_token(
    ranges: list[Any], size: int, tokens: int, expected: list[int | None]
) -> None:
    got, _ = Retention.parse([list(one) for one in ranges]).of_pages(size, tokens, tokens)
    assert got == expected


def test_generated_tokens_have_their_own() -> None:
    retention = Retention.parse([[0, None, 80]], decode_priority=20, decode_duration=3)
    assert retention.of_pages(4, 12, 6) == ([80, 80, 20], [None, None, 3])


def test_ranges_can_be_dictionaries() -> None:
    parsed = Retention.parse([{"start": 0, "end": 5, "priority": 9, "duration": 1.5}, [5, None, 7]])
    assert parsed.ranges == (TokenRange(0, 5, 9, 1.5), TokenRange(5, None, 7))


@pytest.mark.parametrize(
    ("ranges", "field"),
    [
        ([[0, 5, 101]], "priority"), ([[0, 5, -1]], "priority"), ([[0, 5, True]], "priority"), ([[5, 5, 1]], "end"),
        ([[6, 5, 1]], "end"), ([[-1, 5, 1]], "start"), ([[0.5, 5, 1]], "start"),
        ([[0, 5, 1], [4, 9, 1]], "priorities"),
        ([[0, None, 1], [4, 9, 1]], "priorities"), ([[5, 9, 1], [0, 4, 1]], "priorities"), ("high", "priorities"),
        ([7], "priorities"), ([[0]], "priorities"), ([{"start": 0, "prio": 3}], "prio"), ([{"end": 3}], "priorities"),
        ([[0, 5, 1, 0]], "duration"), ([[0, 5, 1, "x"]], "duration"),
    ],
)  # fmt: skip
def test_bad_ranges_are_refused(ranges: Any, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        Retention.parse(ranges)


@pytest.mark.parametrize("options", [{"decode_priority": 101}, {"decode_priority": 1.5}, {"decode_duration": 0}])
def test_bad_decode_values_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Retention.parse(None, **options)
