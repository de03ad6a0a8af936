"""The four sockets over real ipc and tcp, between two contexts."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from zmq.utils import garbage

from koopmon.errors import EndpointError, ProtocolError
from koopmon.wire.buffer_pool import BufferPool
from koopmon.wire.codec import decode_for_agent, decode_for_monitor, decode_shard, encode
from koopmon.wire.headers import WireLimits
from koopmon.wire.messages import Goodbye, HeartbeatReply, Shard, TrainingStep
from koopmon.wire.sockets import COPIED_BYTES, ControlClient, ControlServer, DataReceiver, DataSender, Poller
from koopmon.wire.transport import WireContext
from koopmon.wire.wakeup import Wakeup
from tests.factories import num_free

WHO: dict[str, Any] = {"run": "job", "incarnation": "00c0ffee"}
REPLY = HeartbeatReply(**WHO)
Until = Callable[..., None]


def goodbye(step: int) -> Goodbye:
    return Goodbye(**WHO, process_rank=0, step=step)


def shard(step: int, states: torch.Tensor) -> Shard:
    num_points, num_samples, width = states.shape
    dtype: Any = str(states.dtype).removeprefix("torch.")
    return Shard(
        **WHO, process_rank=0, num_senders=1, training=TrainingStep(step=step), first_point=0, num_points=num_points,
        num_samples=num_samples, width=width, dtype=dtype,
    )  # fmt: skip


def receive(receiver: DataReceiver) -> Any:
    assert receiver in Poller(receiver).wait(20.0)
    frames = receiver.recv()
    assert frames is not None
    return decode_shard(frames, limits=receiver.limits)


@pytest.fixture
def control(near: WireContext, far: WireContext, endpoint: str, until: Until) -> tuple[ControlClient, ControlServer]:
    server = ControlServer(far, endpoint)
    client = ControlClient(near, server.endpoint)
    until(lambda: client.connected)
    return client, server


@pytest.fixture
def data(near: WireContext, far: WireContext, endpoint: str, until: Until) -> tuple[DataSender, DataReceiver]:
    receiver = DataReceiver(far, endpoint)
    sender = DataSender(near, receiver.endpoint)
    until(lambda: sender.connected)
    return sender, receiver


# --- data ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_shard_arrives_bit_for_bit(data: tuple[DataSender, DataReceiver], dtype: torch.dtype) -> None:
    sender, receiver = data
    states = torch.randn(3, 200, 256).to(dtype)
    frames = encode(shard(5, states), states)
    assert sender.send(frames) is None
    received = receive(receiver)
    assert received.header.step == 5
    assert torch.equal(torch.stack(received.points()), states)
    assert torch.equal(torch.stack(received.points()), states)
    assert receiver.recv() is None


def test_a_buffer_is_not_reused_before_the_transport_let_go_of_it(
    near: WireContext, far: WireContext, endpoint: str, until: Until
) -> None:
    receiver = DataReceiver(far, endpoint)
    sender = DataSender(near, receiver.endpoint, queue_length=10)
    until(lambda: sender.connected)
    shape = (2, 512, 1024)
    pool = BufferPool(3, 2 * 512 * 1024 * 4)
    sent: list[int] = []
    arrived: list[int] = []
    starved = 0
    for step in range(1, 120):
        slot = pool.acquire(pool.slot_bytes)
        if slot is None:
            starved += 1
        else:
            states = slot.tensor(shape, torch.float32)
            states.fill_(float(step))
            if sender.send(encode(shard(step, states), states), slot) is None:
                sent.append(step)
        if step % 3 == 0 and (frames := receiver.recv()) is not None:
            received = decode_shard(frames, limits=receiver.limits)
            assert bool((torch.stack(received.points()) == received.header.step).all()), (
                "the buffer was overwritten on its way"
            )
            arrived.append(received.header.step)
    assert starved, "the receiver was meant to be too slow for this pool"
    while len(arrived) < len(sent):
        received = receive(receiver)
        assert bool((torch.stack(received.points()) == received.header.step).all())
        arrived.append(received.header.step)
    assert arrived == sent
    until(lambda: num_free(pool) == 3)


def test_small_frames_free_their_buffer_at_once(
    near: WireContext, far: WireContext, endpoint: str, until: Until
) -> None:
    receiver = DataReceiver(far, endpoint)
    sender = DataSender(near, receiver.endpoint, queue_length=10)
    until(lambda: sender.connected)
    pool, kept = BufferPool(1, 3 * COPIED_BYTES), list(garbage.gc.refs)
    for step in range(1, 5):
        slot = pool.acquire(pool.slot_bytes)
        assert slot is not None, "nothing reads its memory any more"
        states = slot.tensor((3, 64, COPIED_BYTES // 256), torch.float32)
        states.fill_(float(step))
        assert sender.send(encode(shard(step, states), states), slot) is None
        states.fill_(-1.0)
    assert list(garbage.gc.refs) == kept
    for step in range(1, 5):
        received = receive(receiver)
        assert received.header.step == step
        assert bool((torch.stack(received.points()) == step).all())


def test_without_a_monitor_a_send_is_a_drop_and_nothing_queues(
    near: WireContext, endpoint: str, far: WireContext, until: Until
) -> None:
    with WireContext() as gone:
        address = DataReceiver(gone, endpoint).endpoint
    sender = DataSender(near, address)
    pool = BufferPool(1, 1 << 20)
    for step in range(5):
        slot = pool.acquire(1 << 20)
        assert slot is not None, "a drop frees its slot at once"
        states = slot.tensor((1, 512, 512), torch.float32)
        assert sender.send(encode(shard(step, states), states), slot) == "monitor_away"
    receiver = DataReceiver(far, address)
    until(lambda: sender.connected)
    until(lambda: sender.send(encode(shard(99, states), states)) is None)
    assert receive(receiver).header.step == 99


def test_sending_resumes_when_the_monitor_comes_back(near: WireContext, endpoint: str, until: Until) -> None:
    states = torch.ones(4, 64, 64)
    with WireContext() as far:
        address = DataReceiver(far, endpoint).endpoint
    sender = DataSender(near, address)
    for life in range(1, 4):
        frames = encode(shard(life, states), states)
        with WireContext() as far:
            receiver = DataReceiver(far, address)
            until(lambda frames=frames: sender.send(frames) is None)
            until(lambda life=life: sender.connections == life)  # a send may come before the event of its connection
            assert receive(receiver).header.step == life
        until(lambda: not sender.connected)
        assert sender.send(frames) == "monitor_away"


def test_what_arrives_is_whole_although_receivers_die_in_mid_message(
    near: WireContext, tmp_path: Path, until: Until
) -> None:
    address = f"ipc://{tmp_path}/run/data"
    states = torch.ones(24, 64, 300)
    stop = threading.Event()
    outcomes: set[str | None] = set()

    def send() -> None:
        with DataSender(near, address) as sender:
            step = 0
            while not stop.is_set():
                step += 1
                outcomes.add(sender.send(encode(shard(step, states), states)))
                time.sleep(0.0005)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        for _ in range(12):
            with WireContext() as far:
                receiver = DataReceiver(far, address)
                for _ in range(5):
                    assert bool((torch.stack(receive(receiver).points()) == 1).all())
    finally:
        stop.set()
        thread.join()
    assert {None, "monitor_away"} <= outcomes


def test_a_message_whose_receiver_died_halfway_takes_no_other_with_it(
    near: WireContext, tmp_path: Path, until: Until
) -> None:
    address = f"ipc://{tmp_path}/run/data"
    states = torch.ones(3, 2, 2)
    doomed = WireContext()
    DataReceiver(doomed, address)
    sender = DataSender(near, address)
    until(lambda: sender.connected)

    class DyingMidway(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            frames = super().__iter__()
            yield next(frames)
            doomed.close()
            until(lambda: not sender.connected)
            yield from frames

    sender._offer(DyingMidway(encode(shard(1, states), states)))
    with WireContext() as far:
        receiver = DataReceiver(far, address)
        until(lambda: sender.connected)
        assert sender.send(encode(shard(2, states), states)) is None
        assert receive(receiver).header.step == 2


def test_a_full_queue_is_a_drop(data: tuple[DataSender, DataReceiver]) -> None:
    sender, receiver = data
    states = torch.ones(1, 1024, 1024)
    outcomes = [sender.send(encode(shard(step, states), states)) for step in range(60)]
    assert set(outcomes) == {None, "queue_full"}
    assert receive(receiver).header.step == 0, "the oldest come first"


def test_too_many_frames_are_refused_and_the_next_message_is_not(
    near: WireContext, far: WireContext, until: Until
) -> None:
    receiver = DataReceiver(far, "tcp://127.0.0.1:0", limits=WireLimits(max_frames=3))
    sender = DataSender(near, receiver.endpoint)
    until(lambda: sender.connected)
    states = torch.ones(3, 2, 2)
    assert sender.send(encode(shard(1, states), states)) is None
    assert sender.send(encode(shard(2, states[:2]), states[:2])) is None
    Poller(receiver).wait(20.0)
    with pytest.raises(ProtocolError, match=r"^size: 4 frames, at most 3"):
        receiver.recv()
    assert receive(receiver).header.step == 2


def test_a_frame_beyond_the_limit_is_never_received(near: WireContext, far: WireContext, until: Until) -> None:
    receiver = DataReceiver(far, "tcp://127.0.0.1:0", limits=WireLimits(max_message_bytes=1 << 16))
    sender = DataSender(near, receiver.endpoint)
    until(lambda: sender.connected)
    large, small = torch.ones(1, 200, 200), torch.ones(1, 2, 2)
    assert sender.send(encode(shard(1, large), large)) is None
    until(lambda: sender.connections == 2)  # closed, and connected again
    until(lambda: sender.send(encode(shard(2, small), small)) is None)
    assert receive(receiver).header.step == 2


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", [DataReceiver, ControlServer])
def test_a_socket_that_cannot_be_made_keeps_its_context_from_nothing(kind: Any) -> None:
    """libzmq refuses a limit of 2**63, and would wait at the end for an open socket."""
    context = WireContext()
    with pytest.raises((OverflowError, EndpointError)):
        kind(context, "tcp://127.0.0.1:0", limits=WireLimits(max_header_bytes=1 << 63, max_message_bytes=1 << 63))
    with pytest.raises(EndpointError):
        kind(context, "tcp://192.0.2.1:1")
    context.close()


def test_received_memory_is_freed_without_the_garbage_collector(data: tuple[DataSender, DataReceiver]) -> None:
    sender, receiver = data
    states = torch.ones(1, 300, 300)
    sender.send(encode(shard(1, states), states))
    gc.disable()
    try:
        received = receive(receiver)
        watch = weakref.ref(received.frames[0].obj)
        assert watch() is not None
        del received
        assert watch() is None
    finally:
        gc.enable()


# --- control ---


def test_messages_pass_both_ways(control: tuple[ControlClient, ControlServer]) -> None:
    client, server = control
    assert client.recv() is None
    assert server.recv() is None
    assert client.send(encode(goodbye(3)))
    assert Poller(server).wait(20.0) == [server]
    request = server.recv()
    assert request is not None
    peer, frames = request
    assert decode_for_monitor(frames, limits=server.limits) == goodbye(3)
    assert server.send(peer, encode(REPLY))
    assert Poller(client).wait(20.0) == [client]
    answer = client.recv()
    assert answer is not None
    assert decode_for_agent(answer, limits=client.limits) == REPLY


def test_an_unknown_peer_is_told_not_silently_dropped(control: tuple[ControlClient, ControlServer]) -> None:
    assert control[1].send(b"nobody", encode(REPLY)) is False


def test_a_peer_that_left_is_told(control: tuple[ControlClient, ControlServer], until: Until) -> None:
    client, server = control
    client.send(encode(goodbye(1)))
    Poller(server).wait(20.0)
    request = server.recv()
    assert request is not None
    client.close()
    until(lambda: not server.send(request[0], encode(REPLY)))


def test_a_new_connection_is_seen_so_that_hello_can_be_said_again(
    near: WireContext, endpoint: str, until: Until
) -> None:
    with WireContext() as far:
        address = ControlServer(far, endpoint).endpoint
        client = ControlClient(near, address)
        until(lambda: client.connections == 1)
    until(lambda: not client.connected)
    assert client.send(encode(goodbye(1))) is False
    with WireContext() as far:
        server = ControlServer(far, address)
        assert client in Poller(client).wait(20.0), "the poller wakes on a new connection"
        until(lambda: client.connections == 2)
        until(lambda: client.send(encode(goodbye(2))))
        Poller(server).wait(20.0)
        request = server.recv()
        assert request is not None
        assert decode_for_monitor(request[1], limits=server.limits) == goodbye(2), "nothing queued while it was away"


def test_reconnect_makes_a_new_connection(control: tuple[ControlClient, ControlServer], until: Until) -> None:
    client, server = control
    peers = set()
    for number in (1, 2, 3):
        until(lambda: client.connected and client.send(encode(goodbye(1))))
        assert client.connections == number
        Poller(server).wait(20.0)
        request = server.recv()
        assert request is not None
        peers.add(request[0])
        client.reconnect()
    assert len(peers) == 3


def test_last_words_are_heard_although_their_sender_closes(control: tuple[ControlClient, ControlServer]) -> None:
    client, server = control
    words = 0
    while words < 50 and client.send([bytes(60_000)]):
        words += 1
    client._owner.close()
    for _ in range(words):
        Poller(server).wait(20.0)
        request = server.recv()
        assert request is not None
        assert len(request[1][0]) == 60_000


def test_strangers_do_not_disturb(near: WireContext, far: WireContext, until: Until) -> None:
    server = ControlServer(far, "tcp://127.0.0.1:0")
    port = int(server.endpoint.rsplit(":", 1)[1])
    for greeting in (b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 16, b"\xff" + bytes(8) + b"\x7f" + bytes(300), b""):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(greeting)
    client = ControlClient(near, server.endpoint)
    until(lambda: client.send(encode(goodbye(1))))
    assert Poller(server).wait(20.0) == [server]
    assert server.recv() is not None


def test_the_control_channel_refuses_large_and_many_framed_messages(
    control: tuple[ControlClient, ControlServer], until: Until
) -> None:
    client, server = control
    assert client.send([b"a", b"b", b"c"])
    Poller(server).wait(20.0)
    with pytest.raises(ProtocolError, match=r"^size: "):
        server.recv()
    client.send([bytes(2 * server.limits.max_header_bytes + 1)])
    until(lambda: client.connections == 2)
    until(lambda: client.send(encode(goodbye(2))))
    Poller(server).wait(20.0)
    request = server.recv()
    assert request is not None
    assert decode_for_monitor(request[1], limits=server.limits) == goodbye(2)


# --- waiting ---


def test_a_waker_wakes_from_another_thread_once_for_many_calls(data: tuple[DataSender, DataReceiver]) -> None:
    with contextlib.closing(Wakeup()) as wakeup:
        poller = Poller(data[1], wakeup)
        thread = threading.Timer(0.05, lambda: [wakeup.wake() for _ in range(100_000)])
        thread.start()
        assert poller.wait(20.0) == [wakeup]
        thread.join()
        poller.wait(0.0)
        assert poller.wait(0.0) == []


def test_a_waker_wakes_from_a_signal_handler() -> None:
    with contextlib.closing(Wakeup()) as wakeup:
        before = signal.signal(signal.SIGUSR1, lambda *_: wakeup.wake())
        try:
            threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGUSR1)).start()
            assert Poller(wakeup).wait(20.0) == [wakeup]
        finally:
            signal.signal(signal.SIGUSR1, before)


def test_a_closed_waker_is_quiet() -> None:
    wakeup = Wakeup()
    poller = Poller(wakeup)
    wakeup.close()
    wakeup.close()
    wakeup.wake()
    assert poller.wait(0.0) == []


def test_a_poller_waits_on_all_and_forgets_what_left(near: WireContext, far: WireContext, endpoint: str) -> None:
    server = ControlServer(far, endpoint)
    client = ControlClient(near, server.endpoint)
    poller = Poller(client)
    assert poller.wait(20.0) == [client], "its peer was found"
    assert poller.wait(0.01) == [], "which is news once"
    assert client.connections == 1
    poller.register(server)
    client.send(encode(goodbye(1)))
    assert poller.wait(20.0) == [server]
    poller.unregister(server)
    poller.unregister(server)
    assert poller.wait(0.0) == []


# --- ends ---


def test_closing_is_idempotent_and_final(near: WireContext, endpoint: str, far: WireContext) -> None:
    server = ControlServer(far, endpoint)
    client = ControlClient(near, server.endpoint)
    sender = DataSender(near, server.endpoint)
    pool = BufferPool(1, 8)
    for _ in range(2):
        client.close()
        sender.close()
        near.close()
    for call in (client.recv, lambda: client.connected, client.reconnect, lambda: client.send([b""])):
        with pytest.raises(EndpointError, match="closed"):
            call()
    with pytest.raises(EndpointError, match="closed"):
        sender.send([b""], pool.acquire(8))
    assert num_free(pool) == 1
    with pytest.raises(EndpointError, match="closed"):
        ControlClient(near, server.endpoint)


FORK = """
import gc, os, sys, warnings
from koopmon.errors import KoopmonError
from koopmon.wire.sockets import *
from koopmon.wire.transport import ForkedChildError
far, near = WireContext(), WireContext()
server, receiver = ControlServer(far, sys.argv[1] + "c"), DataReceiver(far, sys.argv[1] + "d")
client, sender, waker = ControlClient(near, server.endpoint), DataSender(near, receiver.endpoint), Wakeup()
while not (client.connected and sender.connected):
    Poller(client, sender).wait(1.0)
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # later Pythons warn of a fork beside threads
    pid = os.fork()
calls = {
    "client.send": lambda: client.send([b"x"]),
    "client.recv": client.recv,
    "client.connected": lambda: client.connected,
    "client.reconnect": client.reconnect,
    "sender.send": lambda: sender.send([b"x"]),
    "server.recv": server.recv,
    "server.send": lambda: server.send(b"x", [b"x"]),
    "receiver.recv": receiver.recv,
    "poll": lambda: Poller(client).wait(0.0),
    "new": lambda: ControlClient(near, server.endpoint),
}
if pid == 0:
    waker.wake()
    for name, call in calls.items():
        try:
            call()
        except ForkedChildError as error:
            assert isinstance(error, KoopmonError)
        else:
            sys.exit(f"{name} worked in the child")
    if "close" in sys.argv:
        near.close()
        far.close()
        del client, sender, server, receiver, near, far, calls
        gc.collect()
    sys.exit(0)
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
assert status == 0, status
assert Poller(waker).wait(0.0) == [], "the child woke its parent"
assert client.send([b"still mine"]) and sender.send([b"and this"]) is None
assert Poller(server).wait(20.0) and bytes(server.recv()[1][0]) == b"still mine"
assert Poller(receiver).wait(20.0) and bytes(receiver.recv()[0]) == b"and this"
near.close()
far.close()
print("parent unharmed")
"""


@pytest.mark.process
@pytest.mark.parametrize("ending", ["close", "exit"])
def test_a_forked_child_is_refused_and_harms_no_one(ending: str, tmp_path: Path) -> None:
    script = [sys.executable, "-c", FORK, f"ipc://{tmp_path}/run/", ending]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "parent unharmed\n", "")


UNCLOSED = """
import sys, threading, time
from koopmon.wire.buffer_pool import BufferPool
from koopmon.wire.sockets import *
def use():
    global kept
    context = WireContext()
    client, sender = ControlClient(context, sys.argv[1]), DataSender(context, sys.argv[2], queue_length=10)
    kept = context, client, sender
    while not (client.connected and sender.connected):
        Poller(client, sender).wait(1.0)
    pool = BufferPool(4, 1 << 24)
    for _ in range(3):
        client.send([b"x"])
        slot = pool.acquire(1 << 24)
        sender.send([slot.tensor((1 << 24,), __import__("torch").uint8).numpy().data], slot)
        del slot
    del pool
    ready.set()
    while "daemon" in sys.argv:
        Poller(client, sender).wait(0.001)
ready = threading.Event()
if sys.argv[3] == "main":
    use()
else:
    threading.Thread(target=use, daemon=sys.argv[3] == "daemon").start()
ready.wait()
"""


@pytest.mark.process
@pytest.mark.parametrize("user", ["main", "ended", "daemon"])
def test_a_process_that_forgets_to_close_ends_well(user: str, far: WireContext) -> None:
    """With half-sent messages, freeing their memory under the transport would abort the process."""
    server, receiver = ControlServer(far, "ipc://*"), DataReceiver(far, "tcp://127.0.0.1:0")
    script = [sys.executable, "-c", UNCLOSED, server.endpoint, receiver.endpoint, user]
    process = subprocess.Popen(script, stderr=subprocess.PIPE, text=True)
    assert process.communicate(timeout=120) == (None, "")
    assert process.returncode == 0


def test_a_wakeup_that_is_forgotten_gives_its_descriptor_back() -> None:
    wakeup = Wakeup()
    descriptor = wakeup.fileno()
    os.fstat(descriptor)
    del wakeup
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_closed_wakeup_ignores_calls() -> None:
    wakeup = Wakeup()
    wakeup.wake()
    wakeup.close()
    wakeup.close()
    wakeup.wake()
    assert wakeup.fileno() == -1
