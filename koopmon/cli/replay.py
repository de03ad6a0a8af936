"""`koopmon replay`: applies another policy to a recorded run, offline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from koopmon.cli.console import print_json, results
from koopmon.cli.find_history import opened
from koopmon.cli.options import POLICIES, AsJson, HistoryFile, RunArgument
from koopmon.config import Config, load
from koopmon.errors import ConfigError

if TYPE_CHECKING:
    from koopmon.history.reader import DecisionRow
    from koopmon.offline.replay import Replayed


def replay(
    run: RunArgument,
    policy: Annotated[
        str,
        typer.Option(
            metavar="FILE", help=f"Configuration, TOML: [policy], [risk], [kss]. Or a name: {', '.join(POLICIES)}."
        ),
    ],
    store: HistoryFile = None,
    as_json: AsJson = False,
) -> int:
    """Decide a recorded run again under another policy, and list the actions with their steps.

    The snapshots are the recorded ones: the effect of a replayed action on the training is not known.
    """
    from koopmon.offline import replay as replaying

    config = _config(policy)
    with opened(run, store) as (history, _):
        rows = list(replaying.replay(history, run, config))
        decisions = list(history.decisions(run))
    if as_json:
        print_json({"run": run, "policy": config.policy.name, "snapshots": [_plain(row) for row in rows]})
        return 0
    out = results()
    out.print(_table(run, config, rows, decisions))
    for line in _words(config, rows, decisions):
        out.print(line, soft_wrap=True)
    return 0


def _config(policy: str) -> Config:
    if Path(policy).is_file():
        return load(policy)
    if policy in POLICIES:
        return load(overrides={"policy": {"name": policy}})
    raise ConfigError(f"--policy {policy!r}: neither a file nor one of {', '.join(POLICIES)}")


def _plain(row: Replayed) -> dict[str, Any]:
    fields = ("incarnation", "step", "recorded_risk", "risk", "phase", "reason", "lr_scale", "kss_alpha")
    return {name: getattr(row, name) for name in fields} | {"actions": [action.kind for action in row.actions]}


def _recorded(decisions: Iterable[DecisionRow]) -> dict[tuple[str, int], list[str]]:
    """Return the recorded actions by incarnation and step."""
    found: dict[tuple[str, int], list[str]] = {}
    for decision in decisions:
        for row in decision.commands:
            if row.command.lr_scale is not None:
                text = f"learning rate x {row.command.lr_scale:.3g}"
            elif row.command.kss is not None:
                text = f"KSS alpha {row.command.kss.alpha:.3g}"
            else:
                continue
            outcome = "" if row.outcome == "applied" else f" ({row.outcome})"
            found.setdefault((decision.incarnation, decision.step), []).append(text + outcome)
    return found


def _table(run: str, config: Config, rows: Sequence[Replayed], decisions: Sequence[DecisionRow]) -> Table:
    then = _recorded(decisions)
    table = Table(
        "step", "risk then", "risk now", "done then", "done now", title=f"{run} under policy {config.policy.name}"
    )
    table.title_justify, table.title_style = "left", ""
    for row in rows:
        before = then.get((row.incarnation, row.step), [])
        now = [action.reason for action in row.actions]
        if before or now:
            risks = (f"{row.recorded_risk:.2f}", f"{row.risk:.2f}")
            table.add_row(str(row.step), *risks, "\n".join(before), "\n".join(now))
    return table


def _words(config: Config, rows: Sequence[Replayed], decisions: Sequence[DecisionRow]) -> list[str]:
    then, now = sorted(step for _, step in _recorded(decisions)), [row.step for row in rows if row.actions]
    worst = max(rows, key=lambda row: row.risk)
    span = f"{len(rows)} snapshots, steps {rows[0].step} to {rows[-1].step}"
    lines = [
        f"{span}; highest risk {worst.risk:.2f} at {worst.step}",
        f"then: {_first(then)}; now: {_first(now)}, learning rate down to {min(row.lr_scale for row in rows):.3g}",
    ]
    if now:
        lines.append("the effect of these actions on the training is not known: the states are the recorded ones")
    elif config.policy.name == "observe":
        lines.append("the policy `observe` never acts")
    return lines


def _first(steps: Sequence[int]) -> str:
    if not steps:
        return "nothing was done"
    return f"acted at {len(steps)} {'snapshot' if len(steps) == 1 else 'snapshots'}, first at step {steps[0]}"
