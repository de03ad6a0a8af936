"""A window of an hour for each run and kind."""

from __future__ import annotations

from koopmon.notify import rate_limit
from koopmon.notify.rate_limit import WINDOW_SECONDS, RateLimit


def test_a_window_admits_its_number_and_counts_the_others() -> None:
    limit = RateLimit(3)
    assert [limit.admit(float(now), ("job", "alarm")) for now in range(5)] == [3, 2, 1, 0, 0]
    assert limit.admit(5.0, ("job", "end")) == 3, "each kind has its own window"
    assert limit.admit(6.0, ("other", "alarm")) == 3
    assert limit.next_end() == WINDOW_SECONDS
    assert list(limit.ended(WINDOW_SECONDS - 1)) == []
    assert list(limit.ended(WINDOW_SECONDS + 60)) == [(("job", "alarm"), 2)]
    assert limit.next_end() is None
    assert limit.admit(WINDOW_SECONDS + 61, ("job", "alarm")) == 3


def test_a_quiet_hour_gives_a_new_window_without_a_summary() -> None:
    limit = RateLimit(1)
    assert limit.admit(0.0, ("job", "alarm")) == 1
    assert list(limit.ended(WINDOW_SECONDS)) == []
    assert limit.admit(WINDOW_SECONDS, ("job", "alarm")) == 1
    assert limit.next_end() == 2 * WINDOW_SECONDS
    assert list(limit.ended(2 * WINDOW_SECONDS)) == []


def test_the_number_of_windows_is_bounded() -> None:
    limit = RateLimit(1)
    for number in range(rate_limit.MAX_KEYS + 100):
        limit.admit(float(number), (f"run-{number}", "end"))
    assert limit.next_end() == WINDOW_SECONDS + 100
