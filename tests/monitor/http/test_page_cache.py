"""Many readers of a page cost what one does."""

from __future__ import annotations

import threading
import time

from koopmon.monitor.http.page_cache import FRESH_SECONDS, MAX_PAGES, PageCache


def test_a_page_is_drawn_again_when_it_changed_or_its_times_are_old() -> None:
    now, drawn = [0.0], []
    once = PageCache(clock=lambda: now[0])

    def page(key: str, revision: int) -> str:
        return once.page(key, revision, lambda: drawn.append(key) or f"{key} {len(drawn)}")

    assert page("a", 1) == page("a", 1) == "a 1"
    assert page("b", 1) == "b 2"
    assert page("a", 2) == "a 3"
    now[0] = FRESH_SECONDS
    assert page("a", 2) == "a 4"
    for number in range(MAX_PAGES):
        page(f"other {number}", 1)
    assert page("b", 1) == f"b {5 + MAX_PAGES}", "only so many are remembered"


def test_one_page_is_drawn_at_a_time() -> None:
    once, drawing, most = PageCache(), [], []

    def draw() -> str:
        drawing.append(1)
        most.append(len(drawing))
        time.sleep(0.005)
        drawing.pop()
        return "page"

    readers = [threading.Thread(target=once.page, args=(number, 1, draw)) for number in range(12)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(30.0)
    assert most == [1] * 12
