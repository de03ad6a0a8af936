"""Messages to frames and back. PROTOCOL.md is normative; nothing here knows of sockets.

The first frame is an eight-byte prefix (magic and version) and a MessagePack map; a `Shard` is followed by one raw
frame per point. MessagePack and not JSON because a loss that is NaN or infinite must arrive as such. Whatever arrives,
decoding gives a valid message or raises `ProtocolError`, and allocates nothing before sizes, shapes and types have been
checked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NoReturn, TypeAlias, get_args

import msgspec
import numpy as np
import torch
from torch import Tensor

from koopmon.errors import ProtocolError, one_line
from koopmon.wire.messages import (
    MAX_OBSERVATIONS,
    PROTOCOL_VERSION,
    AgentMessage,
    AnyMessage,
    Command,
    Hello,
    MonitorMessage,
    Shard,
)

RejectionReason = Literal["garbage", "version", "direction", "schema", "size", "shape", "identity", "authorisation"]
REJECTION_REASONS: Final[tuple[RejectionReason, ...]] = get_args(RejectionReason)
"""Every `ProtocolError.reason`. The codec raises all but the last two, the monitor's own: who speaks, and for what."""

Frame: TypeAlias = bytes | memoryview

MAGIC: Final = b"koopmon"
PREFIX: Final = MAGIC + bytes([PROTOCOL_VERSION])
DTYPES: Final[Mapping[str, torch.dtype]] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
UNBOUNDED_SCALARS: Final = frozenset({"learning_rate", "loss", "grad_norm"})
"""Fields in which NaN and infinities travel: there they are the news. Everywhere else they are refused."""
_PAYLOADS: Final = {"set_lr_scale": "lr_scale", "set_kss": "kss", "set_cadence": "cadence_steps"}


@dataclass(frozen=True, slots=True)
class WireLimits:
    """What a receiver takes, in bytes and frames; checked before anything is allocated."""

    max_header_bytes: int = 1 << 16
    max_message_bytes: int = 1 << 30
    max_frames: int = 4098


@dataclass(frozen=True, slots=True)
class ReceivedShard:
    """A shard whose frames have been checked against its header.

    `frames` are the received buffers themselves: they live as long as this object or any tensor of `points()` does.
    """

    header: Shard
    frames: tuple[memoryview, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor frames."""
        return sum(frame.nbytes for frame in self.frames)

    def points(self) -> tuple[Tensor, ...]:
        """P tensors of shape (N, D) in the wire dtype, one per point, which share memory with `frames`.

        A frame that is read-only, or not aligned to the dtype, is copied instead. Do not write into the tensors.
        """
        dtype, shape = DTYPES[self.header.dtype], (self.header.num_samples, self.header.width)
        return tuple(_as_tensor(frame, dtype).view(shape) for frame in self.frames)

    def states(self) -> Tensor:
        """One tensor of shape (P, N, D) in the wire dtype, with memory of its own: one copy, and the frames may go."""
        states = torch.empty(
            (self.header.num_points, self.header.num_samples, self.header.width), dtype=DTYPES[self.header.dtype]
        )
        rows = states.view(torch.uint8).view(self.header.num_points, -1).numpy()
        for row, frame in zip(rows, self.frames, strict=True):
            row[:] = np.frombuffer(frame, dtype=np.uint8)
        return states


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: AnyMessage, tensors: Sequence[Tensor | Frame] | Tensor = ()) -> list[Frame]:
    """Frames of a message: the header, then for a `Shard` one raw frame per point, without a copy.

    `tensors`: P host tensors of shape (N, D), contiguous and of the header's dtype (a (P, N, D) tensor will do), or P
    buffers of that many bytes. The frames share their memory: leave it alone until the send is done (`BufferPool`).
    Raises ProtocolError, with the receiver's reason, for whatever a receiver would refuse.
    """
    header = PREFIX + _encoder.encode(message)
    _check_header(_decode_header(header))
    frames: list[Frame] = [header]
    if isinstance(message, Shard):
        frames += [_raw_frame(message, tensor) for tensor in tensors]
        _check_frames(message, frames)
    elif len(tensors):
        raise ProtocolError("shape", f"{type(message).__name__} carries no tensors, {len(tensors)} given")
    return frames


def decode(frames: Sequence[Frame], *, limits: WireLimits) -> AnyMessage | ReceivedShard:
    """Any message from its frames. Raises ProtocolError with one of `REJECTION_REASONS`, and nothing else."""
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
    message = _decode_header(views[0])
    _check_header(message)
    if isinstance(message, Shard):
        _check_frames(message, views)
        return ReceivedShard(message, tuple(views[1:]))
    if len(views) > 1:
        raise ProtocolError(
            "shape", f"{type(message).__name__} with {len(views) - 1} frames after its header, 0 allowed"
        )
    return message


def decode_for_agent(frames: Sequence[Frame], *, limits: WireLimits) -> MonitorMessage:
    """What an agent takes: a monitor's message. Raises ProtocolError; reason "direction" for an agent's own kinds."""
    message = decode(frames, limits=limits)
    if isinstance(message, MonitorMessage):
        return message
    _wrong_way(message, "an agent")


def decode_for_monitor(frames: Sequence[Frame], *, limits: WireLimits) -> AgentMessage:
    """What a monitor takes on the control channel: an agent's message, no shard. Raises ProtocolError."""
    message = decode(frames, limits=limits)
    if isinstance(message, AgentMessage):
        return message
    _wrong_way(message, "a monitor's control channel")


def decode_shard(frames: Sequence[Frame], *, limits: WireLimits) -> ReceivedShard:
    """What a monitor takes on the data channel: shards. Raises ProtocolError."""
    message = decode(frames, limits=limits)
    if isinstance(message, ReceivedShard):
        return message
    _wrong_way(message, "a monitor's data channel")


def _wrong_way(message: AnyMessage | ReceivedShard, receiver: str) -> NoReturn:
    kind = "shard" if isinstance(message, ReceivedShard) else type(message).__struct_config__.tag
    raise ProtocolError("direction", f"{receiver} takes no {kind!r} message")


def _decode_header(header: Frame) -> AnyMessage:
    prefix = bytes(header[: len(PREFIX)])
    if len(prefix) < len(PREFIX) or not prefix.startswith(MAGIC):
        raise ProtocolError(
            "garbage", "the first frame does not start with koopmon's magic: another program is talking"
        )
    theirs = prefix[-1]
    if theirs != PROTOCOL_VERSION:
        older = "the peer's side" if theirs < PROTOCOL_VERSION else "this side"
        raise ProtocolError(
            "version",
            f"the peer speaks protocol version {theirs}, this side {PROTOCOL_VERSION}: upgrade koopmon on {older}",
        )
    try:
        message: AnyMessage = _decoder.decode(header[len(PREFIX) :])
    except msgspec.ValidationError as error:
        raise ProtocolError("schema", one_line(error, 200)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError("garbage", one_line(error, 200)) from None
    return message


def _check_header(message: AnyMessage) -> None:
    """The rules that a field's own type cannot express."""
    _check_finite(message, "$")
    if isinstance(message, Shard):
        if message.first_point + message.num_points > 4097:
            raise ProtocolError("schema", f"points {message.first_point} + {message.num_points} exceed 4097")
        _check_observables(message)
    elif isinstance(message, Hello):
        if message.process_rank >= message.world_size:
            raise ProtocolError("schema", f"process_rank {message.process_rank} in a world of {message.world_size}")
    elif isinstance(message, Command):
        for kind, payload in _PAYLOADS.items():
            if (getattr(message, payload) is not None) != (message.kind == kind):
                raise ProtocolError("schema", f"a {kind} command carries {payload}, and no other kind does")
        if message.cadence_until_step is not None and message.kind != "set_cadence":
            raise ProtocolError("schema", "cadence_until_step may come with a set_cadence command only")


def _check_observables(shard: Shard) -> None:
    num_layers = shard.num_points - 1
    for name, values in shard.observables.items():
        if len(values) != num_layers:
            raise ProtocolError("schema", f"observable {name} has {len(values)} values for {num_layers} transitions")
    if len(shard.observables) * num_layers > MAX_OBSERVATIONS:
        raise ProtocolError("schema", f"{len(shard.observables)} observables of {num_layers} transitions exceed 4096")


def _check_finite(value: Any, path: str) -> None:
    """Refuse NaN and infinities outside `UNBOUNDED_SCALARS`: a bound such as `>= 0` lets infinity pass."""
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ProtocolError("schema", f"Expected a finite `float`, got {value} - at `{path}`")
    elif isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            if name not in UNBOUNDED_SCALARS:
                _check_finite(getattr(value, name), f"{path}.{name}")
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            _check_finite(item, f"{path}[...]")


def _check_frames(header: Shard, frames: Sequence[Frame]) -> None:
    """Frame count and byte counts against the header of a shard; `frames[0]` is that header."""
    if len(frames) != header.num_points + 1:
        raise ProtocolError("shape", f"{len(frames) - 1} tensor frames for {header.num_points} points")
    expected = header.num_samples * header.width * DTYPES[header.dtype].itemsize
    for point, frame in enumerate(frames[1:]):
        nbytes = memoryview(frame).nbytes
        if nbytes != expected:
            shape = f"({header.num_samples}, {header.width}) {header.dtype}"
            raise ProtocolError("shape", f"frame of point {point} has {nbytes} bytes, {shape} takes {expected}")


def _raw_frame(header: Shard, tensor: Tensor | Frame) -> memoryview:
    if not isinstance(tensor, Tensor):
        return memoryview(tensor).cast("B")
    shape = (header.num_samples, header.width)
    if tuple(tensor.shape) != shape or tensor.dtype != DTYPES[header.dtype]:
        found = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        raise ProtocolError("shape", f"tensor of {found}, the header says {shape} {header.dtype}")
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ProtocolError("shape", f"tensor on {tensor.device}, contiguous {tensor.is_contiguous()}: needs host rows")
    return tensor.detach().view(torch.uint8).view(-1).numpy().data


def _as_tensor(frame: memoryview, dtype: torch.dtype) -> Tensor:
    if not frame.readonly:
        raw = torch.frombuffer(frame, dtype=torch.uint8)
        if raw.data_ptr() % dtype.itemsize == 0:
            return raw.view(dtype)
    return torch.frombuffer(bytearray(frame), dtype=dtype)
