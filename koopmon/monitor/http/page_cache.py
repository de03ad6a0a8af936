"""Page cache. Rendering is serialised because it competes with the daemon for the GIL."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable

MAX_PAGES = 16
FRESH_SECONDS = 1.0
"""Maximum age of a cached page without changes: the times on it must be updated after this."""


class PageCache:
    """Cache of the pages rendered last."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, tuple[int, float, str]] = OrderedDict()

    def page(self, key: Hashable, revision: int, draw: Callable[[], str]) -> str:
        """Return the cached page of `key` if it is fresh and has the same `revision`, else the result of `draw`."""
        with self._lock:
            known, at, text = self._kept.get(key, (-1, 0.0, ""))
            now = self._clock()
            if known == revision and now - at < FRESH_SECONDS:
                return text
            text = draw()
            self._kept[key] = (revision, now, text)
            self._kept.move_to_end(key)
            while len(self._kept) > MAX_PAGES:
                self._kept.popitem(last=False)
            return text
