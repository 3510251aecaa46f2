"""The arithmetic of sinks, windows and context shifts, against llama.cpp's loop written out token by token."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from hf_ctxopt.policies.sink_window import Shift, SinkWindow, context_shift

TOKENS = 400


@dataclass
class LlamaServer:
    """The slot of llama.cpp's server: decodes one token at a time and shifts when its context is full.

    `cache` lists text indices in cache order. The lines of `shift` are those of `server-context.cpp`.
    """

    n_ctx: int
    n_keep: int
    n_discard: int
    cache: list[int] = field(default_factory=list)
    shifts: int = 0

    def shift(self) -> None:
        n_past = len(self.cache)
        n_keep = min(self.n_ctx - 4, self.n_keep)
        n_left = n_past - n_keep
        n_discard = self.n_discard if self.n_discard != 0 else n_left // 2
        n_discard = max(0, min(n_discard, max(0, n_left - 1)))
        for i in range(n_keep + n_discard, n_past):  # seq_rm, seq_add
            self.cache[i - n_discard] = self.cache[i]
        del self.cache[n_past - n_discard :]
        self.shifts += 1

    def decode(self, token: int) -> list[int]:
        """Adds a token; returns what its query attends to."""
        if len(self.cache) + 1 >= self.n_ctx:
            self.shift()
        self.cache.append(token)
        return list(self.cache)


def seen(policy: SinkWindow, token: int) -> list[int]:
    """What the query at `token` attends to, by the policy."""
    first = policy.horizon(token)
    return [index for index in range(token + 1) if index < policy.sinks or index >= first]


@pytest.mark.parametrize("sinks", [0, 1, 4, 9])
@pytest.mark.parametrize("window", [4, 5, 12, 33])
@pytest.mark.parametrize("n_discard", [0, 1, 2, 3, 7, 11, 1000])
def test_horizon_is_what_llama_cpp_keeps_token_by_token(sinks: int, window: int, n_discard: int) -> None:
    policy = SinkWindow(sinks, window, n_discard)
    server = LlamaServer(n_ctx=sinks + window, n_keep=sinks, n_discard=n_discard)
    for token in range(TOKENS):
        assert seen(policy, token) == server.decode(token), token
    assert server.shifts > 5


@pytest.mark.parametrize("sinks", [0, 1, 4, 9])
@pytest.mark.parametrize("window", [1, 2, 3, 12, 33])
def test_horizon_of_a_plain_window_is_the_sinks_and_the_last_tokens(sinks: int, window: int) -> None:
    policy = SinkWindow(sinks, window)
    for token in range(TOKENS):
        recent = range(max(0, token - window + 1), token + 1)
        assert seen(policy, token) == sorted({*range(min(sinks, token + 1)), *recent})


@pytest.mark.parametrize("n_discard", [None, 0, 1, 3, 1000])
@pytest.mark.parametrize(("sinks", "window"), [(0, 4), (4, 4), (3, 17), (0, 64)])
def test_horizon_never_decreases_and_no_query_sees_more_than_most_held(
    sinks: int, window: int, n_discard: int | None
) -> None:
    policy = SinkWindow(sinks, window, n_discard)
    horizons = [policy.horizon(token) for token in range(TOKENS)]
    assert horizons == sorted(horizons)
    assert horizons[0] == 0
    assert all(first == 0 or first > sinks for first in horizons)  # the sinks themselves are never in the way
    assert policy.most_held == window
    for token, first in enumerate(horizons):
        assert 1 <= token + 1 - max(first, sinks) <= window or token < sinks


def test_without_a_window_everything_is_kept() -> None:
    policy = SinkWindow()
    assert [policy.horizon(token) for token in (0, 10, 4_000_000)] == [0, 0, 0]
    assert policy.most_held is None


def test_the_horizon_of_a_far_token_is_found_without_walking_there() -> None:
    assert SinkWindow(4, 508).horizon(4_000_000) == 4_000_000 - 507
    shifting = SinkWindow(4, 508, n_discard=0)  # 512 slots, 507 non-sinks when full, 253 go at once
    assert shifting.shift_by == 253
    assert shifting.horizon(510) == 0
    assert shifting.horizon(511) == shifting.horizon(511 + 252) == 4 + 253
    assert shifting.horizon(511 + 253) == 4 + 2 * 253
    assert shifting.horizon(511 + 253 * 10_000) == 4 + 253 * 10_001


@pytest.mark.parametrize(
    ("n_past", "n_ctx", "options", "expected"),
    [
        # no shift needed: the next token still fits
        (0, 512, {"n_keep": 4}, None),
        (510, 512, {"n_keep": 4}, None),
        # half of what is not kept, rounded down
        (511, 512, {"n_keep": 4}, Shift(4, 253)),
        (511, 512, {"n_keep": 0}, Shift(0, 255)),
        (511, 512, {"n_keep": 5}, Shift(5, 253)),
        # a number of tokens
        (511, 512, {"n_keep": 4, "n_discard": 100}, Shift(4, 100)),
        (511, 512, {"n_keep": 4, "n_discard": 1}, Shift(4, 1)),
        # more than there is: all but one token go
        (511, 512, {"n_keep": 4, "n_discard": 507}, Shift(4, 506)),
        (511, 512, {"n_keep": 4, "n_discard": 10_000}, Shift(4, 506)),
        # less than none
        (511, 512, {"n_keep": 4, "n_discard": -7}, Shift(4, 0)),
        # n_keep beyond n_ctx - 4: four slots stay to write in
        (511, 512, {"n_keep": 508}, Shift(508, 1)),
        (511, 512, {"n_keep": 509}, Shift(508, 1)),
        (511, 512, {"n_keep": 9999, "n_discard": 50}, Shift(508, 2)),
        # one past the edge, as after a prompt that filled the cache
        (512, 512, {"n_keep": 4}, Shift(4, 254)),
        (7, 8, {"n_keep": 4}, Shift(4, 1)),
    ],
)
def test_context_shift_is_llama_cpps(n_past: int, n_ctx: int, options: dict[str, int], expected: Shift | None) -> None:
    assert context_shift(n_past, n_ctx, **options) == expected  # type: ignore[arg-type]
