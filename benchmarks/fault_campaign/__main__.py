"""Faults around guarded trainings: `python -m benchmarks.fault_campaign [--seed N]`.

Processes and sockets are real: a monitor, and jobs of one rank and of two under torchrun and gloo, with many steps per
second. A scene is one long run, or a few, with faults of one kind at random times. The policy of these monitors acts
often, so that commands are in flight during the faults.

After a scene, the log of each job is compared with a repetition of the training without koopmon. Without a command,
losses and parameters must be equal in every bit. With commands, they must equal those of a training with the commands
of the audit log at the steps of their acks. Every change of the rate must be in the audit log once, and every command
that the log calls applied must have changed the training once. Replicas must be equal at every step. The recovery is
the time from the end of the fault until a later snapshot of each job is in the store; under a scripted monitor, until a
command is applied.

The work folder keeps finished scenes, so an interrupted campaign continues with --work.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import campaign
from benchmarks.fault_campaign.machine import missing
from benchmarks.fault_campaign.scenes import KINDS, Scene, play
from benchmarks.provenance import provenance

RESULT = Path(__file__).parents[1] / "results" / "fault_campaign.json"
GOAL_SECONDS = 5.0
"""Bound on the recovery of 95% of the injections."""


def scenes(args: argparse.Namespace) -> list[Scene]:
    lacking = missing()
    found = []
    for kind, plan in KINDS.items():
        if kind in args.kinds and plan.needs not in lacking:
            count = plan.count if args.count is None else args.count
            wanted = plan.scenes if args.count is None else 1
            found += [Scene(kind=kind, number=number, count=count, seed=args.seed) for number in range(wanted)]
    return found


def by_kind(kept: Sequence[campaign.Kept[Scene]]) -> list[dict[str, Any]]:
    """Return one row for each kind of fault."""
    rows = []
    for kind in dict.fromkeys(each.case.kind for each in kept):
        scalars = [each.scalars for each in kept if each.case.kind == kind]
        injections = [injection for each in scalars for injection in each["injections"]]
        recoveries = [each["recovery_seconds"] for each in injections if each["recovery_seconds"] is not None]
        doubts = [doubt.partition(":")[0] for each in scalars for doubt in each["doubts"]]
        rows.append(
            {
                "kind": kind,
                "injections": len(injections),
                "unaffected": sum(each["unaffected"] for each in injections),
                "lost": sum(each["lost"] for each in injections) + doubts.count("lost"),
                "doubled": sum(each["doubled"] for each in injections) + doubts.count("doubled"),
                "not_recovered": len(injections) - len(recoveries),
                "recovery_median_seconds": statistics.median(recoveries) if recoveries else None,
                "recovery_p95_seconds": percentile(recoveries, 0.95),
                "recovery_max_seconds": max(recoveries, default=None),
                "slowest_step_seconds": max(each["slowest_step_seconds"] for each in injections),
                "commands": sum(each["num_commands"] for each in scalars),
                "applied": sum(each["num_applied"] for each in scalars),
                "restored": sum(each["num_restored"] for each in scalars),
                "steps": sum(each["num_steps"] for each in scalars),
                "own": KINDS[kind].own,
            }
        )
    return rows


def percentile(values: Sequence[float], share: float) -> float | None:
    """Return the smallest of `values` that a `share` of them do not exceed; None without values."""
    return sorted(values)[max(0, -int(-share * len(values) // 1) - 1)] if values else None


def report(rows: Sequence[Mapping[str, Any]], total: Mapping[str, Any], console: Console) -> None:
    table = Table(
        "fault", "injections", "unaffected", "lost", "doubled", "recovery: median", "95%", "most", "slowest step"
    )
    for row in rows:
        seconds = [row[f"recovery_{name}_seconds"] for name in ("median", "p95", "max")]
        cells = [row["injections"], row["unaffected"], row["lost"], row["doubled"]]
        shown = ["-" if each is None else f"{each:.1f} s" for each in seconds]
        table.add_row(row["kind"], *map(str, cells), *shown, f"{row['slowest_step_seconds']:.1f} s")
    console.print(table)
    console.print(
        f"{total['unaffected']} of {total['injections']} unaffected, {total['lost']} decisions lost, {total['doubled']}"
        f" doubled, {total['not_recovered']} not recovered; 95% recovered within {total['recovery_p95_seconds']:.1f} s"
        f" (goal {GOAL_SECONDS:.0f} s); {total['seconds'] / 60:.0f} minutes of scenes"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fault_campaign", description=__doc__.partition("\n")[0])
    campaign.options(parser, RESULT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="KIND")
    parser.add_argument("--count", type=int, help="injections of each kind, in one scene; default: the whole plan")
    args = parser.parse_args(arguments)
    console = campaign.console()
    for tool, words in missing().items():
        kinds = [kind for kind, plan in KINDS.items() if plan.needs == tool]
        console.print(f"[yellow]{words}: {', '.join(kinds)} are left out[/yellow]")
    kept = campaign.run(scenes(args), play, args.work, workers=args.workers, console=console)
    rows = by_kind(kept)
    recoveries = [
        injection["recovery_seconds"]
        for each in kept
        for injection in each.scalars["injections"]
        if injection["recovery_seconds"] is not None
    ]
    summed = (
        "injections",
        "unaffected",
        "lost",
        "doubled",
        "not_recovered",
        "commands",
        "applied",
        "restored",
        "steps",
    )
    total = {name: sum(row[name] for row in rows) for name in summed}
    total["recovery_p95_seconds"] = percentile(recoveries, 0.95)
    total["seconds"] = sum(each.scalars["seconds"] for each in kept)
    problems = [f"{each.case.name}: {problem}" for each in kept for problem in each.scalars["problems"]]
    result = {
        "provenance": provenance(args.seed),
        "settings": {"workers": args.workers, "goal_seconds": GOAL_SECONDS, "left_out": dict(missing())},
        "total": total,
        "kinds": rows,
        "problems": problems,
        "injections": {each.case.name: each.scalars["injections"] for each in kept},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    report(rows, total, console)
    for problem in problems[:20]:
        console.print(f"[red]{problem}[/red]")
    good = total["unaffected"] == total["injections"] and not problems and not total["not_recovered"]
    return 0 if good and (total["recovery_p95_seconds"] or 0.0) < GOAL_SECONDS else 1


if __name__ == "__main__":
    raise SystemExit(main())
