"""Does shaping the spectrum let a higher rate live, and does the model then learn? `python -m benchmarks.kss`.

Associative recall with 2 pairs, which small models learn (METHOD section 9). First a look: every setting at two rates
over four seeds. Then the cells that are quoted, over 24 other seeds. Survival alone does not count: beside the share
that diverged stands the accuracy of those that lived, and of fixed rates without any of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from scipy import stats

from benchmarks import campaign
from benchmarks.campaign import Kept
from benchmarks.provenance import provenance
from benchmarks.training import Recipe, train

RESULT = Path(__file__).parent / "results" / "kss.json"
BASE = Recipe(
    task="recall-2", norm="none", width=64, num_layers=4, batch=32, steps=400, profile_every=0, lr=0.0, seed=0
)
SPARSE = {"kss_every": 10, "layer_fraction": 0.5}
"""The published cadence: every 10th step, half of the layers."""

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "nothing": {},
    "clipping at 1.0": {"clip": 1.0},
    "clipping at 0.5": {"clip": 0.5},
    "loss spike halves the rate": {"control": "spike"},
    "spectral norm": {"spectral_norm": True},
    "published, every 10th, half": {"shaping": "published", **SPARSE},
    "published": {"shaping": "published"},
    "published, rank 16": {"shaping": "published", "kss_rank": 16},
    "published, alpha 3": {"shaping": "published", "alpha": 3.0},
    "unstable alone": {"shaping": "unstable"},
    "unstable alone, tau 2": {"shaping": "unstable", "tau_u": 2.0},
    "unstable alone, tau 2, every 10th, half": {"shaping": "unstable", "tau_u": 2.0, **SPARSE},
    "unstable alone, tau 2, alpha 3": {"shaping": "unstable", "tau_u": 2.0, "alpha": 3.0},
    "target alone": {"shaping": "target"},
    "decoupled 0.1, tau 1.5": {"shaping": "decoupled", "alpha": 0.1, "tau_u": 1.5},
    "decoupled 0.3, tau 1.5": {"shaping": "decoupled", "alpha": 0.3, "tau_u": 1.5},
    "decoupled 0.3, tau 3": {"shaping": "decoupled", "alpha": 0.3, "tau_u": 3.0},
    "decoupled 1, tau 1.5": {"shaping": "decoupled", "alpha": 1.0, "tau_u": 1.5},
    "branch 0.1, tau 1.5": {"shaping": "branch", "alpha": 0.1, "tau_u": 1.5},
    "branch 0.1, tau 3": {"shaping": "branch", "alpha": 0.1, "tau_u": 3.0},
    "branch 0.03, tau 2": {"shaping": "branch", "alpha": 0.03, "tau_u": 2.0},
    "branch 0.3, tau 2": {"shaping": "branch", "alpha": 0.3, "tau_u": 2.0},
    "branch 0.3, tau 3": {"shaping": "branch", "alpha": 0.3, "tau_u": 3.0},
    "Pre-LN, nothing": {"norm": "pre"},
    "Pre-LN, published": {"norm": "pre", "shaping": "published"},
    "Pre-LN, unstable alone, tau 2": {"norm": "pre", "shaping": "unstable", "tau_u": 2.0},
    "Pre-LN, decoupled 0.1, tau 1.5": {"norm": "pre", "shaping": "decoupled", "alpha": 0.1, "tau_u": 1.5},
    "Pre-LN, branch 0.1, tau 3": {"norm": "pre", "shaping": "branch", "alpha": 0.1, "tau_u": 3.0},
}
"""Alpha is 0.15, tau 1.05, the rank 32, every layer at every step, where nothing else is said."""
LOOK_RATES = (0.004, 0.008)
LOOK_SEEDS = range(100, 104)
RATES = (0.004, 0.006, 0.008)
QUOTED: Mapping[str, Sequence[float]] = {
    "nothing": RATES,
    "clipping at 1.0": RATES,
    "published, every 10th, half": RATES,
    "published": (0.004, 0.008),
    "branch 0.1, tau 3": RATES,
}
"""Chosen by the look: the forms as published, the best of ours for either scheme, and what they are to beat. Policies
are quoted by `benchmarks.guarded`, in real processes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One setting at one rate. `low` and `high` bound the share that diverged (95%, Clopper-Pearson)."""

    setting: str
    lr: float
    num_runs: int
    diverged: float
    low: float
    high: float
    accuracy: float | None
    """Mean over the runs that lived."""
    final_loss: float | None
    actions: float
    seconds_per_step: float
    """Of the training alone, median over the runs; what is shared by all cells of one campaign is the machine."""


def cells(wanted: Mapping[str, Sequence[float]], seeds: Sequence[int], steps: int) -> list[tuple[str, Recipe]]:
    """Every training, for settings and the rates that each is tried at."""
    return [
        (name, replace(BASE, lr=lr, seed=seed, steps=steps, **SETTINGS[name]))
        for name, rates in wanted.items()
        for lr in rates
        for seed in seeds
    ]


def summarise(name: str, lr: float, runs: Sequence[Kept[Recipe]]) -> Cell:
    lived = [run.scalars for run in runs if run.scalars["died_at"] is None]
    interval = stats.binomtest(len(runs) - len(lived), len(runs)).proportion_ci(0.95)
    return Cell(
        setting=name,
        lr=lr,
        num_runs=len(runs),
        diverged=1 - len(lived) / len(runs),
        low=float(interval.low),
        high=float(interval.high),
        accuracy=statistics.fmean(s["accuracy"] for s in lived) if lived else None,
        final_loss=statistics.fmean(s["final_loss"] for s in lived) if lived else None,
        actions=statistics.fmean(run.scalars["num_actions"] for run in runs),
        seconds_per_step=statistics.median(run.scalars["seconds_per_step"] for run in runs),
    )


def table(title: str, found: Sequence[Cell]) -> Table:
    """Settings by rates: the share that diverged, then the accuracy of those that lived."""
    rates = sorted({cell.lr for cell in found})
    drawn = Table("setting", *(f"{lr:g}" for lr in rates), title=f"{title}: diverged, accuracy of those that lived")
    for name in dict.fromkeys(cell.setting for cell in found):
        mine = {cell.lr: cell for cell in found if cell.setting == name}
        texts = [
            f"{mine[lr].diverged:.0%} {'-' if mine[lr].accuracy is None else f'{mine[lr].accuracy:.2f}'}"
            if lr in mine
            else ""
            for lr in rates
        ]
        drawn.add_row(name, *texts)
    return drawn


def train_all(wanted: Sequence[tuple[str, Recipe]], options: argparse.Namespace, console: Console) -> list[Cell]:
    """One cell for each setting and rate of `wanted`."""
    runs = campaign.run([r for _, r in wanted], train, options.work, workers=options.workers, console=console)
    grouped: dict[tuple[str, float], list[Kept[Recipe]]] = {}
    for (name, recipe), run in zip(wanted, runs, strict=True):
        grouped.setdefault((name, recipe.lr), []).append(run)
    return [summarise(name, lr, kept) for (name, lr), kept in grouped.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kss", description=__doc__)
    campaign.options(parser, RESULT)
    parser.add_argument("--look", nargs="*", choices=SETTINGS, default=list(SETTINGS), help="settings to look at")
    parser.add_argument("--quote", nargs="*", choices=QUOTED, default=list(QUOTED), help="settings to quote")
    parser.add_argument("--seeds", type=int, default=24, help="runs per quoted cell (default %(default)s)")
    parser.add_argument("--steps", type=int, default=BASE.steps)
    options = parser.parse_args(arguments)
    console = campaign.console()
    document: dict[str, Any] = {"provenance": provenance(0), "scale": options.scale, "steps": options.steps}
    stages: dict[str, tuple[Mapping[str, Sequence[float]], Sequence[int]]] = {
        "look": (dict.fromkeys(options.look, LOOK_RATES), LOOK_SEEDS),
        "cells": ({name: QUOTED[name] for name in options.quote}, range(options.seeds)),
    }
    for stage, (settings, seeds) in stages.items():
        found = train_all(cells(settings, seeds, options.steps), options, console)
        console.print(table(f"{stage}, {len(seeds)} runs each", found))
        document[stage] = [asdict(cell) for cell in found]
    options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
