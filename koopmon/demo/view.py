"""Terminal output of the demonstration: a line every few steps, each applied command, and a final comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from koopmon.demo.training import DemoRecord, DemoResult, LoggedStep
from koopmon.history.reader import ObservationRow
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
    headings = ("guarded by", "outcome", "loss", "back-offs", "KSS", "highest risk")
    columns = (Column(heading, no_wrap=True) for heading in headings)
    title = "The same script, the same seeds"
    table = Table(*columns, title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for outcome in outcomes:
        end = f"diverged at step {outcome.last_step}" if outcome.diverged else "finished"
        told = Text(end, style="bold red" if outcome.diverged else "bold green")
        losses = f"{outcome.start_loss:.3g} to {outcome.final_loss:.3g}"
        table.add_row(outcome.policy or "nobody", told, losses, *_guard_cells(outcome))
    return table


def verdict(unguarded: DemoResult, guarded: DemoResult, yardstick: DemoResult | None) -> list[str]:
    """Return the conclusions of the trainings, one sentence each; `yardstick` is the same guard without KSS."""
    lines = []
    if not unguarded.diverged:
        lines.append("The unguarded training did not diverge: there was nothing to save.")
    elif guarded.survived:
        first = guarded.first_command_step
        lead = "" if first is None else f", first acting {unguarded.last_step - first} steps before that"
        lines.append(
            f"Unguarded, it diverged at step {unguarded.last_step}. koopmon saved it{lead}: "
            f"loss {guarded.start_loss:.2f} to {guarded.final_loss:.2f}."
        )
    else:
        lines.append(f"Policy {guarded.policy} did not save the training.")
    if yardstick is not None:
        with_kss = f"{guarded.final_loss:.3f} with KSS" if guarded.summary.get("num_kss") else "KSS was never turned on"
        lines.append(f"Loss at the end: {with_kss}, {yardstick.final_loss:.3f} with back-off alone (one seed).")
    return lines


def _guard_cells(outcome: DemoResult) -> tuple[str, str, str]:
    summary = outcome.summary
    if not summary:
        return "-", "-", "-"
    risk = "-" if summary["max_risk"] is None else f"{summary['max_risk']:.2f} at {summary['max_risk_step']}"
    backoffs = f"{summary['num_backoffs']}, to {summary['min_lr_scale']:.3g}" if summary["num_backoffs"] else "none"
    return backoffs, f"to {summary['max_kss_alpha']:.3g}" if summary["num_kss"] else "off", risk


def _latest(observations: Sequence[ObservationRow], step: int) -> ObservationRow | None:
    return max((row for row in observations if row.step <= step), key=lambda row: row.step, default=None)


def _number(value: float | None, width: int = 0) -> str:
    if value is None:
        return "-".rjust(width)
    if not math.isfinite(value):
        return str(value).rjust(width)
    return (f"{value:.3f}" if abs(value) < 1000 else f"{value:.1e}").rjust(width)
