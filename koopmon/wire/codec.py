"""Encodes messages to frames and decodes them. PROTOCOL.md is normative; this module is independent of sockets.

The first frame is the header (`koopmon.wire.headers`). A `Shard` has one more raw frame per point. For any input,
decoding returns a valid message or raises `ProtocolError`. It checks sizes, shapes and types before it allocates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

import torch
from torch import Tensor

from koopmon.errors import ProtocolError
from koopmon.wire.headers import Frame, WireLimits, decode_header, encode_header
from koopmon.wire.messages import AgentMessage, AnyMessage, MonitorMessage, Shard

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


@dataclass(frozen=True, slots=True)
class ReceivedShard:
    """A shard whose frames match its header.

    `frames` are the received buffers. They stay alive as long as this object or any tensor of `points()`.
    """

    header: Shard
    frames: tuple[memoryview, ...]

    def points(self) -> tuple[Tensor, ...]:
        """Return P tensors of shape (N, D) in the wire dtype, one per point, which share memory with `frames`.

        A frame that is read-only or not aligned to the dtype is copied. Do not write into the tensors.
        """
        dtype, shape = DTYPES[self.header.dtype], (self.header.num_samples, self.header.width)
        return tuple(_as_tensor(frame, dtype).view(shape) for frame in self.frames)


def encode(message: AnyMessage, tensors: Sequence[Tensor | Frame] | Tensor = ()) -> list[Frame]:
    """Return the frames of a message: the header, then for a `Shard` one raw frame per point, without a copy.

    `tensors`: P host tensors of shape (N, D), contiguous and of the header's dtype, or P buffers of that many bytes.
    One (P, N, D) tensor is accepted too. The frames share this memory: do not change it until the send is done
    (`BufferPool`). Raises ProtocolError with the receiver's reason for every message that a receiver would reject.
    """
    frames: list[Frame] = [encode_header(message)]
    if isinstance(message, Shard):
        frames += _raw_frames(message, tensors)
        _check_frames(message, frames)
    elif len(tensors):
        raise ProtocolError("shape", f"{type(message).__name__} carries no tensors, {len(tensors)} given")
    return frames


def decode(frames: Sequence[Frame], *, limits: WireLimits) -> AnyMessage | ReceivedShard:
    """Decode any message. Raises only ProtocolError, with one of `REJECTION_REASONS`."""
    if not frames:
        raise ProtocolError("garbage", "a message without frames")
    if len(frames) > limits.max_frames:
        raise ProtocolError("size", f"{len(frames)} frames, at most {limits.max_frames} are taken")
    views = [memoryview(frame).cast("B") for frame in frames]
    total = sum(view.nbytes for view in views)
    if total > limits.max_message_bytes:
        raise ProtocolError("size", f"message of {total} bytes, at most {limits.max_message_bytes} are taken")
    if views[0].nbytes > limits.max_header_bytes:
        raise ProtocolError("size", f"header of {views[0].nbytes} bytes, at most {limits.max_header_bytes} are taken")
    message = decode_header(views[0])
    if isinstance(message, Shard):
        _check_frames(message, views)
        return ReceivedShard(message, tuple(views[1:]))
    if len(views) > 1:
        raise ProtocolError(
            "shape", f"{type(message).__name__} with {len(views) - 1} frames after its header, 0 allowed"
        )
    return message


def decode_for_agent(frames: Sequence[Frame], *, limits: WireLimits) -> MonitorMessage:
    """Decode a message from the monitor. Raises ProtocolError; the reason is "direction" for an agent's message."""
    message = decode(frames, limits=limits)
    if isinstance(message, MonitorMessage):
        return message
    _wrong_way(message, "an agent")


def decode_for_monitor(frames: Sequence[Frame], *, limits: WireLimits) -> AgentMessage:
    """Decode a message of the control channel from an agent; a shard is rejected. Raises ProtocolError."""
    message = decode(frames, limits=limits)
    if isinstance(message, AgentMessage):
        return message
    _wrong_way(message, "a monitor's control channel")


def decode_shard(frames: Sequence[Frame], *, limits: WireLimits) -> ReceivedShard:
    """Decode a shard from the data channel. Raises ProtocolError."""
    message = decode(frames, limits=limits)
    if isinstance(message, ReceivedShard):
        return message
    _wrong_way(message, "a monitor's data channel")


def _wrong_way(message: AnyMessage | ReceivedShard, receiver: str) -> NoReturn:
    kind = "shard" if isinstance(message, ReceivedShard) else type(message).__struct_config__.tag
    raise ProtocolError("direction", f"{receiver} takes no {kind!r} message")


def _check_frames(header: Shard, frames: Sequence[Frame]) -> None:
    """Check frame count and byte counts against the header of a shard; `frames[0]` is that header."""
    if len(frames) != header.num_points + 1:
        raise ProtocolError("shape", f"{len(frames) - 1} tensor frames for {header.num_points} points")
    expected = header.num_samples * header.width * DTYPES[header.dtype].itemsize
    for point, frame in enumerate(frames[1:]):
        nbytes = memoryview(frame).nbytes
        if nbytes != expected:
            shape = f"({header.num_samples}, {header.width}) {header.dtype}"
            raise ProtocolError("shape", f"frame of point {point} has {nbytes} bytes, {shape} takes {expected}")


def _raw_frames(header: Shard, tensors: Sequence[Tensor | Frame] | Tensor) -> list[memoryview]:
    shape, dtype = (header.num_samples, header.width), DTYPES[header.dtype]
    if (
        not isinstance(tensors, Tensor)
        or (tuple(tensors.shape[1:]), tensors.dtype) != (shape, dtype)
        or tensors.device.type != "cpu"
        or not tensors.is_contiguous()
    ):
        return [_raw_frame(header, tensor) for tensor in tensors]
    # One view of all points takes as long as one of a single point.
    memory, length = _bytes(tensors), shape[0] * shape[1] * dtype.itemsize
    return [memory[start : start + length] for start in range(0, len(memory), length)]


def _raw_frame(header: Shard, tensor: Tensor | Frame) -> memoryview:
    if not isinstance(tensor, Tensor):
        return memoryview(tensor).cast("B")
    shape = (header.num_samples, header.width)
    if tuple(tensor.shape) != shape or tensor.dtype != DTYPES[header.dtype]:
        found = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        raise ProtocolError("shape", f"tensor of {found}, the header says {shape} {header.dtype}")
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ProtocolError("shape", f"tensor on {tensor.device}, contiguous {tensor.is_contiguous()}: needs host rows")
    return _bytes(tensor)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().view(torch.uint8).view(-1).numpy().data


def _as_tensor(frame: memoryview, dtype: torch.dtype) -> Tensor:
    if not frame.readonly:
        raw = torch.frombuffer(frame, dtype=torch.uint8)
        if raw.data_ptr() % dtype.itemsize == 0:
            return raw.view(dtype)
    return torch.frombuffer(bytearray(frame), dtype=dtype)
