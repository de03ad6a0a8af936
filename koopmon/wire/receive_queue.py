"""Queues of received, unread messages, one per peer, with a common bound on memory."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import Generic, TypeVar

P = TypeVar("P", bound=Hashable)
M = TypeVar("M")


class ReceiveQueue(Generic[P, M]):
    """Messages in order within each peer, and peers in round-robin order.

    The peers with unread messages share `max_bytes` equally. When the total reaches it, a peer that has used its share
    has no room for more. The queue holds at most twice `max_bytes`, plus one message of any size per peer.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._waiting: OrderedDict[P, deque[tuple[M, int]]] = OrderedDict()
        self._held: dict[P, int] = {}

    def __len__(self) -> int:
        """Number of peers with unread messages."""
        return len(self._waiting)

    def has_room(self, peer: P) -> bool:
        """Return True if one more message of `peer` fits."""
        share = self._max_bytes // (len(self._waiting) or 1)
        return self._num_bytes < self._max_bytes or self._held.get(peer, 0) < share

    def put(self, peer: P, message: M, num_bytes: int) -> None:
        self._waiting.setdefault(peer, deque()).append((message, num_bytes))
        self._held[peer] = self._held.get(peer, 0) + num_bytes
        self._num_bytes += num_bytes

    def pop(self) -> tuple[P, M] | None:
        """Return the next peer and its oldest message; None when the queue is empty."""
        if not self._waiting:
            return None
        peer, messages = self._waiting.popitem(last=False)
        message, num_bytes = messages.popleft()
        self._num_bytes -= num_bytes
        self._held[peer] -= num_bytes
        if messages:
            self._waiting[peer] = messages  # to the end, for round-robin order
        else:
            del self._held[peer]
        return peer, message
