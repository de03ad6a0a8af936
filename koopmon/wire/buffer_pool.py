"""A bounded pool of preallocated host buffers: a slot is filled, sent without a copy, free again when it has left."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor


class SendTracker(Protocol):
    """Tells when the transport has let go of the buffers it was given."""

    @property
    def done(self) -> bool: ...


Allocator = Callable[[int], Tensor]
"""Bytes wanted -> one-dimensional uint8 host tensor of that length; pinned, where that helps."""


def host_buffer(nbytes: int) -> Tensor:
    """Ordinary host memory, pages touched: the first snapshot must not pay for page faults."""
    return torch.empty(nbytes, dtype=torch.uint8).zero_()


class Slot:
    """One buffer of a pool, held from `BufferPool.acquire` until `release`, or until its send is done."""

    __slots__ = ("_buffer", "_pool")

    def __init__(self, pool: BufferPool, buffer: Tensor) -> None:
        self._pool = pool
        self._buffer = buffer

    def tensor(self, shape: Sequence[int], dtype: torch.dtype, *, offset: int = 0) -> Tensor:
        """A view of the buffer from byte `offset` on, a multiple of the dtype's size. Holds what was there before."""
        nbytes = math.prod(shape) * dtype.itemsize
        if offset + nbytes > len(self._buffer):
            raise ValueError(f"shape {tuple(shape)} at byte {offset}: {offset + nbytes} of {len(self._buffer)} bytes")
        return self._buffer[offset : offset + nbytes].view(dtype).view(tuple(shape))

    def release(self) -> None:
        """Give the buffer back now: nothing reads its memory any more. Nothing when it was given back before."""
        self._pool._return(self, None)

    def release_when_done(self, tracker: SendTracker) -> None:
        """Give the buffer back as soon as the transport has let go of its memory."""
        self._pool._return(self, tracker)


class BufferPool:
    """`num_slots` buffers of `slot_bytes` each, allocated here and never after. Any thread may call any method."""

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
        """A slot of at least `nbytes`; None when all are busy or none is that large. Never waits, never allocates."""
        if nbytes > self.slot_bytes:
            return None
        with self._lock:
            self._collect()
            if not self._free:
                return None
            slot = Slot(self, self._free.pop())
            self._held.add(slot)
            return slot

    @property
    def num_free(self) -> int:
        """Slots that `acquire` could give now."""
        with self._lock:
            self._collect()
            return len(self._free)

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
