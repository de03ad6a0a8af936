"""Many short trainings on two gloo ranks, guarded by one monitor process or unguarded.

`benchmarks.guarded` and `benchmarks.guarded_families` share it. Processes and sockets are real. One monitor and one
torchrun serve all runs of a policy in turn.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import Progress
from scipy import stats

from benchmarks.campaign import KEPT_MEMORY, terminated_as_interrupted
from benchmarks.guarded_ranks import Job
from benchmarks.training import Recipe
from koopmon.config import PolicyConfig
from koopmon.history.reader import HistoryReader

ROOT = Path(__file__).resolve().parent.parent
BASE = Recipe(
    task="recall-2", norm="none", width=64, num_layers=4, batch=32, steps=300, profile_every=0, lr=0.0, seed=0
)
BY_HAND: Mapping[str, Mapping[str, Any]] = {
    "nothing": {},
    "clipping at 1.0": {"clip": 1.0},
    "clipping at 0.5": {"clip": 0.5},
    "loss spike halves the rate": {"control": "spike"},
}
POLICIES = ("auto", "lr", "kss", "kss+lr")
"""`auto` also guards the healthy runs. KSS is that of the paper."""
HEALTHY: Mapping[str, Mapping[str, Any]] = {
    "pre": {"norm": "pre", "lr": 0.001},
    "pre-fast": {"norm": "pre", "lr": 0.004},
    "pre-torch": {"norm": "pre", "initialisation": "torch", "lr": 0.001},
    "none": {"norm": "none", "lr": 0.001},
}
"""Healthy runs. PyTorch's own initialisation gives Pre-LN a high near-unit mass by the paper's guidance.

Such runs train well (docs/method.md, "Reported spectra").
"""
READY_SECONDS = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Runs of a plan: `base` at rates that diverge, at safe rates, and `healthy` runs of each of `kinds`."""

    base: Recipe = BASE
    by_hand: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: BY_HAND)
    kinds: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: HEALTHY)
    rates: tuple[float, ...] = (0.004, 0.006, 0.008, 0.01)
    fixed: tuple[float, ...] = (0.001, 0.002, 0.003)
    seeds: int = 6
    healthy: int = 25
    policies: tuple[str, ...] = POLICIES

    def told(self) -> dict[str, Any]:
        """Return the values for the JSON."""
        names = ("rates", "fixed", "seeds", "healthy", "policies")
        return {**{name: getattr(self, name) for name in names}, "steps": self.base.steps}

    def jobs(self, endpoint: str, policy: str) -> Iterator[Job]:
        """Return the runs of one policy; those of "" are unguarded."""
        for lr in self.rates:
            for seed in range(self.seeds):
                for name, how in ({policy: {}} if policy else self.by_hand).items():
                    recipe = replace(self.base, lr=lr, seed=seed, **how)
                    yield Job(run=run_name(name, lr, seed), recipe=recipe, endpoint=endpoint)
        if not policy:
            for lr in self.fixed:
                for seed in range(self.seeds):
                    yield Job(run=run_name("fixed", lr, seed), recipe=replace(self.base, lr=lr, seed=seed))
        if policy in ("", PolicyConfig().name):
            for kind, how in self.kinds.items():
                for seed in range(100, 100 + self.healthy):
                    run = run_name(f"healthy-{kind}{'-guarded' if policy else ''}", how["lr"], seed)
                    yield Job(run=run, recipe=replace(self.base, seed=seed, **how), endpoint=endpoint)


def run_name(kind: str, lr: float, seed: int) -> str:
    return f"{kind.replace(' ', '-')}-{lr:g}-{seed}"


def train_all(plan: Plan, folder: Path, console: Console, *, alone: bool = True) -> dict[str, dict[str, Any]]:
    """Return every run by its name, with the actions of the monitor; finished ones are read from `folder`.

    Unguarded runs need `alone`. Raises RuntimeError if the ranks end before all results are there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    for policy in ([""] if alone else []) + list(plan.policies):
        name = policy or "alone"
        out = folder / f"{name}.jsonl"
        store = folder / f"{name}.sqlite3"
        with tempfile.TemporaryDirectory(prefix="koopmon-") as temporary, terminated_as_interrupted():
            endpoint = f"ipc://{temporary}/control" if policy else ""
            jobs = list(plan.jobs(endpoint, policy))
            _serve_and_train(jobs, policy, endpoint, store, out, Path(temporary), console)
        wanted = {job.run for job in jobs}
        rows = [row for row in _told(out) if row["run"] in wanted]
        actions = _actions(store) if policy else {}
        found |= {
            row["run"]: {**row, **actions.get(row["run"], {"num_actions": 0, "min_lr_scale": 1.0})} for row in rows
        }
    return found


def _serve_and_train(
    jobs: Sequence[Job], policy: str, endpoint: str, store: Path, out: Path, temporary: Path, console: Console
) -> None:
    (temporary / "jobs.json").write_bytes(msgspec.json.encode(jobs))
    monitor = None
    try:
        if policy:
            config, ready = temporary / "monitor.toml", temporary / "ready"
            config.write_text(
                f'[policy]\nname = "{policy}"\nmax_actions_per_hour = 100000\n[kss]\nmethod = "published"\n'
            )
            command = [sys.executable, "-m", "koopmon", "monitor", "--bind", endpoint, "--http", "127.0.0.1:0"]
            command += ["--device", "cpu", "--store", str(store), "--config", str(config), "--ready-file", str(ready)]
            monitor = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=ROOT)
            _wait(ready.exists, READY_SECONDS)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        command = [*torchrun, "--nproc-per-node", "2", "-m", "benchmarks.guarded_ranks"]
        environment = {**KEPT_MEMORY, **os.environ}
        ranks = subprocess.Popen([*command, str(temporary / "jobs.json"), str(out)], cwd=ROOT, env=environment)
        try:
            with Progress(console=console) as progress:
                task = progress.add_task(policy or "without a guard", total=len(jobs))
                while ranks.poll() is None:
                    progress.update(task, completed=out.read_text().count("\n") if out.exists() else 0)
                    time.sleep(0.5)
        finally:
            if ranks.poll() is None:
                ranks.terminate()
            ranks.wait(60.0)
        # The results count, not the exit status: gloo's threads may abort a process at its end.
        missing = {job.run for job in jobs} - {row["run"] for row in _told(out)}
        if missing:
            raise RuntimeError(f"{min(missing)}: not told; the ranks ended with status {ranks.returncode}")
    finally:
        if monitor is not None:
            monitor.terminate()
            monitor.wait(60.0)


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"the monitor did not serve within {seconds:.0f} s")
        time.sleep(0.05)


def _told(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def _actions(store: Path) -> dict[str, dict[str, Any]]:
    """Return the applied commands by run: the number of those that changed the training, and the lowest scale."""
    found = {}
    with HistoryReader.open(store) as history:
        for run in history.runs():
            applied = [
                row.command
                for decision in history.decisions(run)
                for row in decision.commands
                if row.outcome == "applied" and row.command.kind in ("set_lr_scale", "set_kss")
            ]
            scales = [command.lr_scale for command in applied if command.lr_scale is not None]
            found[run] = {"num_actions": len(applied), "min_lr_scale": min(scales, default=1.0)}
    return found


def summarise(plan: Plan, runs: Mapping[str, Mapping[str, Any]], kind: str, commit: str | None) -> dict[str, Any]:
    """Summarise one control over all rates that diverge."""
    mine = [run for lr in plan.rates for run in of(plan, runs, kind, lr)]
    dead = sum(run["died_at"] is not None for run in mine)
    interval = stats.binomtest(dead, len(mine)).proportion_ci(0.95)
    lived = [run["accuracy"] for run in mine if run["died_at"] is None]
    losses = [run["final_loss"] for run in mine if run["died_at"] is None]
    return {
        "control": kind,
        "num_runs": len(mine),
        "diverged": dead / len(mine),
        "accuracy": statistics.fmean(lived) if lived else None,
        "final_loss": statistics.fmean(losses) if losses else None,
        "low": interval.low,
        "high": interval.high,
        "by_rate": [
            f"{sum(run['died_at'] is not None for run in of(plan, runs, kind, lr))}/{plan.seeds}" for lr in plan.rates
        ],
        "actions": statistics.fmean(run["num_actions"] for run in mine),
        "commit": commit,
    }


def of(plan: Plan, runs: Mapping[str, Mapping[str, Any]], kind: str, lr: float) -> list[Mapping[str, Any]]:
    return [runs[run_name(kind, lr, seed)] for seed in range(plan.seeds)]


def replicas_equal(runs: Mapping[str, Mapping[str, Any]]) -> bool:
    return all(len(set(run["digests"])) == 1 for run in runs.values())


def healthy_runs(plan: Plan, runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Summarise the healthy runs under the guard, over all kinds and for each."""
    pairs = {}
    for kind, how in plan.kinds.items():
        names = [run_name(f"healthy-{kind}%s", how["lr"], seed) for seed in range(100, 100 + plan.healthy)]
        pairs[kind] = [(runs[name % ""], runs[name % "-guarded"]) for name in names]
    every = [pair for mine in pairs.values() for pair in mine]
    return {**_harm(every), "kinds": {kind: {**plan.kinds[kind], **_harm(mine)} for kind, mine in pairs.items()}}


def _harm(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> dict[str, Any]:
    lived = [(alone, guarded) for alone, guarded in pairs if alone["died_at"] is None]
    ratios = [
        math.inf if guarded["died_at"] is not None else guarded["final_loss"] / alone["final_loss"]
        for alone, guarded in lived
    ]
    return {
        "num_runs": len(pairs),
        "died_unguarded": len(pairs) - len(lived),
        "acted_on": sum(guarded["num_actions"] > 0 for _, guarded in pairs),
        "worst_loss_ratio": max(ratios, default=1.0),
        "identical": sum(alone["digests"] == guarded["digests"] for alone, guarded in pairs),
    }
