"""The guest never harms the host: `python -m benchmarks.fault_campaign [--seed N]` breaks everything around trainings.

Real processes and sockets: a monitor, jobs of one rank and of two under torchrun and gloo, many steps a second. A scene
is one long run, or a few, into which faults of one kind are injected one after the other at random times. The policy of
these monitors is made restless on purpose, so that commands are under way whenever something breaks.

After the scene each job's log is held against the same training repeated without koopmon: losses and parameters must be
equal in every bit where no command was due, and equal to the training with the audit log's commands at the steps of
their acks where they were. Every change of the rate must be in the audit log once, every command that it calls
applied must have changed the training once; replicas must be equal at every step. Recovery is the time from the end
of the fault until a snapshot taken after it is in the store, for each job; under a scripted monitor, until a command is
applied.

Finished scenes are kept in the work folder: an interrupted campaign goes on where it was with --work.
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
"""Within which 95% of recoveries must be."""


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
    """One row for each kind of fault."""
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
    """The least of `values` that at least `share` of them do not exceed; None of none."""
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
