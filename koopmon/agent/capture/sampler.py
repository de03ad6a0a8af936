"""Copies residual states from the training device into one rank's part of a snapshot in host memory.

Shapes: P points, N sampled tokens, D width; a state is (..., T, D). Rows are copied into (P, N, D) memory that is
allocated once. On an accelerator the copy to the host runs on a side stream: the training thread never waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from koopmon.agent.capture.rows_ahead import RowsAhead
from koopmon.agent.capture.slow_signals import SlowSignals
from koopmon.agent.stats import AgentStats, Reading
from koopmon.api import Stack
from koopmon.config import SamplingConfig
from koopmon.observables import Readings
from koopmon.token_sampling import align_mask, order_rows, take_rows
from koopmon.wire.buffer_pool import BufferPool, Slot, host_buffer
from koopmon.wire.messages import DType, TrainingStep

NUM_SLOTS = 3
LARGE_SLOT_BYTES = 64 << 20
"""For slots of this size or more the pool holds NUM_SLOTS - 1."""
ONE_PASS_BYTES = 1 << 20
"""States up to this size are tested at once, and larger ones point by point: the test allocates a byte per value."""
DTYPE_NAMES: dict[torch.dtype, DType] = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


@dataclass(slots=True)
class RankSnapshot:
    """One rank's rows of one snapshot: `states` (P, N, D) in the memory of `slot`, valid after the event `ready`.

    `num_valid`, when not None, is a 0-d host tensor, valid at the same moment. Only the first `num_valid` rows are
    real.
    """

    training: TrainingStep
    """Without measured values."""
    slot: Slot
    states: Tensor
    num_valid: Tensor | None
    ready: Any
    masked: bool
    num_layers: int
    paired: bool
    """True if the points are the input and the output of each block."""
    observed: tuple[tuple[str, int], ...] = ()
    """(name, layer) of each reading in `observations`: float32 on the host, valid after `ready`."""
    observations: Tensor | None = None
    measured: Mapping[str, Reading] = field(default_factory=dict)
    """Measured values of the snapshot's step, by their field of `training`."""


class Sampler:
    """Takes the same tokens at every point of one forward pass: `begin`, then `put` for each point in order, `finish`.

    `share` is the number of tokens that this rank takes. Only the training thread calls it. States are detached, and
    masks have no gradient: no method needs `no_grad`, whose guard takes as long as the copy of a small state.
    """

    def __init__(self, config: SamplingConfig, data_rank: int, share: int, stats: AgentStats) -> None:
        self._seed = config.seed
        self._data_rank = data_rank
        self._share = share
        self._stats = stats
        self._dtype: torch.dtype | None = None
        self._pool: BufferPool | None = None
        self._stage: _DeviceStage | None = None
        self._num_layers = 0
        self._paired = False
        self._slot: Slot | None = None
        self._host: Tensor = torch.empty(0, device="cpu")
        self._points: Sequence[Tensor] = ()
        """Memory of each point: of `_host`, or on the device."""
        self._rows: Tensor = torch.empty(0, device="cpu")
        self._num_valid: Tensor | None = None
        self._ahead = RowsAhead(config.seed, data_rank, share)
        self._slow = SlowSignals()
        self.readings: Readings | None = None
        """Readings of the latest snapshot begun. None if it repeats those of an earlier one."""
        self._observed_stack = "", 0
        self._observed: tuple[tuple[str, int], ...] = ()
        self._observations: Tensor | None = None
        self._shape = torch.Size()
        self._training = TrainingStep(step=0)
        self._num_points = 0
        self._num_put = 0

    @property
    def share(self) -> int:
        """The number of tokens that this rank takes."""
        return self._share

    def choose(self, step: int, num_tokens: int, count: int) -> Tensor:
        """Return at most `count` of `num_tokens` tokens, int64, a function of the seed, `step` and the data rank."""
        return order_rows(num_tokens, count, seed=self._seed, step=step, data_rank=self._data_rank)[0]

    @property
    def active(self) -> bool:
        """True between a `begin` that returned True and `finish` or `abandon`."""
        return self._slot is not None

    def begin(self, training: TrainingStep, stack: Stack, state: Tensor, mask: Tensor | None) -> bool:
        """Choose tokens and a buffer for a snapshot of `stack` that starts with `state`.

        Returns False, and counts, if none is free.
        """
        leading, num_points = state.shape[:-1], stack.num_states
        num_tokens = leading.numel()
        self._dtype = _common(self._dtype, state.dtype)
        shape = (num_points, min(self._share, num_tokens), state.shape[-1])
        nbytes = num_points * self._share * shape[2] * self._dtype.itemsize
        if self._pool is None or self._pool.slot_bytes < nbytes:
            slots = NUM_SLOTS if nbytes < LARGE_SLOT_BYTES else NUM_SLOTS - 1
            self._pool = BufferPool(slots, nbytes, _pinned if state.device.type == "cuda" else host_buffer)
        slot = self._pool.acquire(nbytes)
        if slot is None:
            self._stats.drop("no_buffer")
            return False
        self._slot = slot
        if (stack.name, stack.num_layers) != self._observed_stack:
            self._slow, self._observed_stack = SlowSignals(), (stack.name, stack.num_layers)
        self.readings = Readings() if self._slow.is_due(training.step) else None
        aligned = align_mask(mask, leading)
        if aligned is None:
            self._rows, self._num_valid = self._ahead.at(training.step, num_tokens), None
            if state.device.type != "cpu":
                self._rows = self._rows.to(state.device, non_blocking=True)
        else:
            self._rows, self._num_valid = order_rows(
                num_tokens,
                self._share,
                seed=self._seed,
                step=training.step,
                data_rank=self._data_rank,
                mask=aligned,
                device=state.device,
            )
        host = slot.tensor(shape, self._dtype)
        if state.device.type == "cpu":
            self._stage, buffer = None, host
        else:
            if self._stage is None or not self._stage.fits(shape, self._dtype, state.device):
                self._stage = _DeviceStage(shape, self._dtype, state.device)
            buffer = self._stage.open()
        self._host, self._points = host, buffer.unbind(0)
        self._shape, self._training, self._num_points, self._num_put = state.shape, training, num_points, 0
        self._num_layers, self._paired = stack.num_layers, stack.form == "pairs"
        return True

    def put(self, point: int, state: Tensor) -> bool:
        """Copy the chosen rows of the state at `point`.

        Returns False, and abandons the snapshot, if they do not fit.
        """
        if point != self._num_put or state.shape != self._shape:
            self.abandon()
            return False
        target, state = self._points[point], state.detach()
        if state.dtype == target.dtype and state.device == target.device and state.is_contiguous():
            torch.index_select(state.reshape(-1, state.shape[-1]), 0, self._rows, out=target)
        else:
            self._dtype = _common(self._dtype, state.dtype)
            target.copy_(take_rows(state, self._rows.to(state.device)))
        self._num_put += 1
        return True

    def repeat_to_end(self) -> None:
        """Put the last state at all remaining points: nothing has changed it."""
        for point in range(self._num_put, self._num_points):
            self._points[point].copy_(self._points[self._num_put - 1])
        self._num_put = self._num_points

    def finish(self) -> RankSnapshot | None:
        """Return the snapshot once every point was put. Otherwise count it as incomplete and return None."""
        slot = self._slot
        if slot is None or self._num_put != self._num_points:
            self.abandon()
            return None
        self._slot = None
        host = self._host
        gathered = None if self.readings is None else self.readings.gather(self._points[0].device)
        values = None if gathered is None else gathered.values
        num_valid, ready, masked = self._num_valid, None, self._num_valid is not None
        if self._stage is not None:
            num_valid, values, ready = self._stage.copy_out(host, num_valid, values)
        if self.readings is not None:
            self._slow.note(self._training.step)
            self._observed, self._observations = () if gathered is None else gathered.keys, values
        return RankSnapshot(
            training=self._training,
            slot=slot,
            states=host,
            num_valid=num_valid,
            ready=ready,
            masked=masked,
            num_layers=self._num_layers,
            paired=self._paired,
            observed=self._observed,
            observations=self._observations,
        )

    def abandon(self) -> None:
        """Drop the snapshot that was begun, if any, and count it."""
        if self._slot is not None:
            self._slot.release()
            self._slot = None
            self._stats.drop("incomplete")


class _DeviceStage:
    """Device memory for the rows of a snapshot, and the side stream that copies them to the host."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._buffer = torch.empty(shape, dtype=dtype, device=device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._left: torch.cuda.Event | None = None

    def fits(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
        return self._buffer.shape == shape and self._buffer.dtype == dtype and self._buffer.device == device

    def open(self) -> Tensor:
        """Return the buffer. The device, but no thread, waits until the previous snapshot has been copied."""
        if self._left is not None:
            torch.cuda.current_stream(self._buffer.device).wait_event(self._left)
        return self._buffer

    def copy_out(
        self, host: Tensor, num_valid: Tensor | None, values: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, torch.cuda.Event]:
        """Copy the buffer to `host`, and the two small tensors to new pinned ones."""
        self._stream.wait_stream(torch.cuda.current_stream(self._buffer.device))
        with torch.cuda.stream(self._stream):
            host.copy_(self._buffer, non_blocking=True)
            arrived = [self._to_host(small) for small in (num_valid, values)]
            self._left = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._left.record(self._stream)
        return arrived[0], arrived[1], self._left

    def _to_host(self, small: Tensor | None) -> Tensor | None:
        if small is None:
            return None
        small.record_stream(self._stream)
        return torch.empty(small.shape, dtype=small.dtype, pin_memory=True, device="cpu").copy_(
            small, non_blocking=True
        )


def _pinned(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True, device="cpu")


def _common(known: torch.dtype | None, found: torch.dtype) -> torch.dtype:
    """Return the wire dtype that holds both: 16-bit types stay as they are, all wider ones become float32."""
    if found not in DTYPE_NAMES:
        return torch.float32
    return found if known is None or known == found else torch.float32


def all_finite(states: Tensor) -> bool:
    """Return True if host `states` (P, N, D) hold no NaN and no infinity.

    Uses one thread, without the interpreter's lock.
    """
    if states.dtype == torch.bfloat16:
        return not any(bool(((point & 0x7F80) == 0x7F80).any()) for point in states.view(torch.int16).numpy())
    values = states.numpy()
    return all(bool(np.isfinite(part).all()) for part in (values if values.nbytes > ONE_PASS_BYTES else (values,)))
