"""New runs within a minute: limits for one peer and for several, with a simulated clock."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from koopmon.errors import ProtocolError
from koopmon.monitor.turnover import MAX_LAUNCHES, MAX_TURNOVER, WINDOW_SECONDS, Turnover


def begin(turnover: Turnover, now: float, source: bytes) -> bool:
    """Begin a run; False if it is refused."""
    try:
        turnover.check(now, source)
    except ProtocolError:
        return False
    turnover.add(now, source)
    return True


def test_a_peer_alone_begins_half_and_the_time_frees_it() -> None:
    turnover = Turnover(2)
    most = MAX_LAUNCHES + 2 * MAX_TURNOVER
    begun = sum(begin(turnover, 0.0, b"a") for _ in range(200))
    assert begun == most // 2
    with pytest.raises(ProtocolError, match=r"34 of them from this peer; 34 more are allowed.*wait a minute"):
        turnover.check(WINDOW_SECONDS - 0.1, b"a")
    assert begin(turnover, WINDOW_SECONDS, b"a")


@pytest.mark.parametrize("seed", range(5))
def test_each_peer_may_begin_as_many_as_it_leaves(seed: int) -> None:
    """Against a count over the whole list."""
    choice, turnover, begun = random.Random(seed), Turnover(3), []
    now = 0.0
    for _ in range(600):
        now += choice.choice([0.0, 0.1, 1.0])
        source = choice.choice([b"a", b"a", b"a", b"b", b"c"])
        recent = [each for at, each in begun if now - at < WINDOW_SECONDS]
        allowed = Counter(recent)[source] < MAX_LAUNCHES + 3 * MAX_TURNOVER - len(recent)
        assert begin(turnover, now, source) == allowed
        if allowed:
            begun.append((now, source))
