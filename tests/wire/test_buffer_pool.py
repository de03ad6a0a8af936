"""Buffer pool: bounded, never waiting, and never lending memory that is still read."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from koopmon.wire.buffer_pool import BufferPool, Slot, host_buffer
from tests.factories import num_free


class Tracker:
    """Transport that releases a buffer on request."""

    def __init__(self) -> None:
        self.done = False


class Pool(RuleBasedStateMachine):
    """Any order of acquiring, releasing, sending and finishing keeps every slot with one holder."""

    held = Bundle("held")
    sent = Bundle("sent")
    gone = Bundle("gone")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BufferPool(3, 16)
        self.busy: set[int] = set()
        self.addresses: set[int] = set()

    @rule(target=held)
    def acquire(self) -> Slot | None:
        slot = self.pool.acquire(16)
        assert (slot is None) == (len(self.busy) == 3)
        if slot is not None:
            address = slot.tensor((16,), torch.uint8).data_ptr()
            assert address not in self.busy
            self.busy.add(address)
            self.addresses.add(address)
        return slot

    @rule(target=gone, slot=consumes(held))
    def release(self, slot: Slot | None) -> Slot | None:
        if slot is not None:
            slot.release()
            self.busy.discard(slot.tensor((16,), torch.uint8).data_ptr())
        return slot

    @rule(target=sent, slot=consumes(held))
    def send(self, slot: Slot | None) -> tuple[Slot | None, Tracker]:
        tracker = Tracker()
        if slot is not None:
            slot.release_when_done(tracker)
        return slot, tracker

    @rule(target=gone, pair=consumes(sent))
    def finish(self, pair: tuple[Slot | None, Tracker]) -> Slot | None:
        slot, tracker = pair
        tracker.done = True
        if slot is not None:
            self.busy.discard(slot.tensor((16,), torch.uint8).data_ptr())
        return slot

    @rule(pair=sent)
    def release_while_sending(self, pair: tuple[Slot | None, Tracker]) -> None:
        """The transport still reads the memory."""
        if pair[0] is not None:
            pair[0].release()

    @rule(slot=gone)
    def release_again(self, slot: Slot | None) -> None:
        """Another holder may have the buffer by now."""
        if slot is not None:
            slot.release()
            slot.release_when_done(Tracker())

    @invariant()
    def is_bounded(self) -> None:
        assert num_free(self.pool) == 3 - len(self.busy)
        assert len(self.addresses) <= 3


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_none_when_too_large() -> None:
    pool = BufferPool(2, 64)
    assert pool.acquire(65) is None
    assert num_free(pool) == 2
    assert pool.acquire(64) is not None


def test_buffers_come_from_the_allocator_once_and_are_its_own() -> None:
    asked: list[int] = []

    def allocate(nbytes: int) -> torch.Tensor:
        asked.append(nbytes)
        return host_buffer(nbytes)

    pool = BufferPool(3, 128, allocate)
    for _ in range(10):
        slots = [pool.acquire(100) for _ in range(4)]
        assert slots[3] is None
        for slot in slots[:3]:
            assert slot is not None
            slot.release()
    assert asked == [128, 128, 128]


@pytest.mark.parametrize(
    "wrong", [torch.zeros(15, dtype=torch.uint8), torch.zeros(16), torch.zeros(16, dtype=torch.uint8, device="meta")]
)
def test_an_allocator_must_keep_its_word(wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"uint8 host tensor of shape \(16,\)"):
        BufferPool(1, 16, lambda nbytes: wrong)


@pytest.mark.parametrize(("num_slots", "slot_bytes"), [(0, 1), (1, 0), (-1, 8)])
def test_a_pool_of_nothing_is_refused(num_slots: int, slot_bytes: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        BufferPool(num_slots, slot_bytes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_slots_give_typed_views(dtype: torch.dtype) -> None:
    slot = BufferPool(1, 2 * 3 * 4 * 4 + 8).acquire(1)
    assert slot is not None
    states = slot.tensor((2, 3, 4), dtype)
    states.copy_(torch.arange(24.0).view(2, 3, 4))
    assert torch.equal(slot.tensor((24,), dtype), torch.arange(24.0).to(dtype))
    assert torch.equal(slot.tensor((3, 4), dtype, offset=12 * dtype.itemsize), states[1])
    with pytest.raises(ValueError, match="bytes"):
        slot.tensor((2, 3, 5), torch.float32)


def test_threads_never_share_a_slot() -> None:
    pool = BufferPool(2, 8)
    clashes: list[int] = []

    def work(mark: int) -> None:
        for _ in range(1000):
            slot = pool.acquire(8)
            if slot is None:
                continue
            mine = slot.tensor((8,), torch.uint8)
            mine.fill_(mark)
            if not bool((mine == mark).all()):
                clashes.append(mark)
            slot.release()

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not clashes
    assert num_free(pool) == 2
