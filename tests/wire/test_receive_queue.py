"""Receive queue: in order, fair between peers, and bounded for any sender."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from koopmon.errors import ProtocolError
from koopmon.wire.codec import encode
from koopmon.wire.headers import WireLimits
from koopmon.wire.messages import Goodbye
from koopmon.wire.receive_queue import ReceiveQueue
from koopmon.wire.sockets import ControlClient, ControlServer, DataReceiver, DataSender, Poller
from koopmon.wire.transport import WireContext


def drain(queue: ReceiveQueue[str, Any]) -> list[tuple[str, Any]]:
    found = []
    while (each := queue.pop()) is not None:
        found.append(each)
    return found


def test_each_peers_messages_keep_their_order_and_the_peers_take_turns() -> None:
    queue: ReceiveQueue[str, int] = ReceiveQueue(1000)
    for number in range(4):
        queue.put("a", number, 1)
    queue.put("b", 10, 1)
    queue.put("c", 20, 1)
    queue.put("c", 21, 1)
    assert len(queue) == 3
    assert drain(queue) == [("a", 0), ("b", 10), ("c", 20), ("a", 1), ("c", 21), ("a", 2), ("a", 3)]
    assert (len(queue), queue.pop()) == (0, None)


def test_a_peer_beyond_its_share_has_no_room_and_the_others_have() -> None:
    queue: ReceiveQueue[str, int] = ReceiveQueue(100)
    queue.put("flood", 0, 100)
    assert not queue.has_room("flood")
    assert queue.has_room("honest")
    queue.put("honest", 1, 30)
    assert queue.has_room("honest")
    assert not queue.has_room("flood")
    assert queue.pop() == ("flood", 0)
    assert queue.has_room("flood"), "there is room for everybody again"


@pytest.mark.parametrize("seed", range(5))
def test_what_is_kept_is_bounded_whoever_sends(seed: int) -> None:
    chance, most, largest = random.Random(seed), 10_000, 700
    queue: ReceiveQueue[int, int] = ReceiveQueue(most)
    held = 0
    for _ in range(20_000):
        peer = chance.choice([0, 0, 0, chance.randrange(40)])
        size = chance.randrange(1, largest)
        if queue.has_room(peer):
            queue.put(peer, size, size)
            held += size
        if chance.random() < 0.2 and (found := queue.pop()) is not None:
            held -= found[1]
        assert held <= 2 * most + 40 * largest
    assert held == sum(size for _, size in drain(queue))  # type: ignore[arg-type]
    assert queue._held == {}


def test_a_flood_is_dropped_and_counted_and_an_honest_peer_loses_nothing(
    near: WireContext, far: WireContext, endpoint: str, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("koopmon.wire.sockets._MAX_WAITING_CONTROL_BYTES", 100_000)
    server = ControlServer(far, endpoint)
    loud, honest = (ControlClient(near, server.endpoint) for _ in range(2))
    until(lambda: loud.connected and honest.connected)
    poller, refusals, sent = Poller(server), [], 0
    while not refusals:
        sent += loud.send([b"x" * 200])
        poller.wait(0.0)
        refusals = server.take_refusals()
    for step in range(20):
        assert honest.send(encode(Goodbye(run="job", incarnation="00c0ffee", process_rank=0, step=step)))
        loud.send([b"x" * 200])
        poller.wait(0.01)
    heard = []
    while len([each for each in heard if len(each) < 200]) < 20:
        poller.wait(1.0)
        while (received := server.recv()) is not None:
            heard.append(bytes(received[1][0]))
    assert {refusal.reason for refusal in refusals} == {"flood"}
    assert sum(refusal.number for refusal in refusals) < sent


def test_a_poller_does_not_wait_while_something_was_taken_that_nobody_read(
    near: WireContext, far: WireContext, until: Any
) -> None:
    server = ControlServer(far, "tcp://127.0.0.1:0")
    client = ControlClient(near, server.endpoint)
    until(lambda: client.connected)
    assert client.send([b"x"])
    assert Poller(server).wait(20.0) == [server]
    assert server._socket.poll(0) == 0, "the transport has nothing more"
    began = time.monotonic()
    assert Poller(server).wait(20.0) == [server]
    assert time.monotonic() - began < 10.0
    assert server.recv() is not None
    assert Poller(server).wait(0.0) == []


def test_what_is_too_long_takes_its_turn_as_an_error(
    near: WireContext, far: WireContext, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("koopmon.wire.sockets._MIN_WAITING_BYTES", 1 << 20)
    receiver = DataReceiver(far, "tcp://127.0.0.1:0", limits=WireLimits(max_message_bytes=1 << 20))
    sender = DataSender(near, receiver.endpoint)
    until(lambda: sender.send([b"first"]) is None)
    until(lambda: sender.send([b"x"] * (receiver.limits.max_frames + 1)) is None)
    until(lambda: sender.send([b"last"]) is None)
    heard: list[Any] = []
    while len(heard) < 3:
        Poller(receiver).wait(1.0)
        try:
            frames = receiver.recv()
        except ProtocolError as error:
            heard.append(error.reason)
        else:
            heard += [] if frames is None else [bytes(frames[0])]
    assert heard == [b"first", "size", b"last"]


def test_a_connection_that_has_no_name_is_read_as_any_other(
    near: WireContext, far: WireContext, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libzmq has none if the peer was gone before its connection was accepted."""
    monkeypatch.setattr("zmq.SRCFD", 99)
    receiver = DataReceiver(far, "tcp://127.0.0.1:0")
    sender = DataSender(near, receiver.endpoint)
    until(lambda: sender.send([b"x"]) is None)
    Poller(receiver).wait(20.0)
    assert receiver.recv() is not None
