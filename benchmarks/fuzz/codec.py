"""Target codec: frames from a peer, through each receiver, mutated as bytes and as messages.

An input is one byte for the receiver, then each frame after its length (two bytes, little-endian).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from benchmarks.fuzz import check_line
from koopmon.errors import ProtocolError
from koopmon.wire.codec import ReceivedShard, decode, decode_for_agent, decode_for_monitor, decode_shard, encode
from koopmon.wire.headers import PREFIX, REJECTION_REASONS, WireLimits
from koopmon.wire.messages import (
    Ack,
    AnyMessage,
    Applied,
    Command,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Judgement,
    KssSettings,
    Probe,
    ProbeReply,
    Refused,
    Shard,
    TrainingStep,
    Welcome,
)
from tests.factories import hello

LIMITS = WireLimits(max_header_bytes=4096, max_message_bytes=1 << 16, max_frames=32)
RECEIVERS: tuple[Callable[..., Any], ...] = (decode_for_monitor, decode_shard, decode_for_agent, decode)
MAX_FRAME_BYTES = (1 << 16) - 1
NAME: dict[str, Any] = {"run": "job", "incarnation": "aaaaaaaa"}
MESSAGES: tuple[AnyMessage, ...] = (
    hello(
        **NAME,
        world_size=2,
        num_layers=3,
        thresholds={"peak_scale": 0.4},
        kss=KssSettings(alpha=0.1),
        update_exponent=0.5,
    ),
    Heartbeat(
        **NAME,
        process_rank=0,
        training=TrainingStep(step=3, loss=float("nan"), lr_scale=0.5),
        applied=Applied(lr_scale=0.5),
        dropped={"budget": 2},
    ),
    Ack(**NAME, command_id="0123abcd", outcome="applied", step=4, applied=Applied()),
    Goodbye(**NAME, process_rank=1, step=9, reason="finished"),
    Welcome(**NAME, data_endpoint="tcp://127.0.0.1:9", restore=Applied(lr_scale=0.25)),
    Refused(**NAME, reason="too many"),
    HeartbeatReply(**NAME),
    Probe(**NAME, koopmon_version="0"),
    ProbeReply(**NAME, koopmon_version="0", torch_version="0", time=1e9, data_endpoint="tcp://127.0.0.1:9", step=3),
    HeartbeatReply(**NAME, judgement=Judgement(step=7, risk=0.5, near_unit_mass=0.2, decision="x", decision_step=6)),
    Command(**NAME, id="0123abcd", kind="set_lr_scale", reason="risk", expires_step=60, lr_scale=0.5),
    Command(**NAME, id="0123abce", kind="set_kss", reason="risk", expires_step=60, kss=KssSettings(alpha=1.0)),
)
SHARD = Shard(
    **NAME,
    process_rank=0,
    num_senders=1,
    training=TrainingStep(step=2),
    first_point=0,
    num_points=3,
    num_samples=4,
    width=2,
    dtype="bfloat16",
    observables={"entropy": [0.5, None]},
)
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2, 4097, 1 << 20, 1 << 31, 1 << 53, (1 << 63) - 1, 1 << 63, -(1 << 63)),
    *(0.5, -0.0, 1e308, float("nan"), float("inf"), -float("inf"), 5e-324),
    *("", "job", "a" * 129, "job\n", "\x1b[31m", "é" * 64, "transformer", "shard", "hello", "float16", b"", b"\xff"),
    *([], [None] * 9, {}, {"x": {}}, {"lr_scale": 0.1}, {"alpha": 1001.0}),
)


def seeds() -> Iterator[bytes]:
    for message in MESSAGES:
        for receiver in (0, 2):
            yield pack(receiver, [bytes(frame) for frame in encode(message)])
    frames = encode(SHARD, [bytes(16)] * 3)
    for receiver in (1, 3):
        yield pack(receiver, [bytes(frame) for frame in frames])


def pack(receiver: int, frames: Sequence[bytes]) -> bytes:
    """Build the input for these frames at that receiver."""
    return bytes([receiver]) + b"".join(len(frame).to_bytes(2, "little") + frame for frame in frames)


def unpack(data: bytes) -> tuple[int, list[bytes]]:
    """Invert `pack`. A truncated last frame is used as it is."""
    receiver, at = (data[0] if data else 0), 1
    frames = []
    while at + 2 <= len(data):
        length = int.from_bytes(data[at : at + 2], "little")
        frames.append(data[at + 2 : at + 2 + length])
        at += 2 + length
    return receiver, frames


def run(data: bytes) -> str:
    """Decode. An accepted message must encode to the same bytes."""
    receiver, frames = unpack(data)
    try:
        message = RECEIVERS[receiver % len(RECEIVERS)](frames, limits=LIMITS)
    except ProtocolError as error:
        check_line(error.detail, 600)
        return REJECTION_REASONS[REJECTION_REASONS.index(error.reason)]  # the metrics have no other reason
    if isinstance(message, ReceivedShard):
        header = message.header
        points = message.points()
        assert len(points) == header.num_points == len(frames) - 1
        assert sum(point.nbytes for point in points) == sum(map(len, frames[1:])) <= LIMITS.max_message_bytes
        assert all(tuple(point.shape) == (header.num_samples, header.width) for point in points)
        again = encode(header, message.frames)
    else:
        header = message
        again = encode(message)
    back = decode(again, limits=WireLimits())
    twice = encode(back.header, back.frames) if isinstance(back, ReceivedShard) else encode(back)
    assert twice[0] == again[0]
    return str(type(header).__struct_config__.tag)


def mutate(data: bytes, max_size: int, seed: int, mutate_bytes: Callable[[bytes, int], bytes]) -> bytes:
    """Apply one change: to bytes of a frame, to a field of the header, or to the sequence of frames."""
    chance = random.Random(seed)
    receiver, frames = unpack(data)
    if not frames:
        frames = [PREFIX]
    which = chance.randrange(len(frames))
    move = chance.randrange(10)
    if move < 3:
        frames[which] = mutate_bytes(frames[which], MAX_FRAME_BYTES)[:MAX_FRAME_BYTES]
    elif move < 7:
        frames[0] = _with_field(frames[0], chance)
    elif move == 7:
        frames.insert(which, frames[which])
    elif move == 8:
        del frames[which]
    else:
        receiver = chance.randrange(256)
    return pack(receiver, frames)[:max_size]


def _with_field(header: bytes, chance: random.Random) -> bytes:
    """Return the header with one field set to an odd value, removed, or taken from another message."""
    try:
        fields = msgspec.msgpack.decode(header[len(PREFIX) :])
    except (msgspec.DecodeError, RecursionError, TypeError, UnicodeDecodeError):
        fields = None
    if not isinstance(fields, dict):
        return PREFIX + msgspec.msgpack.encode(chance.choice(MESSAGES))
    other = chance.choice((*MESSAGES, SHARD))
    inside = [name for name, value in fields.items() if isinstance(value, dict) and value]
    target = fields[chance.choice(inside)] if inside and chance.random() < 0.3 else fields
    move = chance.randrange(4)
    if move == 0 and target:
        del target[chance.choice(list(target))]
    elif move == 1:
        theirs = msgspec.to_builtins(other)
        name = chance.choice(list(theirs))
        target[name] = theirs[name]
    elif target:
        target[chance.choice(list(target))] = chance.choice(VALUES)
    try:
        return (header[: len(PREFIX)] + msgspec.msgpack.encode(fields))[:MAX_FRAME_BYTES]
    except (OverflowError, RecursionError, TypeError, ValueError):
        return header
