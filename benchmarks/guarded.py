"""The whole product beside manual remedies: `python -m benchmarks.guarded`.

The task is associative recall with 2 pairs (docs/method.md) on two gloo ranks, No-Norm at rates that diverge. The
controls are none, clipping at 1.0 and 0.5, a rate halved at each loss spike, and koopmon's policies, over the same
seeds. Fixed safe rates and healthy runs, plain and guarded, are beside them. One monitor and one torchrun serve all
runs of a policy in turn, with real processes and sockets. `--only lr` measures the rows of that policy again and keeps
the others, each with the commit of its measurement.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import campaign
from benchmarks.guarded_runs import BASE, POLICIES, Plan, healthy_runs, of, replicas_equal, summarise, train_all
from benchmarks.provenance import provenance

RESULT = Path(__file__).parent / "results" / "guarded.json"


def analyse(plan: Plan, runs: Mapping[str, Mapping[str, Any]], commit: str | None, console: Console) -> dict[str, Any]:
    """Print the two tables; return them for the JSON."""
    best = max(
        statistics.fmean(run["accuracy"] if run["died_at"] is None else 0.0 for run in of(plan, runs, "fixed", lr))
        for lr in plan.fixed
    )
    rows = [summarise(plan, runs, kind, commit) for kind in (*plan.by_hand, *plan.policies)]
    console.print(table(plan, rows, best))
    healthy = healthy_runs(plan, runs)
    console.print(
        f"healthy: {healthy['acted_on']} of {healthy['num_runs']} runs acted on; final loss at most "
        f"{healthy['worst_loss_ratio'] - 1:+.2%} of that without koopmon; bit-identical: {healthy['identical']}"
    )
    return {"best_fixed_accuracy": best, "rows": rows, "healthy": healthy, "replicas_equal": replicas_equal(runs)}


def again(
    plan: Plan, before: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]], commit: str | None, console: Console
) -> dict[str, Any]:
    """Merge the results of `analyse` into `before`, for the policies of the plan.

    Raises ValueError if `before` has other rates, seeds or steps.
    """
    for name in ("rates", "seeds", "steps"):
        known, wanted = before["plan"][name], json.loads(json.dumps(plan.told()[name]))
        if known != wanted:
            raise ValueError(f"{name} = {wanted}: the file of results has {known}; measure all of it again")
    rows = [
        summarise(plan, runs, row["control"], commit) if row["control"] in plan.policies else row
        for row in before["rows"]
    ]
    console.print(table(plan, rows, before["best_fixed_accuracy"]))
    return {**before, "rows": rows, "replicas_equal": before["replicas_equal"] and replicas_equal(runs)}


def table(plan: Plan, rows: Sequence[Mapping[str, Any]], best: float) -> Table:
    drawn = Table("control", "diverged [95%]", *(f"{lr:g}" for lr in plan.rates), "accuracy", "actions")
    drawn.title = f"Rates that kill; the best fixed rate ends at accuracy {best:.2f}"
    for row in rows:
        share = f"{row['diverged']:.0%} [{row['low']:.0%}, {row['high']:.0%}]"
        accuracy = "-" if row["accuracy"] is None else f"{row['accuracy']:.2f}"
        drawn.add_row(row["control"], share, *row["by_rate"], accuracy, f"{row['actions']:.1f}")
    return drawn


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guarded", description=__doc__)
    parser.add_argument("--scale", choices=("default", "paper"), default="default", help="paper: for days")
    parser.add_argument("--seeds", type=int, help=f"per rate (default {Plan().seeds}; paper 24)")
    kinds, each = len(Plan().kinds), Plan().healthy
    parser.add_argument("--healthy", type=int, help=f"runs of each of {kinds} kinds (default {each})")
    parser.add_argument("--steps", type=int, default=BASE.steps)
    parser.add_argument("--only", nargs="+", choices=POLICIES, help="measure these again, at the rates that diverge")
    parser.add_argument("--work", type=Path, help="folder of finished runs, to go on with; default: a fresh one")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes (default %(default)s)")
    options = parser.parse_args(arguments)
    wide = options.scale == "paper"
    seeds = options.seeds or (24 if wide else Plan().seeds)
    healthy = options.healthy or (100 if wide else Plan().healthy)
    plan = Plan(base=replace(BASE, steps=options.steps), seeds=seeds, healthy=healthy)
    if options.only:
        plan = replace(plan, policies=tuple(options.only), healthy=0)
    console = campaign.console()
    folder = options.work or Path(tempfile.mkdtemp(prefix="koopmon-guarded-"))
    console.print(f"[dim]runs are kept in {folder}[/dim]")
    about = provenance(0)
    document: dict[str, Any]
    if options.only:
        before = json.loads(RESULT.read_text(encoding="utf-8"))
        runs = train_all(plan, folder, console, alone=False)
        document = again(plan, before, runs, about["commit"], console)
    else:
        runs = train_all(plan, folder, console)
        document = {"provenance": about, "plan": plan.told(), **analyse(plan, runs, about["commit"], console)}
    options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
