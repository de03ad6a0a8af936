"""Lead time of the alert before the loss rises: `python -m benchmarks.alert_lead`.

The training is associative recall with 2 pairs, in a decoder without normalisation at a rate that diverges, with one
step per second. Each seed runs twice: watched by a monitor with the policy `observe`, and guarded by one with the
policy `lr`. All processes are real: monitors, Prometheus (scrape and evaluation every second), Alertmanager with
deploy/alertmanager.yml, and a webhook.

The loss leaves its band at the first step at which it is more than 10% above the highest of the 20 steps before. The
lead is the number of steps from the notification to that step; it is negative if the loss came first.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import campaign
from benchmarks.alert_stack import Stack, Step, Training
from benchmarks.provenance import provenance
from benchmarks.training import MAX_LOSS, Recipe
from koopmon.history.reader import HistoryReader

RESULT = Path(__file__).parent / "results" / "alert_lead.json"
WARNING = "KoopmonRiskSpike"
WINDOW, WIDTH = 20, 1.1
RATE = 0.008
STEPS = 200
AT_ONCE = 4
"""Number of seeds at one time, with two trainings each."""
OBSERVE, ACT = "observe", "lr"


def recipe(seed: int, *, lr: float = RATE, steps: int = STEPS) -> Recipe:
    return Recipe(
        task="recall-2", norm="none", width=64, num_layers=4, batch=32, lr=lr, seed=seed, steps=steps, profile_every=0
    )


def left_band(steps: Sequence[Step]) -> Step | None:
    """Return the first step whose loss leaves the band of the steps before it; None without one."""
    for index in range(WINDOW, len(steps)):
        highest = max(step.loss for step in steps[index - WINDOW : index])
        if not steps[index].loss <= WIDTH * highest:  # also true for NaN
            return steps[index]
    return None


def lead(steps: Sequence[Step], at: float) -> int | None:
    """Return the steps from the last logged one at the time `at` to the one that left the band."""
    out = left_band(steps)
    if out is None:
        return None
    return out.step - max((step.step for step in steps if step.at <= at), default=0)


class Pair:
    """One seed, unguarded and guarded."""

    def __init__(self, stack: Stack, seed: int, *, steps: int = STEPS) -> None:
        self.seed = seed
        self._stack = stack
        self.alone: Training = stack.train(f"alone-{seed}", recipe(seed, steps=steps), OBSERVE)
        self.guarded: Training = stack.train(f"guarded-{seed}", recipe(seed, steps=steps), ACT)

    def settled(self) -> bool:
        """Return True when both trainings have their result, and stop a training that has it.

        The unguarded loss has left its band, and the alert of the guarded run has resolved, or the training has ended.
        """
        out = left_band(self.alone.steps())
        if out is not None and time.time() > out.at + 5.0:  # wait for a late alert
            self.alone.stop()
        if self.resolved_at is not None:
            self.guarded.stop()
        return self.alone.over and self.guarded.over

    @property
    def resolved_at(self) -> float | None:
        """Return the Unix time at which the guarded run's alert resolved, after an action and during the training."""
        over = self._stack.heard(self.guarded.name, WARNING, "resolved")
        steps = self.guarded.steps()
        # The end of a run resolves its alerts too, which does not count.
        if over is None or not steps or over.at > steps[-1].at or not self._acted_steps():
            return None
        return over.at

    def _acted_steps(self) -> list[int]:
        """Return the steps at which the guarded run applied a lower learning rate."""
        with HistoryReader.open(self._stack.store(ACT)) as history:
            return [
                row.acked_step
                for decision in history.decisions(self.guarded.name)
                for row in decision.commands
                if row.outcome == "applied" and row.command.kind == "set_lr_scale" and row.acked_step is not None
            ]

    def told(self) -> dict[str, Any]:
        """Return the values for the JSON."""
        alone, guarded, heard = self.alone.steps(), self.guarded.steps(), self._stack.heard
        out, warned = left_band(alone), heard(self.alone.name, WARNING, "firing")
        lost = [step.step for step in alone if not step.loss <= MAX_LOSS]
        warned_guarded, resolved = heard(self.guarded.name, WARNING, "firing"), self.resolved_at
        return {
            "seed": self.seed,
            "left_band_at": None if out is None else out.step,
            "lost_at": min(lost, default=None),
            "warned_at": None if warned is None else _step_at(alone, warned.at),
            "lead": None if warned is None else lead(alone, warned.at),
            "guarded": {
                "warned_at": None if warned_guarded is None else _step_at(guarded, warned_guarded.at),
                "acted_at": self._acted_steps(),
                "resolved_at": None if resolved is None else _step_at(guarded, resolved),
                "left_band_at": None if (moved := left_band(guarded)) is None else moved.step,
                "last_step": guarded[-1].step,
                "last_loss": guarded[-1].loss if math.isfinite(guarded[-1].loss) else None,
            },
        }


def _step_at(steps: Sequence[Step], at: float) -> int:
    return max((step.step for step in steps if step.at <= at), default=0)


def measure(seeds: Sequence[int], folder: Path, console: Console) -> list[dict[str, Any]]:
    """Run every seed, several at once: a step takes some hundredths of its second."""
    rows: list[dict[str, Any]] = []
    with Stack(folder, (OBSERVE, ACT)) as stack, console.status("trainings at a second a step"):
        for first in range(0, len(seeds), AT_ONCE):
            pairs = [Pair(stack, seed) for seed in seeds[first : first + AT_ONCE]]
            while [pair for pair in pairs if not pair.settled()]:
                time.sleep(0.5)
            rows += [pair.told() for pair in pairs]
    return rows


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarise all seeds whose loss left its band. A run without a warning counts with a lead of 0."""
    moved = [row for row in rows if row["left_band_at"] is not None]
    leads = sorted(row["lead"] or 0 for row in moved)
    return {
        "num_runs": len(rows),
        "num_left_band": len(moved),
        "num_warned": sum(row["warned_at"] is not None for row in moved),
        "num_five_steps_before": sum(each >= 5 for each in leads),
        "median_lead": float(statistics.median(leads)) if leads else None,
        "least_lead": leads[0] if leads else None,
        "num_acted": sum(bool(row["guarded"]["acted_at"]) for row in rows),
        "num_resolved": sum(row["guarded"]["resolved_at"] is not None for row in rows),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    drawn = Table("seed", "warned", "loss leaves its band", "lead", "guarded: warned", "acted", "resolved", "last loss")
    for row in rows:
        guarded = row["guarded"]
        cells = (row["seed"], row["warned_at"], row["left_band_at"], row["lead"], guarded["warned_at"])
        acted = min(guarded["acted_at"], default=None)
        drawn.add_row(*map(_cell, cells), _cell(acted), _cell(guarded["resolved_at"]), _cell(guarded["last_loss"]))
    return drawn


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.alert_lead", description=__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes (default %(default)s)")
    options = parser.parse_args(arguments)
    console = campaign.console()
    with tempfile.TemporaryDirectory(prefix="koopmon-alerts-") as temporary:
        rows = measure(range(options.seeds), Path(temporary), console)
    console.print(table(rows))
    totals = summary(rows)
    document = {"provenance": provenance(0), "learning_rate": RATE, "totals": totals, "rows": rows}
    options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    console.print(totals)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
