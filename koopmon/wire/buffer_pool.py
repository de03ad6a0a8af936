"""A bounded pool of preallocated host buffers for sends without a copy."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor


class SendTracker(Protocol):
    """Completion state of one send: `done` is True once the transport no longer uses the buffers."""

    @property
    def done(self) -> bool: ...


Allocator = Callable[[int], Tensor]
"""Number of bytes -> one-dimensional uint8 host tensor of that length, optionally pinned."""


def host_buffer(nbytes: int) -> Tensor:
    """Allocate ordinary host memory and touch its pages, so that the first snapshot causes no page faults."""
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu").zero_()


class Slot:
    """One buffer of a pool, held from `BufferPool.acquire` until `release` or until its send is done."""

    __slots__ = ("_buffer", "_pool")

    def __init__(self, pool: BufferPool, buffer: Tensor) -> None:
        self._pool = pool
        self._buffer = buffer

    def tensor(self, shape: Sequence[int], dtype: torch.dtype, *, offset: int = 0) -> Tensor:
        """Return a view from byte `offset` on, a multiple of the dtype's size. Its content is not cleared.

        Raises ValueError when the view does not fit into the buffer.
        """
        nbytes = math.prod(shape) * dtype.itemsize
        if offset + nbytes > len(self._buffer):
            raise ValueError(f"shape {tuple(shape)} at byte {offset}: {offset + nbytes} of {len(self._buffer)} bytes")
        return self._buffer[offset : offset + nbytes].view(dtype).view(tuple(shape))

    def release(self) -> None:
        """Return the buffer to the pool at once; nothing may use its memory afterwards. Idempotent."""
        self._pool._return(self, None)

    def release_when_done(self, tracker: SendTracker) -> None:
        """Return the buffer to the pool as soon as the transport no longer uses its memory."""
        self._pool._return(self, tracker)


class BufferPool:
    """`num_slots` buffers of `slot_bytes` each, allocated at construction only. All methods are thread-safe."""

    def __init__(self, num_slots: int, slot_bytes: int, allocator: Allocator = host_buffer) -> None:
        if num_slots < 1 or slot_bytes < 1:
            raise ValueError(f"num_slots {num_slots} and slot_bytes {slot_bytes} must be at least 1")
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self._lock = threading.Lock()
        self._free = [self._allocate(allocator) for _ in range(num_slots)]
        self._held: set[Slot] = set()
        self._sending: list[tuple[Tensor, SendTracker]] = []

    def _allocate(self, allocator: Allocator) -> Tensor:
        buffer = allocator(self.slot_bytes)
        if buffer.dtype != torch.uint8 or buffer.shape != (self.slot_bytes,) or buffer.device.type != "cpu":
            raise ValueError(f"allocator must give a uint8 host tensor of shape ({self.slot_bytes},)")
        return buffer

    def acquire(self, nbytes: int) -> Slot | None:
        """Return a slot of at least `nbytes`; None when all are busy or too small. Never waits or allocates."""
        if nbytes > self.slot_bytes:
            return None
        with self._lock:
            self._collect()
            if not self._free:
                return None
            slot = Slot(self, self._free.pop())
            self._held.add(slot)
            return slot

    def _collect(self) -> None:
        sending, self._sending = self._sending, []
        for buffer, tracker in sending:
            if tracker.done:
                self._free.append(buffer)
            else:
                self._sending.append((buffer, tracker))

    def _return(self, slot: Slot, tracker: SendTracker | None) -> None:
        with self._lock:
            if slot not in self._held:
                return
            self._held.remove(slot)
            if tracker is None:
                self._free.append(slot._buffer)
            else:
                self._sending.append((slot._buffer, tracker))
