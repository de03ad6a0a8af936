"""Attacks on a monitor's ports: one function for each kind, which may keep connections open."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from benchmarks.fuzz import codec
from koopmon.wire.codec import encode
from koopmon.wire.headers import PREFIX
from koopmon.wire.messages import AnyMessage

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
PING = b"\x04\x07\x04PING\0\0"
"""A heartbeat of ZMTP 3.1."""
MAX_HELD = 160
"""Number of connections that stay open and silent; a further one closes the oldest."""


@dataclass
class Ports:
    """Addresses of the monitor, and open connections."""

    control: tuple[str, int]
    data: tuple[str, int]
    http: tuple[str, int]
    chance: random.Random
    held: list[socket.socket] = field(default_factory=list)

    def channel(self) -> tuple[tuple[str, int], bytes]:
        """One of the ZeroMQ ports, and the socket type of its peers."""
        return self.chance.choice([(self.control, b"DEALER"), (self.data, b"PUSH")])

    def hold(self, connection: socket.socket) -> None:
        self.held.append(connection)
        while len(self.held) > MAX_HELD:
            self.held.pop(0).close()

    def release(self) -> None:
        while self.held:
            self.held.pop().close()


def connect(address: tuple[str, int]) -> socket.socket:
    connection = socket.create_connection(address, timeout=10.0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return connection


def frame(content: bytes, *, more: bool = False, length: int | None = None) -> bytes:
    """Build a ZMTP frame; `length` is the length in its header."""
    return bytes([2 | more]) + (len(content) if length is None else length).to_bytes(8, "big") + content


def ready(kind: bytes, extra: bytes = b"") -> bytes:
    body = b"\x05READY\x0bSocket-Type" + len(kind).to_bytes(4, "big") + kind + extra
    return b"\x04" + bytes([len(body)]) + body if len(body) < 256 else b"\x06" + len(body).to_bytes(8, "big") + body


def speak(address: tuple[str, int], *pieces: bytes, wait: bool = False) -> socket.socket:
    """Send the pieces, each in its own packet; with `wait`, first receive the greeting of the other side."""
    connection = connect(address)
    try:
        for index, piece in enumerate(pieces):
            connection.sendall(piece)
            if wait and index == 0:
                connection.recv(64)
    except OSError:
        connection.close()
        raise
    return connection


def message(address: tuple[str, int], kind: bytes, frames: Sequence[bytes]) -> None:
    """Send a whole message as a valid ZeroMQ peer."""
    body = b"".join(frame(part, more=index < len(frames) - 1) for index, part in enumerate(frames))
    connection = speak(address, GREETING, ready(kind), body, wait=True)
    connection.settimeout(0.05)
    with connection, contextlib.suppress(TimeoutError):
        connection.recv(4096)


def garbage(ports: Ports) -> None:
    speak(ports.channel()[0], os.urandom(ports.chance.randrange(1, 4096))).close()


def another_protocol(ports: Ports) -> None:
    speak(ports.channel()[0], b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n").close()
    speak(ports.http, GREETING + ready(b"DEALER")).close()


def wrong_greeting(ports: Ports) -> None:
    bad = bytearray(GREETING)
    bad[ports.chance.randrange(len(bad))] ^= ports.chance.randrange(1, 256)
    speak(ports.channel()[0], bytes(bad), ready(b"DEALER")).close()


def wrong_socket(ports: Ports) -> None:
    extra = os.urandom(ports.chance.randrange(0, 2000))
    speak(ports.channel()[0], GREETING, ready(ports.chance.choice([b"SUB", b"XXX", b"", b"REQ"]), extra)).close()


def half_greeting(ports: Ports) -> None:
    ports.hold(speak(ports.channel()[0], GREETING[: ports.chance.randrange(1, 64)]))


def half_frame(ports: Ports) -> None:
    address, kind = ports.channel()
    said = ports.chance.choice([100, 1 << 16, (1 << 20) + 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])
    ports.hold(speak(address, GREETING, ready(kind), frame(b"koopmon\x03", length=said), wait=True))


def many_frames(ports: Ports) -> None:
    address, kind = ports.channel()
    count = ports.chance.choice([2, 40, 5000, 20_000])
    message(address, kind, [b"koopmon\x03"] * count)


def endless_message(ports: Ports) -> None:
    address, kind = ports.channel()
    with speak(address, GREETING, ready(kind), wait=True) as connection:
        for _ in range(8):
            connection.sendall(frame(bytes(1000), more=True) * 100)


def ping_and_die(ports: Ports) -> None:
    """Send more than one read, with heartbeats, and reset the connection: libzmq may abort."""
    address, kind = ports.channel()
    burst = frame(b"koopmon\x03") * ports.chance.randrange(1, 300) + PING
    with speak(address, GREETING, ready(kind), wait=True) as connection:
        connection.sendall(burst * ports.chance.randrange(1, 5))


def oversized(ports: Ports) -> None:
    message(ports.data, b"PUSH", [PREFIX + bytes(1 << 17)])
    message(ports.control, b"DEALER", [PREFIX + bytes(1 << 17)])


def mutated(ports: Ports) -> None:
    """Send messages that are nearly valid."""
    seeds = list(codec.seeds())
    data = ports.chance.choice(seeds)
    for _ in range(ports.chance.randrange(1, 4)):
        data = codec.mutate(
            data, 1 << 14, ports.chance.randrange(1 << 30), lambda piece, _: _flipped(piece, ports.chance)
        )
    receiver, frames = codec.unpack(data)
    if frames:
        address, kind = [(ports.control, b"DEALER"), (ports.data, b"PUSH"), ports.channel()][min(receiver, 2)]
        message(address, kind, frames)


def _flipped(piece: bytes, chance: random.Random) -> bytes:
    changed = bytearray(piece or b"\0")
    changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def liar(ports: Ports) -> None:
    """Send valid messages that contradict each other: another's run, an ack without a command, repeated and late
    shards.
    """
    name = {"run": f"liar-{ports.chance.randrange(100)}", "incarnation": f"{ports.chance.randrange(1 << 32):08x}"}
    hello = msgspec.structs.replace(codec.MESSAGES[0], **name)
    control = speak(ports.control, GREETING, ready(b"DEALER"), _framed(hello), wait=True)
    ports.hold(control)
    control.recv(4096)  # its own value, or the answer
    control.sendall(_framed(msgspec.structs.replace(codec.MESSAGES[2], **name)))
    beat = msgspec.structs.replace(codec.MESSAGES[1], **name)
    message(ports.control, b"DEALER", [bytes(part) for part in encode(beat)])
    later = msgspec.structs.replace(hello, incarnation="f" * 8)
    control.sendall(_framed(later) + _framed(beat) + _framed(hello))
    data = speak(ports.data, GREETING, ready(b"PUSH"), wait=True)
    ports.hold(data)
    for step, senders, rank in ((5, 2, 0), (5, 2, 0), (5, 3, 1), (5, 2, 1), (5, 2, 0)):
        shard = msgspec.structs.replace(
            codec.SHARD,
            run=name["run"],
            incarnation="f" * 8,
            training=msgspec.structs.replace(codec.SHARD.training, step=step),
            num_senders=senders,
            process_rank=rank,
        )
        data.sendall(_framed(shard, [bytes(16)] * 3))


def _framed(said: AnyMessage, tensors: Sequence[bytes] = ()) -> bytes:
    frames = [bytes(part) for part in encode(said, tensors)]
    return b"".join(frame(part, more=index < len(frames) - 1) for index, part in enumerate(frames))


def half_request(ports: Ports) -> None:
    ports.hold(speak(ports.http, b"GET /metrics HTTP/1.1\r\nHost: a\r\nX: " + b"a" * ports.chance.randrange(100)))


def long_head(ports: Ports) -> None:
    with contextlib.suppress(ConnectionError):
        speak(ports.http, b"GET / HTTP/1.1\r\nX: " + b"a" * (1 << 20)).close()


def bad_chunk(ports: Ports) -> None:
    speak(ports.http, b"POST /metrics HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n").close()


def no_reader(ports: Ports) -> None:
    ports.hold(speak(ports.http, b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n" * 50))


MISCONDUCT: tuple[Callable[[Ports], None], ...] = (
    *(garbage, another_protocol, wrong_greeting, wrong_socket, half_greeting, half_frame, many_frames),
    *(
        endless_message,
        ping_and_die,
        oversized,
        mutated,
        mutated,
        mutated,
        liar,
        liar,
        half_request,
        long_head,
        bad_chunk,
        no_reader,
    ),
)
