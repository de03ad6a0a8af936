"""Effect of KSS on the highest rate and on the learning: `python -m benchmarks.kss`.

The task is associative recall with 2 pairs, which small models learn (docs/method.md). A preliminary search tries every
setting at two rates over four seeds. The main cells have 24 other seeds. Survival alone is not enough, so the tables
have the share of diverged runs and the accuracy of the others, also for fixed rates without KSS. Results in the file
with equal numbers of runs and steps are kept, with the commit of their measurement. `--again look` and `--again cells`
measure them again.
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
"""Published cadence: every 10th step, half of the layers."""
BRANCH: Mapping[str, Any] = {"shaping": "branch", "alpha": 0.6, "tau_u": 3.0}
LARGER: Mapping[str, Any] = {"width": 128, "num_layers": 6}
TEXT: Mapping[str, Any] = {"task": "text", "batch": 8}

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
    "branch 0.6, tau 2.5": {"shaping": "branch", "alpha": 0.6, "tau_u": 2.5},
    "branch 0.6, tau 3": BRANCH,
    "branch 0.6, tau 4": {"shaping": "branch", "alpha": 0.6, "tau_u": 4.0},
    "branch 1, tau 3": {"shaping": "branch", "alpha": 1.0, "tau_u": 3.0},
    "branch 1, tau 4": {"shaping": "branch", "alpha": 1.0, "tau_u": 4.0},
    "branch 0.3, tau 3, every 3rd": {"shaping": "branch", "alpha": 0.3, "tau_u": 3.0, "kss_every": 3},
    "branch 0.6, tau 3, every 3rd, 2 late": {**BRANCH, "kss_every": 3, "kss_delay": 2},
    "projected, tau 2": {"shaping": "projected", "alpha": 0.9, "tau_u": 2.0},
    "projected, tau 3": {"shaping": "projected", "alpha": 0.9, "tau_u": 3.0},
    "projected, tau 3, every 3rd, 2 late": {
        "shaping": "projected",
        "alpha": 0.9,
        "tau_u": 3.0,
        "kss_every": 3,
        "kss_delay": 2,
    },
    "D 128, L 6: nothing": LARGER,
    "D 128, L 6: clipping at 1.0": {**LARGER, "clip": 1.0},
    "D 128, L 6: published, every 10th, half": {**LARGER, "shaping": "published", **SPARSE},
    "D 128, L 6: branch 0.6, tau 3": {**LARGER, **BRANCH},
    "text: nothing": TEXT,
    "text: clipping at 1.0": {**TEXT, "clip": 1.0},
    "text: published, every 10th, half": {**TEXT, "shaping": "published", **SPARSE},
    "text: branch 0.6, tau 3": {**TEXT, **BRANCH},
    "SGD: nothing": {"optimizer": "sgd"},
    "SGD: clipping at 1.0": {"optimizer": "sgd", "clip": 1.0},
    "SGD: published, every 10th, half": {"optimizer": "sgd", "shaping": "published", **SPARSE},
    "SGD: branch 0.6, tau 3": {"optimizer": "sgd", **BRANCH},
    "Pre-LN: nothing": {"norm": "pre"},
    "Pre-LN: published": {"norm": "pre", "shaping": "published"},
    "Pre-LN: unstable alone, tau 2": {"norm": "pre", "shaping": "unstable", "tau_u": 2.0},
    "Pre-LN: decoupled 0.1, tau 1.5": {"norm": "pre", "shaping": "decoupled", "alpha": 0.1, "tau_u": 1.5},
    "Pre-LN: branch 0.1, tau 3": {"norm": "pre", "shaping": "branch", "alpha": 0.1, "tau_u": 3.0},
}
"""Defaults of a setting: alpha 0.15, tau 1.05, rank 32, every layer at every step."""
LOOK_RATES: Mapping[str, tuple[float, float]] = {
    "": (0.004, 0.008),
    "Pre-LN": (0.004, 0.008),
    "D 128, L 6": (0.003, 0.005),
    "text": (0.006, 0.012),
    "SGD": (0.1, 0.3),
}
"""Rates by the prefix of a setting's name: a lower rate, and one that diverges if any does."""
LOOK_SEEDS = range(100, 104)
RATES = (0.004, 0.006, 0.008, 0.012)
QUOTED: Mapping[str, Sequence[float]] = {
    "nothing": RATES,
    "clipping at 1.0": RATES,
    "published, every 10th, half": (0.004, 0.006, 0.008),
    "published": (0.004, 0.008),
    "branch 0.6, tau 3": RATES,
    "Pre-LN: nothing": (0.004,),
    "Pre-LN: published": (0.004,),
}
"""Settings of the main cells: the published forms, the best of ours for either scheme, and their baselines.

`benchmarks.guarded` has the policies, in real processes.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One setting at one rate. `low` and `high` bound the share of diverged runs (95%, Clopper-Pearson)."""

    setting: str
    lr: float
    num_runs: int
    diverged: float
    low: float
    high: float
    accuracy: float | None
    """Mean accuracy of the surviving runs."""
    final_loss: float | None
    actions: float
    seconds_per_step: float
    """Time of a step of the training alone, median over the runs."""
    step_ratio: float | None = None
    """Ratio to the step time without KSS at the same rate, measured at the same time."""
    commit: str
    """Commit of the measurement."""


def base_of(setting: str) -> str:
    """Return the prefix before the colon: the model, task or optimizer if it is not the default."""
    return setting.rpartition(": ")[0]


def cells(wanted: Mapping[str, Sequence[float]], seeds: Sequence[int], steps: int) -> list[tuple[str, Recipe]]:
    """Return every training of the settings at their rates."""
    return [
        (name, replace(BASE, lr=lr, seed=seed, steps=steps, **SETTINGS[name]))
        for name, rates in wanted.items()
        for lr in rates
        for seed in seeds
    ]


def summarise(name: str, lr: float, runs: Sequence[Kept[Recipe]], commit: str) -> Cell:
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
        commit=commit,
    )


def table(title: str, found: Sequence[Cell]) -> Table:
    """Print settings by rates: the share of diverged runs, then the accuracy of the others."""
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


def known(path: Path, stage: str, num_runs: int, steps: int) -> dict[tuple[str, float], Cell]:
    """Return the cells of `stage` in the file at `path` with equal numbers of runs and steps."""
    if not path.exists():
        return {}
    document = json.loads(path.read_text(encoding="utf-8"))
    if document["steps"] != steps:
        return {}
    cells = [Cell(**row) for row in document[stage]]
    return {(cell.setting, cell.lr): cell for cell in cells if cell.num_runs == num_runs}


def train_all(
    wanted: Sequence[tuple[str, Recipe]], options: argparse.Namespace, commit: str, console: Console
) -> dict[tuple[str, float], Cell]:
    """Summarise one cell for each setting and rate of `wanted`."""
    runs = campaign.run([r for _, r in wanted], train, options.work, workers=options.workers, console=console)
    grouped: dict[tuple[str, float], list[Kept[Recipe]]] = {}
    for (name, recipe), run in zip(wanted, runs, strict=True):
        grouped.setdefault((name, recipe.lr), []).append(run)
    found = {(name, lr): summarise(name, lr, kept, commit) for (name, lr), kept in grouped.items()}
    plain = {(base_of(name), lr): cell for (name, lr), cell in found.items() if name.endswith("nothing")}
    return {
        (name, lr): replace(cell, step_ratio=cell.seconds_per_step / plain[base_of(name), lr].seconds_per_step)
        if (base_of(name), lr) in plain
        else cell
        for (name, lr), cell in found.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kss", description=__doc__)
    campaign.options(parser, RESULT)
    parser.add_argument("--look", nargs="*", choices=SETTINGS, default=list(SETTINGS), help="settings to look at")
    parser.add_argument("--quote", nargs="*", choices=QUOTED, default=list(QUOTED), help="settings to quote")
    parser.add_argument("--seeds", type=int, default=24, help="runs per quoted cell (default %(default)s)")
    parser.add_argument(
        "--again", nargs="+", choices=("look", "cells"), default=[], help="measure also what the file of results has"
    )
    parser.add_argument("--steps", type=int, default=BASE.steps)
    options = parser.parse_args(arguments)
    console = campaign.console()
    about = provenance(0)
    document: dict[str, Any] = {"provenance": about, "scale": options.scale, "steps": options.steps}
    stages: dict[str, tuple[Mapping[str, Sequence[float]], Sequence[int]]] = {
        "look": ({name: LOOK_RATES[base_of(name)] for name in options.look}, LOOK_SEEDS),
        "cells": ({name: QUOTED[name] for name in options.quote}, range(options.seeds)),
    }
    for stage, (settings, seeds) in stages.items():
        found = {} if stage in options.again else known(options.out, stage, len(seeds), options.steps)
        wanted = [case for case in cells(settings, seeds, options.steps) if (case[0], case[1].lr) not in found]
        found |= train_all(wanted, options, about["commit"], console)
        chosen = [found[name, lr] for name, rates in settings.items() for lr in rates]
        console.print(table(f"{stage}, {len(seeds)} runs each", chosen))
        document[stage] = [asdict(cell) for cell in chosen]
    options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
