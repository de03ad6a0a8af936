"""A monitor's service without sockets, two runs and a clock, with the sent messages and the output of the sinks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import torch
from prometheus_client import CollectorRegistry

from koopmon.config import from_mapping
from koopmon.errors import ProtocolError
from koopmon.history.writer import HistoryWriter
from koopmon.monitor.assembler import Snapshot
from koopmon.monitor.engine import DropReason, Engine, Result
from koopmon.monitor.failures import Failures
from koopmon.monitor.http.live_state import LiveState
from koopmon.monitor.rejection_log import RejectionLog
from koopmon.monitor.service import Outputs, Service
from koopmon.spectral import profile_states
from koopmon.telemetry.metrics import Metrics
from koopmon.wire.codec import ReceivedShard, encode
from koopmon.wire.messages import Ack, Applied, Command, Goodbye, Heartbeat, Hello, MonitorMessage, Shard
from tests.factories import gathered

BAD, GOOD = "bad", "good"
INCARNATION = "aaaaaaaa"
FRAME = bytes(2 * 2 * 2)
PROFILE = profile_states(
    torch.cumsum(torch.randn((3, 64, 8), generator=torch.Generator().manual_seed(0)), dim=0), svd_rank=4, kreiss="never"
)


class QueueEngine:
    """Keeps submitted snapshots until the script delivers their results."""

    def __init__(self) -> None:
        self.queue: deque[Snapshot] = deque()
        self.queue_length = 0

    def submit(self, snapshot: Snapshot, *, wait: bool = False) -> list[tuple[str, DropReason]]:
        self.queue.append(snapshot.without_states())
        return []


class World:
    """A service, two runs and a clock. `errors` has the errors that the daemon would assign to a message."""

    def __init__(self, path: Path) -> None:
        self.now = 1000.0
        self.reachable = True
        """False: sent messages are not accepted."""
        self.sent: dict[str, list[MonitorMessage]] = {BAD: [], GOOD: []}
        self.told: list[str] = []
        self.errors: list[Exception] = []
        self.metrics = Metrics(CollectorRegistry(), {})
        self.store = HistoryWriter.open(path, clock=lambda: self.now)
        self.engine = QueueEngine()
        self.board = LiveState(clock=lambda: self.now, wall=lambda: self.now)
        self.service = Service(
            config=from_mapping({"policy": {"name": "kss+lr", "cooldown_steps": 1}, "kss": {"method": "published"}}),
            outputs=Outputs(history=self.store, metrics=self.metrics, live_state=self.board, annotate=self.tell),
            engine=cast(Engine, self.engine),
            failures=Failures(self.metrics, lambda: self.now),
            rejection_log=RejectionLog(self.metrics, lambda: self.now),
            send=self.send,
            data_endpoint="ipc:///nowhere",
            clock=lambda: self.now,
            wall=lambda: 1.7e9 + self.now,
        )

    def send(self, peer: bytes, message: MonitorMessage) -> bool:
        if self.reachable:
            self.sent[peer.decode()].append(message)
        return self.reachable

    def tell(self, at: float, tags: tuple[str, ...], text: str) -> None:
        self.told.append(text)

    def says(self, run: str, kind: type[Any], **fields: Any) -> None:
        """Receive a message of a run."""
        fields = gathered(fields) if "training" in kind.__struct_fields__ else fields
        message = kind(run=run, incarnation=INCARNATION, **fields)
        encode(message)
        self.handle(lambda: self.service.on_control(run.encode(), message))

    def hello(self, run: str, **fields: Any) -> None:
        values = {"world_size": 1, "num_senders": 1, "adapter": "x", "num_layers": 2, "width": 8, "acts": True}
        words = {"koopmon_version": "0", "torch_version": "0", "applied": Applied()}
        self.says(run, Hello, **{"process_rank": 0, "step": 0, **values, **words, **fields})

    def shard(self, run: str, step: int, **fields: Any) -> None:
        shape = {"first_point": 0, "num_points": 3, "num_samples": 2, "width": 2, "dtype": "bfloat16"}
        values = {"process_rank": 0, "num_senders": 1, "learning_rate": 0.1, "loss": 2.0, "step": step, **shape}
        header = Shard(run=run, incarnation=INCARNATION, **gathered({**values, **fields}))
        received = ReceivedShard(header, tuple(memoryview(FRAME) for _ in range(header.num_points)))
        self.handle(lambda: self.service.on_shard(received))

    def results(self, *, finite: bool) -> None:
        while self.engine.queue:
            result = Result(self.engine.queue.popleft(), PROFILE if finite else None, 0.1, non_finite=not finite)
            self.handle(lambda result=result: self.service.on_result(result))

    def handle(self, action: Callable[[], None]) -> None:
        try:
            action()
        except ProtocolError:
            pass
        except Exception as error:
            self.errors.append(error)

    def commands(self, run: str) -> list[Command]:
        return [message for message in self.sent[run] if isinstance(message, Command)]

    def series(self, run: str) -> dict[tuple[str, ...], float]:
        return {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in self.metrics.collect()
            for sample in family.samples
            if sample.labels.get("run") == run
        }

    def internal_errors(self) -> float:
        return sum(
            sample.value
            for family in self.metrics.collect()
            if family.name == "koopmon_internal_errors"
            for sample in family.samples
        )

    def play(self) -> list[Any]:
        """Run the script; return the messages to `good` and its series at the end of each act."""
        seen: list[Any] = []
        for act in self._acts():
            act()
            self.service.tick()
            self.service.next_deadline()
            seen.append((without_ids(self.sent[GOOD]), self.series(GOOD)))
        return seen

    def _acts(self) -> Iterator[Callable[[], None]]:
        def both(action: Callable[[str], None]) -> Callable[[], None]:
            return lambda: [action(run) for run in (BAD, GOOD)] and None

        def pass_time(seconds: float) -> Callable[[], None]:
            def act() -> None:
                self.now += seconds

            return act

        def judged(step: int, *, finite: bool) -> Iterator[Callable[[], None]]:
            yield both(lambda run: self.shard(run, step, observables={"a": [1.0, 2.0]}))
            yield lambda: self.results(finite=finite)

        def answer(run: str) -> None:
            for command in self.commands(run):
                held = Applied(lr_scale=command.lr_scale or 1.0)
                for outcome in ("applied", "duplicate", "failed"):
                    self.says(run, Ack, command_id=command.id, outcome=outcome, step=5, applied=held)

        def beat(step: int, **fields: Any) -> Callable[[], None]:
            values = {"process_rank": 0, "step": step, "applied": Applied(), **fields}
            return both(lambda run: self.says(run, Heartbeat, **values))

        yield both(self.hello)
        for step in (1, 2, 3):
            yield beat(step)
            yield from judged(step, finite=True)
        yield from judged(4, finite=False)
        yield pass_time(1.1)  # repeated
        yield both(answer)
        yield both(self.hello)
        yield beat(6, dropped={"not_finite": 1})
        yield pass_time(1.1)
        yield beat(200)
        yield pass_time(1.1)  # expired
        yield both(lambda run: self.shard(run, 300, num_senders=2))
        yield pass_time(6.0)  # half of a snapshot is not enough
        yield lambda: self.results(finite=True)
        yield both(lambda run: self.says(run, Goodbye, process_rank=0, step=301))
        yield pass_time(400.0)  # removed
        yield both(self.hello)
        yield pass_time(100.0)  # vanished
        yield pass_time(90_000.0)


def without_ids(messages: list[MonitorMessage]) -> list[MonitorMessage]:
    return [msgspec.structs.replace(each, id="0" * 8) if isinstance(each, Command) else each for each in messages]
