"""A recorded input of several runs: decisions, commands, history and metrics equal the recorded ones.

`golden/inputs.json` has the inputs as plain fields: messages of agents, spectral profiles of the engine, and elapsed
time. Each policy gets the same inputs. `golden/NAME.json` has the result. After an intended change of behaviour,
`python -m tests.monitor.test_golden_run` records the results again; review the difference.
"""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import torch
from prometheus_client import CollectorRegistry

from koopmon.config import from_mapping
from koopmon.errors import ProtocolError
from koopmon.history.reader import HistoryReader
from koopmon.history.writer import HistoryWriter
from koopmon.monitor.assembler import Snapshot
from koopmon.monitor.engine import DropReason, Engine, Result
from koopmon.monitor.failures import Failures
from koopmon.monitor.http.live_state import LiveState
from koopmon.monitor.rejection_log import RejectionLog
from koopmon.monitor.service import Outputs, Service
from koopmon.spectral import LayerProfile, SpectralProfile
from koopmon.telemetry.metrics import Metrics
from koopmon.wire.codec import ReceivedShard
from koopmon.wire.messages import (
    Ack,
    Applied,
    Command,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    KssSettings,
    MonitorMessage,
    Shard,
    Welcome,
)
from tests import factories

GOLDEN = Path(__file__).parent / "golden"
POLICIES: dict[str, dict[str, Any]] = {
    "lr": {"name": "lr"},
    "kss+lr": {"name": "kss+lr"},
    "kss": {"name": "kss"},
    "observe": {"name": "observe"},
}
SHORT = {"cooldown_steps": 4, "hold_steps": 8, "dense_steps": 12, "kss_hold_steps": 12, "kss_ramp_steps": 4}
START = 1.7e9
Fields = dict[str, Any]


# The protocol: how the plain fields of the inputs become today's messages.


def shard(run: str, launch: str, step: int, rank: int, senders: int, fields: Fields) -> Shard:
    shape = {"first_point": 0, "num_points": 3, "num_samples": 64, "width": 1, "dtype": "bfloat16"}
    said = factories.gathered({"step": step, "process_rank": rank, "num_senders": senders, **shape, **fields})
    return Shard(run=run, incarnation=launch, **said)


def heartbeat(run: str, launch: str, step: int, rank: int, applied: Applied, fields: Fields) -> Heartbeat:
    return factories.heartbeat(step, run, launch, process_rank=rank, applied=applied, **fields)


def profile(given: Fields) -> SpectralProfile:
    """Build a profile with the update ratios `ratios`, one for each layer; all layers share the other numbers."""
    radius = given.get("radius", 1.0)
    numbers = {
        "near_unit_mass": given.get("near_unit", 0.5),
        "expansive_mass": given.get("expansive", 0.1),
        "contractive_mass": 0.25,
        "spectral_radius": radius,
        "eigenvector_condition_number": 3.0,
        "kreiss_constant": None,
        "nonlinearity_ratio": 0.125,
        "update_exponent": given.get("exponent", 0.5),
        "reliable_mode_ratio": 0.75,
        "reliable_near_unit_mass": 0.5,
        "num_samples": 64,
        "svd_rank": 2,
        "informative": given.get("informative", True),
        "reason": "" if given.get("informative", True) else "too few samples",
    }
    pair = torch.tensor([radius, 0.5], dtype=torch.complex128)
    return SpectralProfile(
        layers=tuple(LayerProfile(eigenvalues=pair, update_ratio=ratio, **numbers) for ratio in given["ratios"])
    )


# The stage: a service without sockets, and agents that answer what it sends.


class GivenResults:
    """Stub of the engine: it keeps the snapshots until the test delivers their results."""

    def __init__(self) -> None:
        self.queue: list[Snapshot] = []
        self.queue_length = 0

    def submit(self, snapshot: Snapshot, *, wait: bool = False) -> list[tuple[str, DropReason]]:
        self.queue.append(snapshot.without_states())
        return []


class Stage:
    """Run the inputs; `log` has all sent, refused and annotated messages in order."""

    def __init__(self, folder: Path, policy: Fields) -> None:
        self.now = 1000.0
        self.reachable = True
        self.path = folder / "history.sqlite3"
        self.config = from_mapping({"policy": {**SHORT, **policy}, "kss": {"method": "published"}})
        self.log: list[Any] = []
        self.names: dict[str, str] = {}
        self.applied: dict[str, Applied] = defaultdict(Applied)
        self.open: dict[str, list[Command]] = defaultdict(list)
        self.answered: dict[str, Command] = {}
        self.metrics = Metrics(CollectorRegistry(), {})
        self._start()

    def _start(self) -> None:
        self.engine = GivenResults()
        self.store = HistoryWriter.open(self.path, clock=lambda: self.now, wall=self.wall)
        self.board = LiveState(clock=lambda: self.now, wall=self.wall)
        outputs = Outputs(
            history=self.store,
            metrics=self.metrics,
            live_state=self.board,
            annotate=lambda at, tags, text: self.log.append(["annotated", at - START, list(tags), text]),
        )
        self.service = Service(
            config=self.config,
            outputs=outputs,
            failures=Failures(self.metrics, lambda: self.now),
            engine=cast(Engine, self.engine),
            rejection_log=RejectionLog(self.metrics, lambda: self.now),
            send=self.send,
            data_endpoint="ipc:///nowhere",
            clock=lambda: self.now,
            wall=self.wall,
        )

    def wall(self) -> float:
        return START + self.now

    def name(self, command_id: str) -> str:
        """Return a name for a command's random id: its place in the order of appearance."""
        return self.names.setdefault(command_id, f"command {len(self.names) + 1}")

    def send(self, peer: bytes, message: MonitorMessage) -> bool:
        if not self.reachable:
            return False
        told: Any = plain(message)
        if isinstance(message, Command):
            told["id"] = self.name(message.id)
            if message.id in [command.id for command in self.open[message.run]]:
                told = "again " + told["id"]
            else:
                self.open[message.run].append(message)
        elif isinstance(message, HeartbeatReply):
            told = told.get("judgement")
        elif isinstance(message, Welcome):
            told = told.get("restore")
        self.log.append(["sent", peer.decode(), type(message).__name__, told])
        return True

    def play(self, inputs: list[list[Any]]) -> None:
        for number, (kind, *values) in enumerate(inputs):
            before = len(self.log)
            try:
                getattr(self, f"on_{kind}")(*values)
            except ProtocolError as error:
                self.log.append(["refused", error.reason])
            self.service.tick()
            self.service.next_deadline()
            self.log[before:] = [[number, *entry] for entry in self.log[before:]]

    def peer(self, run: str, launch: str, rank: int) -> bytes:
        return f"{run}/{launch}/{rank}".encode()

    def on_hello(self, run: str, launch: str, rank: int, step: int, fields: Fields) -> None:
        if fields.pop("fresh", False):
            self.applied[run] = Applied()
        told = factories.hello(run, launch, process_rank=rank, step=step, applied=self.applied[run], **fields)
        self.service.on_control(self.peer(run, launch, rank), told)

    def on_heartbeat(self, run: str, launch: str, rank: int, step: int, fields: Fields) -> None:
        told = heartbeat(run, launch, step, rank, self.applied[run], fields)
        self.service.on_control(self.peer(run, launch, rank), told)

    def on_snapshot(self, run: str, launch: str, step: int, fields: Fields, found: Fields | str | None) -> None:
        """Send shards of the ranks `ranks` of `senders`, then the result `found`: a profile, None, or "failed"."""
        ranks, senders = fields.pop("ranks", [0]), fields.pop("senders", 1)
        held = {"lr_scale": self.applied[run].lr_scale, "kss_alpha": self.applied[run].kss.alpha}
        frames = tuple(memoryview(bytes(64 * 2)) for _ in range(3))
        for rank in ranks:
            logged = {name: value[rank] if isinstance(value, list) else value for name, value in fields.items()}
            self.service.on_shard(ReceivedShard(shard(run, launch, step, rank, senders, held | logged), frames))
        self.found = found
        self._results()

    def _results(self) -> None:
        while self.engine.queue:
            snapshot, found = self.engine.queue.pop(0), self.found
            if isinstance(found, str):
                result = Result(snapshot, None, 0.25, failed=True)
            else:
                result = Result(snapshot, None if found is None else profile(found), 0.25, non_finite=found is None)
            self.service.on_result(result)

    def on_answer(self, run: str, launch: str, step: int, outcome: str, fields: Fields) -> None:
        """Let rank 0 acknowledge each command without an ack."""
        for command in self.open.pop(run, []):
            if outcome == "applied":
                held = self.applied[run]
                scale = held.lr_scale if command.lr_scale is None else command.lr_scale
                kss = held.kss if command.kss is None else command.kss
                self.applied[run] = Applied(lr_scale=scale, kss=kss)
            self._ack(run, launch, step, command, outcome, fields)
            self.answered[run] = command

    def on_answer_again(self, run: str, launch: str, step: int, outcome: str) -> None:
        if run in self.answered:  # a policy that only observes sends nothing
            self._ack(run, launch, step, self.answered[run], outcome, {})

    def _ack(self, run: str, launch: str, step: int, command: Command, outcome: str, fields: Fields) -> None:
        held = {"command_id": command.id, "outcome": outcome, "applied": self.applied[run]}
        told = Ack(run=run, incarnation=launch, step=step, **held, **fields)
        self.service.on_control(self.peer(run, launch, 0), told)

    def on_forged_ack(self, run: str, launch: str, step: int) -> None:
        told = Ack(run=run, incarnation=launch, step=step, command_id="f" * 8, outcome="applied", applied=Applied())
        self.service.on_control(self.peer(run, launch, 0), told)

    def on_goodbye(self, run: str, launch: str, rank: int, step: int) -> None:
        told = Goodbye(run=run, incarnation=launch, process_rank=rank, step=step, reason="finished")
        self.service.on_control(self.peer(run, launch, rank), told)

    def on_wait(self, seconds: float) -> None:
        self.now += seconds
        self.service.tick()
        self._results()

    def on_lost(self, run: str, reason: str) -> None:
        self.service.on_dropped(run, reason)

    def on_reachable(self, reachable: bool) -> None:
        self.reachable = reachable

    def on_restart(self) -> None:
        """Stop the monitor and open its history with another one."""
        self.service.stop()
        self.store.close()
        self.log.append(["metrics", samples(self.metrics)])
        self.metrics = Metrics(CollectorRegistry(), {})
        self._start()


# The result, as plain values.


def plain(value: Any) -> Any:
    """Return a message without the fields that have their default."""
    if not isinstance(value, msgspec.Struct):
        return value
    fields = msgspec.structs.fields(value)
    return {
        field.name: plain(held)
        for field in fields
        if field.name not in ("run", "incarnation") and (held := getattr(value, field.name)) != field.default
    }


def samples(metrics: Metrics) -> dict[str, float]:
    """Return every sample, without the counters that are 0."""
    return {
        f"{sample.name.removeprefix('koopmon_')} {' '.join(sample.labels.values())}": sample.value
        for family in metrics.collect()
        for sample in family.samples
        if sample.value or not sample.name.endswith(("_total", "_bucket"))
    }


def outcome(stage: Stage) -> dict[str, Any]:
    return {
        "log": stage.log,
        "shown": {name: _shown(stage, name) for name in sorted(stage.board.names())},
        "history": _history(stage),
        "metrics": samples(stage.metrics),
    }


def _shown(stage: Stage, run: str) -> Fields:
    """Return the content of the live page of a run at the end."""
    view = stage.board.view(run)
    assert view is not None
    decisions = [
        [each.step, each.phase, each.reason, [[stage.name(o.command.id), o.outcome, o.step] for o in each.commands]]
        for each in view.decisions
    ]
    standing = None if view.standing is None else view.standing.state.phase
    risks = [[point.step, point.risk] for point in view.points]
    return {"state": view.state, "sends": view.sends, "phase": standing, "risks": risks, "decisions": decisions}


def _history(stage: Stage) -> Fields:
    stage.store.close()
    with HistoryReader.open(stage.path) as history:
        return {run: dict(_of_run(stage, history, run)) for run in history.runs()}


def _of_run(stage: Stage, history: Any, run: str) -> Iterator[tuple[str, Any]]:
    row = history.run(run)
    yield "run", [row.first_seen - START, row.last_seen - START, row.state]
    yield (
        "launches",
        [
            [each.incarnation, each.ended and each.ended - START, each.end_reason, plain(each.applied)]
            for each in history.incarnations(run)
        ],
    )
    yield (
        "decisions",
        [
            [each.incarnation, each.step, each.time - START, each.phase, each.reason, each.risk]
            + [
                [stage.name(told.command.id), told.command.kind, told.outcome, told.acked_step, told.detail]
                for told in each.commands
            ]
            for each in history.decisions(run)
        ],
    )
    yield (
        "observations",
        [
            [each.incarnation, each.step, each.time - START, each.training.loss, each.training.lr_scale, each.risk]
            for each in history.observations(run)
        ],
    )
    yield "heartbeats", [[each.process_rank, each.step, each.time - START] for each in history.heartbeats(run)]
    yield "profiles", [[each.step, each.num_shards, each.profile is not None] for each in history.profiles(run)]
    memories = {each.incarnation: memory(stage.path, run, each.incarnation) for each in history.incarnations(run)}
    yield "memory", memories


def memory(path: Path, run: str, launch: str) -> Any:
    """Return the recorded state from which a restarted monitor starts."""
    query = "SELECT memory FROM incarnations JOIN runs ON runs.id = run_id WHERE name = ? AND incarnation = ?"
    with contextlib.closing(sqlite3.connect(path)) as database:
        ((found,),) = database.execute(query, (run, launch)).fetchall()
    return None if found is None else msgspec.json.decode(found)


def rounded(value: Any) -> Any:
    """Return plain values with floats of nine digits: the last digits depend on the mathematics library."""
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    return value


def played(policy: str, folder: Path) -> Any:
    stage = Stage(folder, POLICIES[policy])
    stage.play(json.loads((GOLDEN / "inputs.json").read_text("utf-8")))
    return rounded(outcome(stage))


@pytest.mark.parametrize("policy", POLICIES)
def test_the_recorded_runs_get_the_recorded_decisions(policy: str, tmp_path: Path) -> None:
    expected, found = json.loads((GOLDEN / f"{policy}.json").read_text("utf-8")), played(policy, tmp_path)
    for part in ("log", "history", "shown", "metrics"):
        assert found[part] == expected[part], part
    assert found == expected


def test_the_recorded_runs_cover_what_can_happen() -> None:
    """The recording must contain each kind of event."""
    assert KssSettings().alpha == 0.0
    seen: set[str] = set()
    for policy in POLICIES:
        expected = json.loads((GOLDEN / f"{policy}.json").read_text("utf-8"))
        for run in expected["history"].values():
            for *_, risk in [row[:6] for row in run["decisions"]]:
                seen.add("severe" if risk >= 0.8 else "high" if risk >= 0.4 else "calm")
            for row in run["decisions"]:
                seen.update(f"{kind} {result}" for _, kind, result, *_ in row[6:])
                seen.add(row[3])
        seen.update(state["state"] for state in expected["shown"].values())
    wanted = {"severe", "high", "calm", "acting", "backed_off", "recovering", "alert", "running", "ended", "vanished"}
    wanted |= {f"set_lr_scale {each}" for each in ("applied", "refused", "failed", "expired", "unanswered", "dry_run")}
    wanted |= {f"set_kss {each}" for each in ("applied", "refused", "unanswered")}
    assert wanted <= seen


if __name__ == "__main__":
    for each in POLICIES:
        with tempfile.TemporaryDirectory() as directory:
            text = json.dumps(played(each, Path(directory)), indent=None, separators=(",", ":"), ensure_ascii=False)
        (GOLDEN / f"{each}.json").write_text(text.replace("],[", "],\n[") + "\n", "utf-8")
