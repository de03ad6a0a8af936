"""The first frame of every message: an eight-byte prefix (magic and version) and a validated MessagePack map.

It holds a whole control message, or the header of a shard. The format is MessagePack because JSON cannot represent NaN
and infinite losses. The module does not import torch, so that a probe does not load it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, get_args

import msgspec

from koopmon.errors import ProtocolError, one_line
from koopmon.wire.messages import MAX_OBSERVATIONS, MEASURED, PROTOCOL_VERSION, AnyMessage, Command, Hello, Shard

RejectionReason = Literal["garbage", "version", "direction", "schema", "size", "shape", "identity", "authorisation"]
REJECTION_REASONS: Final[tuple[RejectionReason, ...]] = get_args(RejectionReason)
"""Values of `ProtocolError.reason`. The codec raises all but the last two; the monitor raises those after it checks the
sender's identity and its permitted runs."""

Frame: TypeAlias = bytes | memoryview

MAGIC: Final = b"koopmon"
PREFIX: Final = MAGIC + bytes([PROTOCOL_VERSION])
UNBOUNDED_SCALARS: Final = frozenset((*MEASURED, "value"))
"""Fields that may hold NaN and infinities, because a diverging run produces them. All other fields reject them."""
_PAYLOADS: Final = {
    "set_lr_scale": "lr_scale",
    "set_kss": "kss",
    "set_ceilings": "ceilings",
    "set_cadence": "cadence_steps",
    "rewind": "rewind",
}


@dataclass(frozen=True, slots=True)
class WireLimits:
    """Receive limits in bytes and frames, checked before any allocation."""

    max_header_bytes: int = 1 << 16
    max_message_bytes: int = 1 << 30
    max_frames: int = 4098


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyMessage)


def encode_header(message: AnyMessage) -> bytes:
    """Return the first frame of a message. Raises ProtocolError, with the receiver's reason, for an invalid message."""
    try:
        # A Struct accepts any value of Python. msgspec checks types and bounds only when it converts plain values.
        plain = msgspec.to_builtins(message)
        msgspec.convert(plain, type(message))
        header = PREFIX + _encoder.encode(plain)
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError) as error:  # the last for values such as 2**64
        raise ProtocolError("schema", one_line(error, 200)) from None
    _check_header(message)
    return header


def decode_header(header: Frame) -> AnyMessage:
    """Decode a first frame: a control message, or the header of a shard. Raises ProtocolError."""
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
            f"the peer has protocol version {theirs}, this side {PROTOCOL_VERSION}: upgrade koopmon on {older}",
        )
    try:
        message: AnyMessage = _decoder.decode(header[len(PREFIX) :])
    except msgspec.ValidationError as error:
        raise ProtocolError("schema", one_line(error, 200)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError("garbage", one_line(error, 200)) from None
    _check_header(message)
    return message


def _check_header(message: AnyMessage) -> None:
    """Check the rules that the types of the fields cannot express."""
    _check_finite(message, "$")
    if isinstance(message, Shard):
        if message.first_point + message.num_points > 4097:
            raise ProtocolError("schema", f"points {message.first_point} + {message.num_points} exceed 4097")
        if message.paired and (message.first_point % 2 or message.num_points % 2):
            counts = f"{message.num_points} points from {message.first_point}"
            raise ProtocolError("schema", f"{counts} are no pairs: both numbers must be even")
        _check_observables(message)
    elif isinstance(message, Hello):
        if message.process_rank >= message.world_size:
            raise ProtocolError("schema", f"process_rank {message.process_rank} in a world of {message.world_size}")
    elif isinstance(message, Command):
        for kind, payload in _PAYLOADS.items():
            if (getattr(message, payload) is not None) != (message.kind == kind):
                raise ProtocolError("schema", f"a {kind} command carries {payload}, and no other kind does")
        if message.max_rate is not None and message.kind != "set_lr_scale":
            raise ProtocolError("schema", "max_rate may come with a set_lr_scale command only")
        if message.warmup_steps > 0 and message.max_rate is None:
            raise ProtocolError("schema", "warmup_steps may come with max_rate only")
        if message.corrects and message.kind != "set_ceilings":
            raise ProtocolError("schema", "corrects may come with a set_ceilings command only")
        if message.cadence_until_step is not None and message.kind != "set_cadence":
            raise ProtocolError("schema", "cadence_until_step may come with a set_cadence command only")


def _check_observables(shard: Shard) -> None:
    num_layers = shard.num_layers
    for name, values in shard.observables.items():
        if len(values) != num_layers:
            raise ProtocolError("schema", f"observable {name} has {len(values)} values for {num_layers} transitions")
    if len(shard.observables) * num_layers > MAX_OBSERVATIONS:
        raise ProtocolError("schema", f"{len(shard.observables)} observables of {num_layers} transitions exceed 4096")


def _check_finite(value: Any, path: str) -> None:
    """Reject NaN and infinities outside `UNBOUNDED_SCALARS`, because infinity satisfies a bound such as `>= 0`."""
    if isinstance(value, msgspec.Struct):
        items = [
            (f".{name}", getattr(value, name)) for name in value.__struct_fields__ if name not in UNBOUNDED_SCALARS
        ]
    else:
        items = [("[...]", item) for item in (value.values() if isinstance(value, dict) else value)]
    for name, item in items:
        if isinstance(item, float):
            if not math.isfinite(item):
                raise ProtocolError("schema", f"Expected a finite `float`, got {item} - at `{path}{name}`")
        # Most fields hold texts, integers and None: to leave them out makes the walk twice as fast.
        elif isinstance(item, (msgspec.Struct, dict, list)):
            _check_finite(item, f"{path}{name}")
