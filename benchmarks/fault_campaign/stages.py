"""Stages of the campaign: a monitor, its jobs, and the check of a recovery."""

from __future__ import annotations

import contextlib
import random
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from benchmarks.fault_campaign.checks import Chapter, Examination, doubted_decisions, examine, read_store
from benchmarks.fault_campaign.machine import Job, Link, Monitor, wait

RECOVERY_SECONDS = 60.0
"""Time limit of a recovery."""
RESTLESS: Mapping[str, Mapping[str, Any]] = {
    "sampling": {"num_samples": 64},
    "cadence": {"warmup_steps": 1, "dense_every": 5, "calm_every": 10, "budget_ratio": 0.5},
    "limits": {"max_actions_per_hour": 100_000},
    "control": {"monitor_lost_seconds": 3.0},
    "monitor": {"svd_rank": 8},
    "risk": {
        "smoothing": 1.0,
        "peak_scale": 0.037,
        "speed_scale": 0.0225,
        "restlessness_scale": 1e6,
        "prior_slope": 0.0,
    },
    "policy": {
        "name": "lr",
        "act_risk": 0.6,
        "severe_risk": 1.0,
        "release_risk": 0.5,
        "cooldown_steps": 5,
        "hold_steps": 5,
        "rise_factor": 1.5,
        "ramp_steps": 1,
        "expires_in_steps": 100,
        "max_actions_per_hour": 100_000,
    },
}
"""Settings with several snapshots per second and a policy that backs off and rises all the time, without an effect.

The risk uses two snapshots alone. A quarter of the difference between their few tokens counts as high.
"""
Tables = Mapping[str, Mapping[str, Any]]


@dataclass(slots=True)
class Injection:
    """One fault. Times are of the monotonic clock; `recovery` is in seconds, None without one."""

    detail: str
    started: float
    ended: float
    recovery: float | None = None


@dataclass(slots=True)
class Found:
    """Results of a scene."""

    injections: list[Injection]
    examinations: list[Examination] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    num_decisions: int = 0


def write_config(path: Path, *changes: Tables) -> Path:
    """Return RESTLESS with `changes`, as the TOML file of both sides."""
    tables: dict[str, dict[str, Any]] = {name: dict(values) for name, values in RESTLESS.items()}
    for change in changes:
        for name, values in change.items():
            tables[name] = {**tables.get(name, {}), **values}
    text = "".join(
        f"[{name}]\n" + "".join(f"{key} = {_toml(value)}\n" for key, value in values.items())
        for name, values in tables.items()
    )
    path.write_text(text)
    return path


def _toml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


class Watched:
    """A real monitor and its jobs. `steered`, of two ranks, gets commands; `quiet`, of one, gets none."""

    def __init__(
        self,
        directory: Path,
        rng: random.Random,
        *,
        bind: str = "",
        changes: Tables | None = None,
        store: Path | None = None,
        clock: Path | None = None,
        link: Link | None = None,
    ) -> None:
        self.rng, self.directory, self.clock, self.link = rng, directory, clock, link
        self.bind = bind or f"ipc://{directory}/m/control"
        self.changes = changes or {}
        config = write_config(directory / "monitor.toml", self.changes)
        self.place = store or directory / "store"
        self.place.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.monitor = Monitor(self.place, config, clock=clock, within=link.monitor if link else ())
        self.jobs: list[Job] = []
        self.stores: list[Path] = []
        """Finished stores, beside the monitor's present one."""

    def __enter__(self) -> Watched:
        self.monitor.start(self.bind)
        return self

    def __exit__(self, *_: object) -> None:
        for job in self.jobs:
            job.kill()
        self.monitor.close()

    def steered(
        self,
        *,
        world: int = 2,
        guarded: str = "attach",
        options: Sequence[str] = (),
        name: str = "steered",
        paths: str = "",
    ) -> Job:
        """Return a job that applies commands; not launched yet."""
        return self._job(name, world, {}, guarded, options, paths)

    def quiet(self, *, world: int = 1, options: Sequence[str] = (), name: str = "quiet", paths: str = "") -> Job:
        """Return a job that refuses all commands; not launched yet."""
        return self._job(name, world, {"limits": {"act": "never"}}, "attach", options, paths)

    def _job(
        self, name: str, world: int, changes: Tables, guarded: str, options: Sequence[str], paths: str = ""
    ) -> Job:
        config = write_config(self.directory / f"{name}.toml", self.changes, changes)
        job = Job(
            self.directory / name,
            name,
            self.bind,
            config,
            world=world,
            guarded=guarded,
            options=options,
            clock=self.clock,
            within=self.link.job if self.link else (),
            paths=paths,
        )
        self.jobs.append(job)
        return job

    def newest(self, run: str) -> tuple[int, int]:
        """Return the row of a run's latest incarnation and the step of its latest snapshot; -1 without one."""
        query = (
            "SELECT i.id, (SELECT max(step) FROM profiles WHERE incarnation_id = i.id) FROM incarnations AS i"
            " JOIN runs ON runs.id = run_id WHERE name = ? ORDER BY i.id DESC LIMIT 1"
        )
        with contextlib.suppress(sqlite3.Error), contextlib.closing(self._read()) as database:
            row = database.execute(query, (run,)).fetchone()
            return (-1, -1) if row is None else (int(row[0]), -1 if row[1] is None else int(row[1]))
        return -1, -1

    def _read(self) -> sqlite3.Connection:
        path = quote(str(self.monitor.store.resolve()))
        return sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=1.0)

    def await_command(self, run: str, seconds: float = 20.0) -> None:
        """Wait until the latest incarnation of a run has a scale on its rate in force."""
        query = "SELECT json_extract(applied, '$.lr_scale') FROM incarnations WHERE id = ?"

        def braked() -> bool:
            with contextlib.suppress(sqlite3.Error), contextlib.closing(self._read()) as database:
                (scale,) = database.execute(query, (self.newest(run)[0],)).fetchone() or (None,)
                return scale is not None and scale < 1.0
            return False

        with contextlib.suppress(TimeoutError):
            wait(braked, "a command in force", seconds)

    def incarnations(self) -> dict[str, int]:
        return {job.run: self.newest(job.run)[0] for job in self.jobs}

    def recovery(self, since: float, after: Mapping[str, int] | None = None) -> float | None:
        """Return the seconds from `since` until the store has a snapshot of each job that was taken after now.

        `after`: for runs that return as a new incarnation, the row of their latest one before.
        """
        after = after or {}
        marks = {job.run: -1 if job.run in after else job.step() for job in self.jobs if job.running}

        def well() -> bool:
            found = {run: self.newest(run) for run in marks}
            return all(found[run][0] > after.get(run, 0) and found[run][1] > mark for run, mark in marks.items())

        try:
            wait(well, "snapshots", RECOVERY_SECONDS)
        except TimeoutError:
            return None
        return time.monotonic() - since

    def settle(self) -> None:
        """Wait until the monitor receives snapshots of every job."""
        for job in self.jobs:
            job.await_steps(5)
        if self.recovery(time.monotonic()) is None:
            raise RuntimeError(f"the monitor does not see {[job.run for job in self.jobs]}: {self._words()}")

    def _words(self) -> str:
        return "\n".join([*list(self.monitor.said)[-10:], *(job.errors()[-1500:] for job in self.jobs)])

    def pause(self, least: float, most: float) -> float:
        """Wait for a random time and return it."""
        seconds = self.rng.uniform(least, most)
        time.sleep(seconds)
        return seconds

    def conclude(self, injections: list[Injection], runs: Mapping[str, Mapping[str, str]] | None = None) -> Found:
        """End all processes normally, and compare the logs with the store."""
        for job in self.jobs:
            if job.running and not (runs and job.run in runs):
                job.end()
            elif job.running:
                job.await_end()
        if self.monitor.alive:
            self.monitor.terminate()
        stores = [*self.stores, self.monitor.store]
        chapters: list[Chapter] = [chapter for store in stores for chapter in read_store(store)]
        found = Found(injections, num_decisions=sum(len(chapter.entries) for chapter in chapters))
        for job in self.jobs:
            found.examinations.append(examine(job, chapters, (runs or {}).get(job.run)))
        if not self.stores:
            found.doubts = doubted_decisions(self.monitor.store, self.monitor.said)
        return found


def inject(stage: Watched, fault: Any, *, renewed: bool = False) -> Injection:
    """Wait for calm, call `fault(stage)`, which returns a description at its end, and wait for the recovery.

    `renewed`: the fault causes a new incarnation of the first job.
    """
    stage.settle()
    stage.pause(0.0, 0.4)
    after = {stage.jobs[0].run: stage.newest(stage.jobs[0].run)[0]} if renewed else None
    injection = Injection("", time.monotonic(), 0.0)
    injection.detail = fault(stage)
    injection.ended = time.monotonic()
    injection.recovery = stage.recovery(injection.ended, after)
    return injection
