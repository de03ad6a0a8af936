"""Peers that flood and are then killed by SIGKILL: agents that flood a monitor, or a monitor that floods agents.

Each is a separate process, forked from one that has all imports, so that a cycle takes no longer than its flood. They
have thousands of ZMTP heartbeats per second, as koopmon's sockets once had. libzmq 4.3.5 aborts a process that has the
PINGs of a dead peer in a full queue.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

import zmq

from koopmon.wire import client, server, sockets
from koopmon.wire.headers import decode_header, encode_header
from koopmon.wire.messages import Applied, Heartbeat, HeartbeatReply, Hello, Shard, TrainingStep, Welcome
from koopmon.wire.sockets import ControlClient, ControlServer, DataSender, Poller
from koopmon.wire.transport import WireContext

ROOT = Path(__file__).resolve().parents[1]
NUM_AGENTS = 8
MAX_REPLIES = 1000
"""Messages to one agent. With about twice as many, the agent would close the connection for a while."""
PATIENCE_SECONDS = 20.0


class Flooders:
    """Parent process of the flooders. Each call takes as long as its flood."""

    def __enter__(self) -> Self:
        command = [sys.executable, "-c", "from benchmarks.flooders import serve; serve()"]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def agents(self, endpoint: str, seconds: float) -> int:
        """Flood the monitor at `endpoint` on both channels with agents; return the number of messages."""
        return self._flood("agents", endpoint, seconds)

    def monitor(self, endpoint: str, seconds: float) -> int:
        """Listen at `endpoint` in the monitor's place, and flood connected peers with unrelated replies."""
        return self._flood("monitor", endpoint, seconds)

    def _flood(self, kind: str, endpoint: str, seconds: float) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([kind, endpoint, seconds]) + "\n")
        told = self._process.stdout.readline()
        if not told.strip():
            raise RuntimeError(f"the process of the flooders ended with {self._process.wait()}")
        return int(told)


def serve() -> None:
    """Process behind `Flooders`: it reads one order per line and replies with the number of messages."""
    for line in sys.stdin:
        kind, endpoint, seconds = json.loads(line)
        shared = mmap.mmap(-1, 8)
        sent = memoryview(shared).cast("Q")
        pid = os.fork()  # the process has no state of libzmq yet
        if pid == 0:
            try:
                {"agents": _agents, "monitor": _monitor}[kind](endpoint, sent)
            finally:
                os._exit(1)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not sent[0] and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        print(sent[0], flush=True)


def _ping() -> None:
    for options in (client.CLIENT, server.SERVER, sockets._CONTROL):
        options |= {zmq.HEARTBEAT_IVL: 1, zmq.HEARTBEAT_TIMEOUT: 60_000}


def _agents(endpoint: str, sent: memoryview[int]) -> None:
    _ping()
    context = WireContext()
    agents = [ControlClient(context, endpoint) for _ in range(NUM_AGENTS)]
    data, frames = None, []
    for number, agent in enumerate(agents):
        name: dict[str, Any] = {"run": f"flood-{number}", "incarnation": "f" * 8}
        hello = Hello(
            **name,
            process_rank=0,
            world_size=1,
            num_senders=1,
            adapter="flood",
            num_layers=1,
            width=4,
            acts=False,
            step=0,
            applied=Applied(),
            koopmon_version="0",
            torch_version="0",
        )
        _until_sent(agent, encode_header(hello))
        said = Heartbeat(**name, process_rank=0, training=TrainingStep(step=1), applied=Applied())
        frames.append([encode_header(said)])
    poller = Poller(*agents)
    shape: dict[str, Any] = {
        "training": TrainingStep(step=1),
        "first_point": 0,
        "num_points": 2,
        "num_samples": 4,
        "width": 4,
        "dtype": "float16",
    }
    shard = Shard(run="flood-0", incarnation="f" * 8, process_rank=0, num_senders=1, **shape)
    snapshot = [encode_header(shard), bytes(32), bytes(32)]
    while True:
        for agent, beat in zip(agents, frames, strict=True):
            for _ in range(20):
                sent[0] += agent.send(beat)
            while (answer := agent.recv()) is not None:
                if data is None and isinstance(told := decode_header(answer[0]), Welcome):
                    data = DataSender(context, told.data_endpoint, queue_length=64)
        for _ in range(20 if data is not None else 0):
            assert data is not None
            sent[0] += data.send(snapshot) is None
        poller.wait(0.0)


def _until_sent(agent: ControlClient, frame: bytes) -> None:
    poller = Poller(agent)
    while not agent.send([frame]):
        poller.wait(0.05)


def _monitor(endpoint: str, sent: memoryview[int]) -> None:
    _ping()
    context = WireContext()
    control = ControlServer(context, endpoint)
    poller = Poller(control)
    reply = [encode_header(HeartbeatReply(run="nobody", incarnation="f" * 8))]
    peers: dict[bytes, int] = {}
    while True:
        poller.wait(0.0 if peers else 0.1)
        while (heard := control.recv()) is not None:
            peers.setdefault(heard[0], MAX_REPLIES)
        for peer, left in peers.items():
            while left and control.send(peer, reply):
                left -= 1
                sent[0] += 1
            peers[peer] = left
