"""Terminal output of the demonstration: a line every few steps, each applied command, and a final comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from koopmon.demo.training import DemoRecord, DemoResult, LoggedStep
from koopmon.history.rows import ObservationRow
from koopmon.views.run_summary import RunSummary
from koopmon.views.run_view import training_commands

EVERY_STEPS = 5
HOT_RISK = 0.5
_WIDTHS = {"step": 6, "loss": 9, "grad": 9, "rho": 8, "update": 8, "M~1": 7, "risk": 7, "KSS alpha": 11, "lr scale": 10}
"""Width of each column in characters."""
_ALONE = 3
"""Number of columns for an unguarded training."""


class LiveView:
    """Prints the progress of a training. `update` takes the whole record so far and may be called at any rate."""

    def __init__(self, console: Console, title: str, *, guarded: bool) -> None:
        self._console = console
        self._printed_step = -1
        self._printed_commands: set[str] = set()
        console.print()
        console.print(Text(title, style="bold"))
        shown = list(_WIDTHS.items())[: None if guarded else _ALONE]
        console.print(Text("".join(name.rjust(width) for name, width in shown), style="dim"))

    def update(self, record: DemoRecord) -> None:
        for step in record.steps:
            if step.step > self._printed_step and (step.step % EVERY_STEPS == 0 or step.diverged):
                self._print_commands(record, step.step)
                self._print_step(record, step)
                self._printed_step = step.step
        self._print_commands(record, record.steps[-1].step if record.steps else -1)

    def _print_step(self, record: DemoRecord, step: LoggedStep) -> None:
        widths = iter(_WIDTHS.values())
        line = Text(str(step.step).rjust(next(widths)))
        for value in (step.loss, step.grad_norm):
            line.append(_number(value, next(widths)))
        seen = _latest(record.observations, step.step)
        if seen is not None:
            for name in ("spectral_radius", "update_ratio", "near_unit_mass"):
                line.append(_number(seen.observation.get(name), next(widths)))
            line.append(f"{seen.risk:.2f}".rjust(next(widths)), style="bold red" if seen.risk >= HOT_RISK else "green")
            for value in (seen.training.kss_alpha, seen.training.lr_scale):
                line.append(_number(value, next(widths)))
        if step.diverged:
            line.append("   diverged", style="bold red")
        self._console.print(line, soft_wrap=True)

    def _print_commands(self, record: DemoRecord, up_to: int) -> None:
        for each, step in training_commands(record.decisions):
            if each.step is not None and step <= up_to and each.command.id not in self._printed_commands:
                self._printed_commands.add(each.command.id)
                over = f" over {each.command.ramp_steps} steps" if each.command.ramp_steps else ""
                line = f"{step:6d} >> {each.words}{over} ({each.outcome}): {each.command.reason}"
                self._console.print(Text(line, style="yellow"), soft_wrap=True)


def summary_table(outcomes: Sequence[DemoResult]) -> Table:
    """Return a table with one row per training."""
    headings = ("training", "final loss", "actions of koopmon", "highest risk")
    table = Table(
        *(Column(heading) for heading in headings), title="The same script, the same seed", title_justify="left"
    )
    for outcome in outcomes:
        loss = f"diverged at step {outcome.last_step}" if outcome.diverged else f"{outcome.final_loss:.3f}"
        table.add_row(outcome.title, loss, *_guard_cells(outcome))
    return table


def verdict(good: DemoResult, clipped: DemoResult, guarded: DemoResult) -> str:
    """Return the conclusion: `good` has a good rate, `clipped` the rate of the demonstration, alone."""
    if clipped.is_as_good_as(good):
        return "Alone, the training was not ruined: there was nothing to save."
    alone = f"Alone and clipped, it ends at {clipped.final_loss:.2f}; at a good rate at {good.final_loss:.2f}."
    if not guarded.is_as_good_as(good):
        return f"{alone} Policy {guarded.policy} did not save it: it ends at {guarded.final_loss:.2f}."
    first = guarded.first_command_step
    acted = "" if first is None else f", which acted first at step {first},"
    return f"{alone} With koopmon{acted} it ends at {guarded.final_loss:.2f}."


def _guard_cells(outcome: DemoResult) -> tuple[str, str]:
    summary = outcome.summary
    if not summary:
        return "-", "-"
    risk = "-" if summary["max_risk"] is None else f"{summary['max_risk']:.2f} at step {summary['max_risk_step']}"
    return "; ".join(msgspec.convert(summary, RunSummary).actions()) or "none", risk


def _latest(observations: Sequence[ObservationRow], step: int) -> ObservationRow | None:
    return max((row for row in observations if row.step <= step), key=lambda row: row.step, default=None)


def _number(value: float | None, width: int = 0) -> str:
    if value is None:
        return "-".rjust(width)
    if not math.isfinite(value):
        return str(value).rjust(width)
    return (f"{value:.3f}" if abs(value) < 1000 else f"{value:.1e}").rjust(width)
