"""Monitor under control of the test: real sockets in another thread, or in a process with `python -m`."""

from __future__ import annotations

import argparse
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from koopmon.wire.auth_policy import AuthPolicy
from koopmon.wire.codec import decode_for_monitor, decode_shard, encode
from koopmon.wire.headers import Frame, WireLimits
from koopmon.wire.messages import (
    Ack,
    Applied,
    Command,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Judgement,
    MonitorMessage,
    Probe,
    ProbeReply,
    Refused,
    Shard,
    Welcome,
)
from koopmon.wire.sockets import ControlServer, DataReceiver, Poller
from koopmon.wire.transport import WireContext
from koopmon.wire.wakeup import Wakeup

M = TypeVar("M")
LIMITS = WireLimits()


class ScriptedMonitor:
    """Welcomes every rank, replies to heartbeats, and records messages; `command` sends to rank 0."""

    def __init__(
        self,
        directory: Path,
        *,
        heartbeat_seconds: float = 0.05,
        restore: Applied | None = None,
        refuse: str = "",
        trust: AuthPolicy | None = None,
        clock_offset_seconds: float = 0.0,
        koopmon_version: str = "0",
    ) -> None:
        self.heartbeat_seconds = heartbeat_seconds
        self.restore = restore
        self.judgement: Judgement | None = None
        """Reply to every heartbeat."""
        self.min_stride, self.min_stride_from = 1, 0
        self.refuse = refuse
        self.clock_offset_seconds = clock_offset_seconds
        self.koopmon_version = koopmon_version
        self.heard: list[Any] = []
        self.shards: list[tuple[Shard, Tensor]] = []
        self._trust = trust
        self.endpoint = f"ipc://{directory}/control" if trust is None else "tcp://127.0.0.1:0"
        self._data_endpoint = f"ipc://{directory}/data" if trust is None else "tcp://127.0.0.1:0"
        self._peers: dict[int, bytes] = {}
        self._outbox: list[list[Frame]] = []
        self._wakeup = Wakeup()
        self._stopping = False
        self._bound = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> ScriptedMonitor:
        self._thread.start()
        assert self._bound.wait(10.0), "the monitor could not bind"
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        self._wakeup.wake()
        self._thread.join(10.0)
        self._wakeup.close()

    def _run(self) -> None:
        with (
            WireContext(self._trust) as context,
            ControlServer(context, self.endpoint) as control,
            DataReceiver(context, self._data_endpoint) as data,
        ):
            self.endpoint, self._data_endpoint = control.endpoint, data.endpoint
            self._bound.set()
            poller = Poller(self._wakeup, control, data)
            while not self._stopping:
                poller.wait(0.05)
                while (received := control.recv()) is not None:
                    self._take(control, *received)
                while (frames := data.recv()) is not None:
                    shard = decode_shard(frames, limits=LIMITS)
                    self.shards.append((shard.header, torch.stack(shard.points())))
                while self._outbox and 0 in self._peers:
                    if not control.send(self._peers[0], self._outbox[0]):
                        break  # it reads more slowly
                    del self._outbox[0]

    def _take(self, control: ControlServer, peer: bytes, frames: list[memoryview]) -> None:
        message = decode_for_monitor(frames, limits=LIMITS)
        name: dict[str, Any] = {"run": message.run, "incarnation": message.incarnation}
        answer: MonitorMessage | None = None
        if isinstance(message, Hello):
            self._peers[message.process_rank] = peer
            answer = Welcome(
                data_endpoint=self._data_endpoint,
                heartbeat_seconds=self.heartbeat_seconds,
                restore=self.restore,
                **name,
            )
            if self.refuse:
                answer = Refused(reason=self.refuse, **name)
        elif isinstance(message, Probe):
            answer = ProbeReply(
                koopmon_version=self.koopmon_version,
                torch_version="0",
                time=time.time() + self.clock_offset_seconds,
                data_endpoint=self._data_endpoint,
                run=message.run,
                incarnation=message.incarnation,
            )
        elif isinstance(message, Heartbeat):
            answer = HeartbeatReply(
                **name,
                judgement=self.judgement,
                min_stride=self.min_stride,
                min_stride_from=self.min_stride_from,
            )
        self.heard.append(message)
        if answer is not None:
            control.send(peer, encode(answer))

    def of(self, kind: type[M]) -> list[M]:
        """Return all received messages of one kind, in order."""
        return [message for message in self.heard if isinstance(message, kind)]

    def send(self, *messages: list[Frame]) -> None:
        """Send any frames to rank 0."""
        self._outbox += messages
        self._wakeup.wake()

    def command(self, kind: str, run: str | None = None, **fields: Any) -> str:
        """Send a command to rank 0 of the run with the last hello, or of the named one, and return its id."""
        hello = next(each for each in reversed(self.of(Hello)) if run in (None, each.run))
        values = {
            "run": hello.run,
            "incarnation": hello.incarnation,
            "id": secrets.token_hex(8),
            "reason": "the test says so",
            "expires_step": 1 << 40,
            "kind": kind,
        }
        command = Command(**{**values, **fields})
        self.send(encode(command))
        return command.id

    def ack(self, command_id: str, timeout: float = 20.0) -> Ack:
        """Wait for the ack of a command and return it."""
        return self.wait(lambda: next((ack for ack in self.of(Ack) if ack.command_id == command_id), None), timeout)

    def acked(self, command_id: str) -> bool:
        return any(ack.command_id == command_id for ack in self.of(Ack))

    @staticmethod
    def wait(condition: Callable[[], M | None], timeout: float = 20.0) -> M:
        """Return the result of `condition` once it is true."""
        deadline = time.monotonic() + timeout
        while not (found := condition()):
            assert time.monotonic() < deadline, "the condition stayed false"
            time.sleep(0.005)
        return found


__all__ = ["Ack", "Goodbye", "Heartbeat", "Hello", "ScriptedMonitor", "Shard"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    with ScriptedMonitor(parser.parse_args().directory):
        print("bound", flush=True)
        while True:
            time.sleep(1.0)
