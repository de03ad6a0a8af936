"""Runs the trainings of the demonstration, alone or under `koopmon run`, and reads their progress."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from koopmon.errors import KoopmonError, StoreError
from koopmon.history.reader import HistoryReader
from koopmon.history.rows import ObservationRow
from koopmon.views.run_view import DecisionView, training_commands

SCRIPT = Path(__file__).with_name("train.py")
POLL_SECONDS = 0.5
STOP_SECONDS = 90.0
FINAL_STEPS = 20
"""Number of last steps over which the final loss is averaged."""
RUINED = 0.1
"""Nats above the final loss at a good rate from which a training counts as ruined."""


class DemoError(KoopmonError):
    """A training of the demonstration failed for another reason than divergence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Settings of a training. `batch` is sequences per rank, `context` bytes per sequence; `clip` 0 clips nothing."""

    lr: float = 0.05
    norm: str = "layer"
    clip: float = 1.0
    steps: int = 200
    warmup: int = 40
    seed: int = 0
    batch: int = 8
    context: int = 64
    width: int = 64
    layers: int = 4
    num_ranks: int = 2

    def title(self, policy: str | None) -> str:
        parts = (f"lr {self.lr:g}", "clipping" if self.clip else "", "koopmon" if policy else "")
        return ", ".join(part for part in parts if part)

    def command(self, out: Path) -> list[str]:
        """Return the torchrun command line of the training that logs to `out`."""
        values = asdict(self)
        ranks = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(values.pop("num_ranks"))]
        options = [word for name, value in values.items() for word in (f"--{name}", str(value))]
        return [sys.executable, "-m", "torch.distributed.run", *ranks, str(SCRIPT), *options, "--out", str(out)]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedStep:
    """One line of the training's own log."""

    step: int
    loss: float
    grad_norm: float
    diverged: bool


@dataclass(frozen=True, slots=True)
class DemoRecord:
    """Logged steps of one training, and its monitor's observations and decisions (empty when unguarded)."""

    steps: Sequence[LoggedStep] = ()
    observations: Sequence[ObservationRow] = ()
    decisions: Sequence[DecisionView] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """Result of a finished training. `policy` is None for an unguarded training; losses are in nats per byte."""

    setting: Setting
    policy: str | None
    record: DemoRecord
    seconds: float
    summary: dict[str, Any] = field(default_factory=dict)
    """The closing summary of `koopmon run`; empty when unguarded."""

    @property
    def title(self) -> str:
        return self.setting.title(self.policy)

    @property
    def diverged(self) -> bool:
        return any(step.diverged for step in self.record.steps)

    @property
    def last_step(self) -> int:
        return self.record.steps[-1].step

    @property
    def final_loss(self) -> float:
        """Mean loss over the last steps; infinite for a diverged run."""
        return math.inf if self.diverged else fmean(step.loss for step in self.record.steps[-FINAL_STEPS:])

    def is_as_good_as(self, good: DemoResult) -> bool:
        """Return True if this training is not ruined in comparison with `good`, a training at a good rate."""
        return self.final_loss <= good.final_loss + RUINED

    @property
    def first_command_step(self) -> int | None:
        """Step at which the first command that changes training was applied; None without such a command."""
        return min((step for step, _ in applied_commands(self.record.decisions)), default=None)


def applied_commands(decisions: Sequence[DecisionView]) -> Iterator[tuple[int, str]]:
    """Yield (step, kind) of every command that changed the training; `step` is that at which all ranks applied it."""
    for each, step in training_commands(decisions):
        if each.outcome == "applied":
            yield step, each.command.kind


def run_training(
    name: str,
    setting: Setting,
    policy: str | None,
    directory: Path,
    on_progress: Callable[[DemoRecord], None] = lambda _: None,
) -> DemoResult:
    """Train once, to the end or to divergence; `policy` None leaves it unguarded.

    The files in `directory` begin with `name`, and the run is demo-`name`. Raises DemoError when the training fails for
    another reason than divergence.
    """
    log, out = directory / f"{name}.jsonl", directory / f"{name}.output"
    store, result = directory / f"{name}.sqlite3", directory / f"{name}.json"
    for stale in (log, out, result, *directory.glob(f"{store.name}*")):
        stale.unlink(missing_ok=True)
    run, command = f"demo-{name}", setting.command(log)
    if policy is not None:
        places = ["--run", run, "--store", str(store), "--summary", str(result)]
        command = [sys.executable, "-m", "koopmon", "run", "--policy", policy, *places, "--", *command]
    # koopmon's variables would affect the runs.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("KOOPMON_")}
    environ["OMP_NUM_THREADS"] = "1"
    started = time.monotonic()
    with out.open("wb") as output:
        process = subprocess.Popen(command, env=environ, stdout=output, stderr=output)
        try:
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                on_progress(_read_record(log, store, run))
        finally:
            _terminate(process)
    record = _read_record(log, store, run)
    on_progress(record)
    if not record.steps or (process.returncode != 0 and not record.steps[-1].diverged):
        raise DemoError(f"the {name} training ended with status {process.returncode}: {_last_line(out)} (see {out})")
    summary = json.loads(result.read_text(encoding="utf-8")) if policy is not None else {}
    if policy is not None and not summary.get("adapter"):
        raise DemoError(f"koopmon did not attach to the {name} training: {_last_line(out)} (see {out})")
    return DemoResult(
        setting=setting, policy=policy, record=record, seconds=time.monotonic() - started, summary=summary
    )


def _terminate(process: subprocess.Popen[bytes]) -> None:
    """Stop a training that still runs when this process leaves early."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _read_record(log: Path, store: Path, run: str) -> DemoRecord:
    steps = list(_read_steps(log))
    try:
        with HistoryReader.open(store) as history:
            decisions = [DecisionView.of_row(row) for row in history.decisions(run)]
            return DemoRecord(steps, list(history.observations(run)), decisions)
    except StoreError:  # there is no history yet
        return DemoRecord(steps)


def _read_steps(log: Path) -> Iterator[LoggedStep]:
    try:
        text = log.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    # The last line may be incomplete.
    for line in text.split("\n")[:-1]:
        row = json.loads(line)
        yield LoggedStep(**{each.name: row[each.name] for each in fields(LoggedStep)})


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for sign in ("koopmon: not attached", "Error: ", "koopmon: ", ""):
        found = [line.strip() for line in lines if sign in line and line.strip()]
        if found:
            return found[-1]
    return "no output"
