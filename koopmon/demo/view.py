"""Terminal output of the demonstration: a line every few steps, each applied command, and a final comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from koopmon.demo.training import DemoRecord, DemoResult, LoggedStep
from koopmon.history.reader import CommandRow, ObservationRow

EVERY_STEPS = 5
HOT_RISK = 0.5
_COLUMNS = {
    "step": 6,
    "loss": 9,
    "grad": 9,
    "rho": 8,
    "update": 8,
    "M~1": 7,
    "risk": 7,
    "KSS alpha": 11,
    "lr scale": 10,
}
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
        shown = list(_COLUMNS.items())[: None if guarded else _ALONE]
        console.print(Text("".join(name.rjust(width) for name, width in shown), style="dim"))

    def update(self, heard: DemoRecord) -> None:
        for step in heard.steps:
            if step.step > self._printed_step and (step.step % EVERY_STEPS == 0 or step.diverged):
                self._print_commands(heard, step.step)
                self._print_step(heard, step)
                self._printed_step = step.step
        self._print_commands(heard, heard.steps[-1].step if heard.steps else -1)

    def _print_step(self, heard: DemoRecord, step: LoggedStep) -> None:
        widths = iter(_COLUMNS.values())
        line = Text(str(step.step).rjust(next(widths)))
        for value in (step.loss, step.grad_norm):
            line.append(_number(value, next(widths)))
        seen = _latest(heard.observations, step.step)
        if seen is not None:
            for name in ("spectral_radius", "update_ratio", "near_unit_mass"):
                line.append(_number(seen.observation.get(name), next(widths)))
            line.append(f"{seen.risk:.2f}".rjust(next(widths)), style="bold red" if seen.risk >= HOT_RISK else "green")
            for value in (seen.training.kss_alpha, seen.training.lr_scale):
                line.append(_number(value, next(widths)))
        if step.diverged:
            line.append("   diverged", style="bold red")
        self._console.print(line, soft_wrap=True)

    def _print_commands(self, heard: DemoRecord, up_to: int) -> None:
        for row in (row for decision in heard.decisions for row in decision.commands):
            if row.acked_step is None or row.acked_step > up_to or row.command.id in self._printed_commands:
                continue
            self._printed_commands.add(row.command.id)
            if row.command.kind != "set_cadence":
                self._console.print(Text(f"{row.acked_step:6d} {_outcome_words(row)}", style="yellow"), soft_wrap=True)


def summary_table(outcomes: Sequence[DemoResult]) -> Table:
    """Return a table with one row per training."""
    table = Table(title="The same script, the same seeds", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("guarded by", "outcome", "loss", "back-offs", "KSS", "highest risk"):
        table.add_column(heading, no_wrap=True)
    for outcome in outcomes:
        end = f"died at step {outcome.last_step}" if outcome.diverged else "finished"
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
            f"Unguarded it died at step {unguarded.last_step}. koopmon saved it{lead}: "
            f"loss {guarded.start_loss:.2f} to {guarded.final_loss:.2f}."
        )
    else:
        lines.append(f"Policy {guarded.policy} did not save the training.")
    lines.append(kss_verdict(guarded, yardstick))
    return lines


def kss_verdict(guarded: DemoResult, yardstick: DemoResult | None) -> str:
    """Return one sentence on the effect of KSS in these trainings."""
    policy = guarded.policy or ""
    if "kss" not in policy:
        return f"KSS: not part of policy {policy}."
    if not guarded.summary.get("num_kss"):
        return "KSS: never turned on."
    if yardstick is None:
        return "KSS acted alone: " + ("it saved the training." if guarded.survived else "it did not save the training.")
    ours, theirs = guarded.final_loss, yardstick.final_loss
    if guarded.survived != yardstick.survived:
        return (
            "KSS helped: without it the guard failed." if guarded.survived else "KSS harmed: without it the guard held."
        )
    word = "helped" if ours < theirs else "did not help"
    return f"KSS {word}: loss at the end {ours:.3f} with it, {theirs:.3f} with back-off alone (one seed, so a lead)."


def _guard_cells(outcome: DemoResult) -> tuple[str, str, str]:
    summary = outcome.summary
    if not summary:
        return "-", "-", "-"
    risk = "-" if summary["max_risk"] is None else f"{summary['max_risk']:.2f} at {summary['max_risk_step']}"
    backoffs = f"{summary['num_backoffs']}, to {summary['min_lr_scale']:.3g}" if summary["num_backoffs"] else "none"
    return backoffs, f"to {summary['max_kss_alpha']:.3g}" if summary["num_kss"] else "off", risk


def _latest(observations: Sequence[ObservationRow], step: int) -> ObservationRow | None:
    return max((row for row in observations if row.step <= step), key=lambda row: row.step, default=None)


def _outcome_words(row: CommandRow) -> str:
    command = row.command
    if command.kind == "set_lr_scale":
        change = f"learning-rate scale to {command.lr_scale:.3g}"
    elif command.kind == "set_kss" and command.kss is not None:
        change = f"KSS alpha to {command.kss.alpha:.3g}"
    else:
        change = str(command.kind)
    over = f" over {command.ramp_steps} steps" if command.ramp_steps else ""
    return f">> {change}{over} ({row.outcome}): {command.reason}"


def _number(value: float | None, width: int = 0) -> str:
    if value is None:
        return "-".rjust(width)
    if not math.isfinite(value):
        return str(value).rjust(width)
    return (f"{value:.3f}" if abs(value) < 1000 else f"{value:.1e}").rjust(width)
