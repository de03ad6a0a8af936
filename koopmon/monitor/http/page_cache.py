"""Pages drawn once for all of their readers, and one at a time: the interpreter is the daemon's too."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable

MAX_PAGES = 16
FRESH_SECONDS = 1.0
"""How long a page of which nothing changed is handed out again; then at least its times have."""


class PageCache:
    """Remembers the pages drawn last."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, tuple[int, float, str]] = OrderedDict()

    def page(self, key: Hashable, revision: int, draw: Callable[[], str]) -> str:
        """What `draw` gives for `key`, or gave a moment ago when `revision` is the same."""
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
