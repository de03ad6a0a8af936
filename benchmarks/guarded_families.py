"""The guard on the other families: `python -m benchmarks.guarded_families`.

The setup is that of `benchmarks.guarded`, on synthetic text, with blocks of experts, state spaces, splines and
transformers. The runs have no normalisation and rates that diverge, with manual remedies and under each policy. Fixed
safe rates, and healthy runs with the usual normalisation, are beside them. The adapters' own thresholds are in force.
`--only lr` measures the rows of that policy again and keeps the others, each with the commit of its measurement.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import campaign
from benchmarks.family_alarms import ADAPTERS
from benchmarks.guarded_runs import (
    BASE,
    BY_HAND,
    POLICIES,
    Plan,
    healthy_runs,
    of,
    replicas_equal,
    summarise,
    train_all,
)
from benchmarks.provenance import provenance

RESULT = Path(__file__).parent / "results" / "guarded_families.json"
FAMILIES = tuple(ADAPTERS)
PLAN = Plan(
    base=replace(BASE, task="text", batch=16, steps=120, warmup=10),
    by_hand={name: BY_HAND[name] for name in ("nothing", "clipping at 1.0")},
    kinds={"pre": {"norm": "pre", "lr": 0.003}},
    rates=(0.015, 0.02, 0.03, 0.05),
    fixed=(0.003, 0.01),
    seeds=4,
    healthy=4,
)

FEWER_SEEDS: Mapping[str, int] = {"mamba": 2}
"""A step of state spaces takes three times as long, so they have fewer runs."""


def analyse(plan: Plan, runs: Mapping[str, Mapping[str, Any]], commit: str | None) -> dict[str, Any]:
    """Rows of one family, its best fixed rate by the final loss, and its healthy runs."""
    ends = {lr: [run["final_loss"] for run in of(plan, runs, "fixed", lr)] for lr in plan.fixed}
    means = {lr: math.inf if None in losses else statistics.fmean(losses) for lr, losses in ends.items()}
    best = min(means, key=lambda lr: means[lr])
    return {
        "best_fixed_lr": best,
        "best_fixed_loss": None if math.isinf(means[best]) else means[best],
        "rows": [summarise(plan, runs, kind, commit) for kind in (*plan.by_hand, *plan.policies)],
        "healthy": healthy_runs(plan, runs),
        "replicas_equal": replicas_equal(runs),
    }


def again(
    plan: Plan, before: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]], commit: str | None
) -> dict[str, Any]:
    """Return the results of one family, `before`, with new rows for the policies of the plan."""
    rows = [
        summarise(plan, runs, row["control"], commit) if row["control"] in plan.policies else row
        for row in before["rows"]
    ]
    return {**before, "rows": rows, "replicas_equal": before["replicas_equal"] and replicas_equal(runs)}


def table(family: str, found: Mapping[str, Any], plan: Plan) -> Table:
    drawn = Table("control", "diverged", *(f"{lr:g}" for lr in plan.rates), "loss at the end", "actions")
    best, healthy = found["best_fixed_loss"], found["healthy"]
    drawn.title = (
        f"{family}: best fixed rate {found['best_fixed_lr']:g}, loss {'-' if best is None else f'{best:.2f}'}; "
        f"healthy: {healthy['acted_on']} of {healthy['num_runs']} acted on, {healthy['identical']} bit-identical"
    )
    for row in found["rows"]:
        loss = "-" if row["final_loss"] is None else f"{row['final_loss']:.2f}"
        drawn.add_row(row["control"], f"{row['diverged']:.0%}", *row["by_rate"], loss, f"{row['actions']:.1f}")
    return drawn


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guarded_families", description=__doc__)
    parser.add_argument("--scale", choices=("default", "paper"), default="default", help="paper: for days")
    parser.add_argument(
        "--family", nargs="+", choices=FAMILIES, default=FAMILIES, help="measure these, keep the others"
    )
    parser.add_argument("--only", nargs="+", choices=POLICIES, help="measure these again, at the rates that diverge")
    parser.add_argument("--work", type=Path, help="folder of finished runs, to go on with; default: a fresh one")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes (default %(default)s)")
    options = parser.parse_args(arguments)
    plan = replace(PLAN, seeds=24, healthy=24) if options.scale == "paper" else PLAN
    console: Console = campaign.console()
    folder = options.work or Path(tempfile.mkdtemp(prefix="koopmon-guarded-families-"))
    console.print(f"[dim]runs are kept in {folder}[/dim]")
    about = provenance(0)
    known = json.loads(options.out.read_text(encoding="utf-8"))["families"] if options.out.exists() else {}
    if options.only and (missing := [family for family in options.family if family not in known]):
        parser.error(f"--only: {options.out} has no results of {', '.join(missing)}; measure all of them first")
    families = {}
    for family in FAMILIES:
        if family in options.family:
            seeds = plan.seeds if options.scale == "paper" else FEWER_SEEDS.get(family, plan.seeds)
            mine = replace(plan, base=replace(plan.base, family=family), seeds=seeds)
            if options.only:
                mine = replace(mine, policies=tuple(options.only), healthy=0)
                runs = train_all(mine, folder / family, console, alone=False)
                families[family] = again(mine, known[family], runs, about["commit"])
            else:
                families[family] = analyse(mine, train_all(mine, folder / family, console), about["commit"])
        elif family in known:
            families[family] = known[family]
        else:
            continue
        console.print(table(family, families[family], plan))
    document = {"provenance": about, "plan": plan.told(), "families": families}
    options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
