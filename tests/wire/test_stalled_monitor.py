"""A stopped monitor (SIGSTOP) never makes the training side wait."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from koopmon.wire.buffer_pool import BufferPool
from koopmon.wire.codec import encode
from koopmon.wire.messages import Goodbye, Shard, TrainingStep
from koopmon.wire.sockets import ControlClient, DataSender, Poller
from koopmon.wire.transport import WireContext
from tests.factories import num_free

pytestmark = pytest.mark.process

WHO: dict[str, Any] = {"run": "job", "incarnation": "00c0ffee"}
MONITOR = """
import sys, torch
from koopmon.wire.codec import decode_shard
from koopmon.wire.sockets import *
with WireContext() as context:
    server, receiver = ControlServer(context, sys.argv[1]), DataReceiver(context, sys.argv[1])
    print(server.endpoint, receiver.endpoint, flush=True)
    poller = Poller(server, receiver)
    while True:
        poller.wait(60.0)
        while server.recv():
            pass
        while frames := receiver.recv():
            shard = decode_shard(frames, limits=receiver.limits)
            assert (torch.stack(shard.points()) == shard.header.step).all()
            print(shard.header.step, flush=True)
"""


@pytest.fixture(params=["ipc://*", "tcp://127.0.0.1:0"])
def monitor(request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    process = subprocess.Popen([sys.executable, "-c", MONITOR, request.param], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        control, data = process.stdout.readline().split()
        yield process, control, data
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait(20.0)
        process.stdout.close()
        for endpoint in (control, data):
            if endpoint.startswith("ipc://"):
                path = Path(endpoint.removeprefix("ipc://"))
                path.unlink(missing_ok=True)
                path.parent.rmdir()


def bounded(work: Callable[[], None]) -> None:
    """Run `work`, which must not wait, in a thread that may be abandoned."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(10.0)
    assert not thread.is_alive(), "the training side waits for a stopped monitor"
    if failures:
        raise failures[0]


def test_a_stopped_monitor_is_never_waited_for(
    monitor: tuple[subprocess.Popen[str], str, str], until: Callable[..., None]
) -> None:
    process, control, data = monitor
    assert process.stdout is not None
    shape = (2, 512, 512)
    pool = BufferPool(4, 2 * 512 * 512 * 4)

    def shard(step: int) -> Shard:
        return Shard(
            **WHO, process_rank=0, num_senders=1, training=TrainingStep(step=step),
            first_point=0, num_points=2, num_samples=512, width=512,
            dtype="float32",
        )  # fmt: skip

    with WireContext() as context:
        client, sender = ControlClient(context, control), DataSender(context, data)
        until(lambda: client.connected and sender.connected)
        os.kill(process.pid, signal.SIGSTOP)
        outcomes: list[str | None] = []
        handed_over: list[int] = []
        spoken: list[bool] = []

        def train() -> None:
            for step in range(1, 101):
                spoken.append(client.send(encode(Goodbye(**WHO, process_rank=0, step=step))))
                slot = pool.acquire(pool.slot_bytes)
                if slot is None:
                    outcomes.append("no_buffer")
                    continue
                states = slot.tensor(shape, torch.float32).fill_(float(step))
                outcomes.append(sender.send(encode(shard(step), states), slot))
                if outcomes[-1] is None:
                    handed_over.append(step)
                Poller(client, sender).wait(0.001)

        bounded(train)
        assert set(outcomes) <= {None, "queue_full", "no_buffer"}
        assert outcomes.count(None) < 20, "what is under way must stay bounded"
        assert spoken[0]

        os.kill(process.pid, signal.SIGCONT)
        arrived = [int(process.stdout.readline()) for _ in handed_over]
        assert arrived == handed_over, "what had been handed over arrives, unchanged"
        until(lambda: num_free(pool) == 4)
        until(lambda: sender.send(encode(shard(200), torch.full(shape, 200.0))) is None)
        assert int(process.stdout.readline()) == 200


def test_closing_does_not_wait_for_a_stopped_monitor(
    monitor: tuple[subprocess.Popen[str], str, str], until: Callable[..., None]
) -> None:
    process, control, data = monitor
    context = WireContext()
    client, sender = ControlClient(context, control), DataSender(context, data)
    until(lambda: client.connected and sender.connected)
    os.kill(process.pid, signal.SIGSTOP)
    while client.send([bytes(60_000)]):
        pass
    while sender.send([bytes(1 << 22)]) is None:
        pass
    bounded(context.close)
