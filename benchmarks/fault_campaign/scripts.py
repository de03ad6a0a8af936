"""Faults that need a script, under a scripted monitor or a real one.

The commands repeat, are late or contradict each other. Trainings start and end.
"""

from __future__ import annotations

import json
import random
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.fault_campaign.adapter import ENTRY_POINT, PLACES
from benchmarks.fault_campaign.checks import Chapter, Entry, examine
from benchmarks.fault_campaign.machine import Job, wait
from benchmarks.fault_campaign.stages import RESTLESS, Found, Injection, Watched, write_config
from benchmarks.fault_campaign.training import last_line
from koopmon.config import LimitsConfig
from koopmon.wire.messages import Ack, Goodbye, Hello
from tests.agent.scripted_monitor import ScriptedMonitor

LAST_STEPS = 150
"""Steps of a training that gets its command at the end. Control between the ranks takes a second to start."""
SHORT_STEPS = 60
LEAST_SCALE = LimitsConfig().min_lr_scale


class Scripted:
    """A scripted monitor and one job of two ranks; it records every command that it sends."""

    def __init__(self, directory: Path, rng: random.Random, options: tuple[str, ...] = ()) -> None:
        self.rng = rng
        self.monitor = ScriptedMonitor(directory / "s")
        config = write_config(directory / "job.toml")
        self.job = Job(directory / "job", "job", self.monitor.endpoint, config, world=2, options=options)
        self.scales: dict[str, float | None] = {}
        self.bounds: dict[str, int] = {}
        """Step by command after which it must not be applied."""

    def __enter__(self) -> Scripted:
        self.monitor.__enter__()
        self.job.launch()
        return self

    def __exit__(self, *_: object) -> None:
        self.job.kill()
        self.monitor.__exit__()

    def send(self, scale: float, run: str | None = None, **fields: Any) -> str:
        """Build one command that sets the scale on the rate."""
        command_id = self.monitor.command("set_lr_scale", run, lr_scale=scale, **fields)
        self.scales[command_id] = max(scale, LEAST_SCALE)
        self.bounds[command_id] = fields.get("expires_step", 1 << 40)
        return command_id

    def scale(self) -> float:
        return self.rng.choice([0.125, 0.25, 0.5, 0.75, 0.875])

    def accepted(self, since: float) -> float:
        """Return the seconds from `since` until a harmless command is applied."""
        while True:
            command_id = self.send(1.0)
            if self.monitor.ack(command_id, 60.0).outcome == "applied":
                return time.monotonic() - since
            time.sleep(0.05)

    def chapters(self) -> list[Chapter]:
        """Return sent commands and received acks like an audit log, in the order of their first ack."""
        pids = {hello.run: hello.pid for hello in self.monitor.of(Hello) if hello.process_rank == 0}
        runs = {ack.command_id: ack.run for ack in self.monitor.of(Ack)}
        entries: dict[str, list[Entry]] = {run: [] for run in pids}
        acks: dict[str, list[Ack]] = {}
        for ack in self.monitor.of(Ack):
            acks.setdefault(ack.command_id, []).append(ack)
        for command_id, answers in acks.items():
            steps = tuple(sorted({ack.step for ack in answers if ack.outcome == "applied"}))
            outcome = "applied" if steps else answers[0].outcome
            scale = self.scales.get(command_id)
            entries[runs[command_id]].append(Entry(command_id, outcome, steps, scale))
        return [Chapter(run, pid, tuple(entries[run])) for run, pid in pids.items()]

    def doubts(self) -> list[str]:
        """Return commands that were applied after their expiry, or twice by their acks."""
        applied = [ack for ack in self.monitor.of(Ack) if ack.outcome == "applied"]
        late = [
            f"doubled: {ack.command_id} after its expiry" for ack in applied if ack.step > self.bounds[ack.command_id]
        ]
        ids = [ack.command_id for ack in applied]
        return late + [f"doubled: {each} applied twice" for each in set(ids) if ids.count(each) > 1]


def duplicate(stage: Scripted) -> str:
    """One command many times, at once or repeated like an unacknowledged one."""
    command_id, scale = secrets.token_hex(8), stage.scale()
    times = stage.rng.randint(2, 5)
    for _ in range(times):
        stage.send(scale, id=command_id)
        time.sleep(stage.rng.choice([0.0, 0.0, 0.15]))
    acks = wait(lambda: [a for a in stage.monitor.of(Ack) if a.command_id == command_id][times - 1 :], "acks", 30.0)
    return f"{times} times, the last {acks[-1].outcome}"


def reordered(stage: Scripted) -> str:
    """Commands out of order, with an old one repeated after newer ones."""
    made = [(secrets.token_hex(8), stage.scale()) for _ in range(4)]
    sent = stage.rng.sample(made, 4)
    sent.append(stage.rng.choice(sent[:-1]))
    for command_id, scale in sent:
        stage.send(scale, id=command_id)
        time.sleep(stage.rng.choice([0.0, 0.1]))
    wait(lambda: all(stage.monitor.acked(command_id) for command_id, _ in made), "acks", 30.0)
    return "4 commands, one of them again"


def expired(stage: Scripted) -> str:
    """A command that has expired, or expires before it can be applied."""
    beyond = stage.rng.randint(-50, 12)
    command_id = stage.send(stage.scale(), expires_step=max(0, stage.job.step() + beyond))
    outcome = stage.monitor.ack(command_id, 30.0).outcome
    return f"{beyond:+d} steps: {outcome}"


def conflicting(stage: Scripted) -> str:
    """Contradicting commands in one batch, one below the agent's limit, one for another incarnation."""
    ids = [stage.send(scale) for scale in stage.rng.sample([0.125, 0.25, 0.5, 0.01, 0.875], 3)]
    ids.append(stage.send(0.5, incarnation="0123456789abcdef"))
    for command_id in ids:
        stage.monitor.ack(command_id, 30.0)
    return "3 rates at once, one for another launch"


def scripted(fault: Callable[[Scripted], str], directory: Path, rng: random.Random, count: int) -> Found:
    """Run `count` injections into one long training."""
    injections = []
    with Scripted(directory, rng) as stage:
        stage.job.await_steps(5)
        stage.monitor.wait(lambda: any(hello.num_layers for hello in stage.monitor.of(Hello)), 60.0)
        stage.accepted(time.monotonic())
        for _ in range(count):
            time.sleep(rng.uniform(0.0, 0.3))
            started = time.monotonic()
            detail = fault(stage)
            ended = time.monotonic()
            injections.append(Injection(detail, started, ended, stage.accepted(ended)))
        stage.job.end()
        return Found(injections, [examine(stage.job, stage.chapters())], stage.doubts(), len(stage.scales))


def last_step(directory: Path, rng: random.Random, count: int) -> Found:
    """Trainings that get commands in their last steps, until the first snapshot of the next training."""
    runs = [f"last-{number}" for number in range(count + 1)]
    options = ("--phases", json.dumps([[run, "", 0] for run in runs]), "--phase-steps", str(LAST_STEPS))
    injections = []
    with Scripted(directory, rng, options) as stage:
        monitor, job = stage.monitor, stage.job

        def at(number: int, step: int) -> bool:
            log = job.log(f"{number}-0", 0)
            line = last_line(log) if log.exists() else None
            return line is not None and line.step >= step

        job.order(do="phase", number=0)
        for number, run in enumerate(runs[:-1]):
            wait(lambda number=number: at(number, LAST_STEPS - 20), f"the end of {run}")  # type: ignore[misc]
            before = rng.randint(1, 8)
            while not at(number, LAST_STEPS - before):
                time.sleep(0.001)
            started = time.monotonic()
            ids = [stage.send(stage.scale(), run) for _ in range(rng.randint(1, 3))]
            monitor.wait(lambda run=run: any(bye.run == run for bye in monitor.of(Goodbye)), 60.0)  # type: ignore[misc]
            ended = time.monotonic()
            job.order(do="phase", number=number + 1)
            following = runs[number + 1]
            monitor.wait(lambda run=following: any(s.run == run for s, _ in monitor.shards), 60.0)  # type: ignore[misc]
            outcomes = [monitor.ack(each).outcome for each in ids if monitor.acked(each)]
            detail = f"{before} steps before the end: {', '.join(outcomes) or 'too late'}"
            injections.append(Injection(detail, started, ended, time.monotonic() - ended))
        job.await_end()
        names = {f"{number}-0": run for number, run in enumerate(runs)}
        job.worlds = {str(number): 2 for number in range(len(runs))}
        return Found(injections, [examine(job, stage.chapters(), names)], stage.doubts(), len(stage.scales))


OBSERVE: Mapping[str, Mapping[str, Any]] = {"policy": {**RESTLESS["policy"], "name": "observe"}}


def adapter_raises(directory: Path, rng: random.Random, count: int) -> Found:
    """Trainings with an adapter that raises, each followed by one without, until the first snapshot of the latter."""
    plugin = directory / "plugin" / "faulty-0.dist-info"
    plugin.mkdir(parents=True)
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 0\n")
    (plugin / "entry_points.txt").write_text(ENTRY_POINT)
    places = [rng.choice(PLACES) for _ in range(count)]
    phases: list[list[object]] = []
    for number, place in enumerate(places):
        phases += [[f"broken-{number}", place, rng.choice([0, 0, 1, 5, 20])], [f"sound-{number}", "", 0]]
    options = ("--phases", json.dumps(phases), "--phase-steps", str(SHORT_STEPS))
    injections = []
    with Watched(directory, rng, changes=OBSERVE) as stage:
        job = stage.quiet(world=2, options=options, name="job", paths=str(plugin.parent))
        job.launch()
        for number, place in enumerate(places):
            started = time.monotonic()
            job.order(do="phase", number=2 * number)
            _await_phase(job, 2 * number, SHORT_STEPS)
            ended = time.monotonic()
            job.order(do="phase", number=2 * number + 1)
            recovery = _first_snapshot(stage, f"sound-{number}", ended)
            _await_phase(job, 2 * number + 1, SHORT_STEPS)
            injections.append(Injection(f"in {place}, after {phases[2 * number][2]} calls", started, ended, recovery))
        runs = {f"{number}-0": str(run) for number, (run, *_) in enumerate(phases)}
        job.worlds = {str(number): 2 for number in range(len(phases))}
        return stage.conclude(injections, {job.run: runs})


def same_name(directory: Path, rng: random.Random, count: int) -> Found:
    """A second job starts under the name of a running one and becomes the run."""
    phases = [[f"twin-{number}", "", 0] for number in range(count)]
    options = ("--phases", json.dumps(phases), "--phase-steps", str(2 * SHORT_STEPS))
    injections = []
    with Watched(directory, rng, changes=OBSERVE) as stage:
        first, second = (stage.quiet(options=options, name=name) for name in ("first", "second"))
        first.launch()
        second.launch()
        for number in range(count):
            run = f"twin-{number}"
            first.order(do="phase", number=number)
            wait(lambda run=run: stage.newest(run)[1] >= 0, f"the first {run}")  # type: ignore[misc]
            stage.pause(0.0, 0.3)
            known, started = stage.newest(run)[0], time.monotonic()
            second.order(do="phase", number=number)
            recovery = _first_snapshot(stage, run, started, after=known)
            for job in (first, second):
                _await_phase(job, number, 2 * SHORT_STEPS)
            injections.append(Injection("while the first trains", started, started, recovery))
        runs = {f"{number}-0": str(run) for number, (run, *_) in enumerate(phases)}
        return stage.conclude(injections, {job.run: runs for job in (first, second)})


def _await_phase(job: Job, number: int, steps: int) -> None:
    logs = [job.log(f"{number}-0", rank) for rank in range(job.world)]

    def over() -> bool:
        lines = [last_line(log) if log.exists() else None for log in logs]
        if not job.running and not all(lines):
            raise RuntimeError(f"{job.run} ended: {job.errors()[-2000:]}")
        return all(line is not None and line.step == steps - 1 for line in lines)

    wait(over, f"phase {number} of {job.run}")


def _first_snapshot(stage: Watched, run: str, since: float, after: int = -1) -> float | None:
    """Return the seconds from `since` until a snapshot of an incarnation of `run` after the row `after`."""

    def seen() -> bool:
        incarnation, step = stage.newest(run)
        return incarnation > after and step >= 0

    try:
        wait(seen, f"a snapshot of {run}", 60.0)
    except TimeoutError:
        return None
    return time.monotonic() - since
