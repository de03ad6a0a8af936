"""What a server has taken off its transport and nobody has read yet: a queue for each peer, bounded together."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import Generic, TypeVar

P = TypeVar("P", bound=Hashable)
M = TypeVar("M")


class ReceiveQueue(Generic[P, M]):
    """Messages in the order of each peer, the peers in turn.

    `max_bytes` are shared equally by the peers that have something waiting. While all of them are in use, a peer that
    has its share has no room for more, and the others have: what is kept is at most twice `max_bytes`, and one message
    of each peer, however large.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._waiting: OrderedDict[P, deque[tuple[M, int]]] = OrderedDict()
        self._held: dict[P, int] = {}

    def __len__(self) -> int:
        """Peers that have something waiting."""
        return len(self._waiting)

    def has_room(self, peer: P) -> bool:
        """Whether one more message of `peer` may wait."""
        share = self._max_bytes // (len(self._waiting) or 1)
        return self._num_bytes < self._max_bytes or self._held.get(peer, 0) < share

    def put(self, peer: P, message: M, num_bytes: int) -> None:
        self._waiting.setdefault(peer, deque()).append((message, num_bytes))
        self._held[peer] = self._held.get(peer, 0) + num_bytes
        self._num_bytes += num_bytes

    def pop(self) -> tuple[P, M] | None:
        """The peer whose turn it is, and the first of its messages; None when there is none."""
        if not self._waiting:
            return None
        peer, messages = self._waiting.popitem(last=False)
        message, num_bytes = messages.popleft()
        self._num_bytes -= num_bytes
        self._held[peer] -= num_bytes
        if messages:
            self._waiting[peer] = messages  # to the end: the others come first
        else:
            del self._held[peer]
        return peer, message
