"""`koopmon replay`: applies another policy to a recorded run, offline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

from rich.table import Table

from koopmon.cli.console import print_json, results
from koopmon.cli.find_history import opened
from koopmon.cli.options import POLICIES, AsJson, HistoryFile, RunArgument, option
from koopmon.config import Config, PolicyConfig, load
from koopmon.errors import ConfigError
from koopmon.views.run_view import DecisionView

if TYPE_CHECKING:
    from koopmon.offline.replay import Replayed

Recorded: TypeAlias = dict[tuple[str, int], list[str]]
"""Recorded actions by incarnation and step."""


def replay(
    run: RunArgument,
    policy: Annotated[
        str, option("FILE", f"Configuration, TOML: [policy], [risk], [kss]. Or a name: {', '.join(POLICIES)}.")
    ] = PolicyConfig().name,
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
        then = _recorded(DecisionView.of_row(row) for row in history.decisions(run))
    if as_json:
        fields = ("incarnation", "step", "recorded_risk", "risk", "phase", "reason", "lr_scale", "kss_alpha")
        snapshots = [
            {name: getattr(row, name) for name in fields} | {"actions": [action.kind for action in row.actions]}
            for row in rows
        ]
        print_json({"run": run, "policy": config.policy.name, "snapshots": snapshots})
        return 0
    out = results()
    table = _table(f"{run} under policy {config.policy.name}", rows, then)
    if table.row_count:
        out.print(table)
    out.print(*_words(config, rows, then), sep="\n", soft_wrap=True)
    return 0


def _config(policy: str) -> Config:
    if Path(policy).is_file():
        return load(policy)
    if policy in POLICIES:
        return load(overrides={"policy": {"name": policy}})
    raise ConfigError(f"--policy {policy!r}: neither a file nor one of {', '.join(POLICIES)}")


def _recorded(decisions: Iterable[DecisionView]) -> Recorded:
    found: Recorded = {}
    for decision in decisions:
        for each in decision.commands:
            if each.changes_training:
                outcome = "" if each.outcome == "applied" else f" ({each.outcome})"
                found.setdefault((decision.incarnation, decision.step), []).append(each.words + outcome)
    return found


def _table(title: str, rows: Sequence[Replayed], then: Recorded) -> Table:
    headings = ("step", "risk then", "risk now", "done then", "done now")
    table = Table(*headings, title=title, title_justify="left", title_style="")
    for row in rows:
        before = then.get((row.incarnation, row.step), [])
        now = [action.reason for action in row.actions]
        if before or now:
            risks = (f"{row.recorded_risk:.2f}", f"{row.risk:.2f}")
            table.add_row(str(row.step), *risks, "\n".join(before), "\n".join(now))
    return table


def _words(config: Config, rows: Sequence[Replayed], then: Recorded) -> list[str]:
    now = [row.step for row in rows if row.actions]
    lowest = min(row.lr_scale for row in rows)
    scaled = f", learning rate down to {lowest:.3g} of its schedule" if lowest < 1.0 else ""
    worst = max(rows, key=lambda row: row.risk)
    span = f"{len(rows)} snapshots, steps {rows[0].step} to {rows[-1].step}"
    lines = [
        f"{span}; highest risk {worst.risk:.2f} at {worst.step}",
        f"then: {_first(sorted(step for _, step in then))}; now: {_first(now)}{scaled}",
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
