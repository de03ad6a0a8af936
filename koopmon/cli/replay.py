"""`koopmon replay`: applies another policy to a recorded run, offline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from rich.table import Table

from koopmon.cli.console import print_json, results
from koopmon.cli.find_history import opened
from koopmon.cli.options import AsJson, ConfigFile, HistoryFile, Policy, RunArgument, overrides
from koopmon.config import Config, load
from koopmon.views.run_view import DecisionView

if TYPE_CHECKING:
    from koopmon.offline.replay import Replayed

Recorded: TypeAlias = dict[tuple[str, int], list[str]]
"""Recorded actions by incarnation and step."""


def replay(
    run: RunArgument = None,
    policy: Policy = None,
    config: ConfigFile = None,
    store: HistoryFile = None,
    as_json: AsJson = False,
) -> int:
    """Decide a recorded run again under another policy, and list the actions with their steps.

    Without RUN it replays the latest run. --policy and --config are those of `koopmon run`. The snapshots are the
    recorded ones: the effect of a replayed action on the training is not known.
    """
    from koopmon.offline import replay as replaying

    settings = load(config, overrides=overrides("policy", name=policy))
    with opened(run, store) as (history, _, name):
        rows = list(replaying.replay(history, name, settings))
        then = _recorded(DecisionView.of_row(row) for row in history.decisions(name))
    if as_json:
        fields = ("incarnation", "step", "recorded_risk", "risk", "phase", "reason", "lr_scale", "kss_alpha")
        snapshots = [
            {field: getattr(row, field) for field in fields} | {"actions": [action.kind for action in row.actions]}
            for row in rows
        ]
        print_json({"run": name, "policy": settings.policy.name, "snapshots": snapshots})
        return 0
    out = results()
    table = _table(f"{name} under policy {settings.policy.name}", rows, then)
    if table.row_count:
        out.print(table)
    out.print(*_words(settings, rows, then), sep="\n", soft_wrap=True)
    return 0


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
    scaled = f", LR scale down to {lowest:.3g}" if lowest < 1.0 else ""
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
