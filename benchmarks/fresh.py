"""Generalisation to new runs: `python -m benchmarks.fresh`.

The calibrator of `benchmarks.norms` and the thresholds of `benchmarks.early_warning`, as in `benchmarks/results`, are
applied to new trainings: other seeds, sizes and rates, and in separate groups another initialisation and another task.
Nothing is fitted here.

This is the second such sweep. The first one, with seeds from 1000 on (results/fresh_reliable_modes.json), refuted the
former calibrator, which used the share of reliable modes: under PyTorch's initialisation its order was reversed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import campaign
from benchmarks.campaign import Kept
from benchmarks.detectors import DETECTORS
from benchmarks.early_warning import judge, remembered, table
from benchmarks.models import Norm
from benchmarks.norms import died, example, informative
from benchmarks.provenance import provenance
from benchmarks.scoring import auroc
from benchmarks.training import Recipe, train
from koopmon.risk.calibration import Calibrator, calibration_error, load

RESULT = Path(__file__).parent / "results" / "fresh.json"
RATES = (0.002, 0.005, 0.009, 0.02)
SIZES = ((72, 6), (120, 3))
SEEDS: Mapping[Norm, int] = {"none": 3, "deep": 2, "pre": 1, "post": 1, "rms": 1, "sub": 1}
FIRST_SEED = 2000
"""First seed of this sweep. No other campaign uses seeds from here on."""
OTHERS: Sequence[tuple[Mapping[str, Any], Sequence[Norm]]] = (
    ({"initialisation": "torch"}, ("none", "pre", "rms", "sub")),  # DeepNorm starts with a loss above 50 there
    ({"task": "recall-2"}, ("none", "deep", "pre")),
)

Run = Kept[Recipe]


def recipes(scale: str) -> list[Recipe]:
    """Return every training; the `paper` scale has the paper's widths and longer runs."""
    steps, every, factor = (2000, 5, 4) if scale == "paper" else (200, 1, 1)
    return [Recipe(**how, steps=steps, profile_every=every) for how in _axes(factor)]


def _axes(factor: int) -> Iterator[dict[str, Any]]:
    for norm, num_seeds in SEEDS.items():
        for width, layers in SIZES:
            for index, lr in enumerate(RATES):
                for seed in range(num_seeds):
                    # With one seed per cell, each cell has a different seed.
                    shape = {"norm": norm, "width": factor * width, "num_layers": layers, "lr": lr}
                    yield {**shape, "seed": FIRST_SEED + 10 * index + seed}
    for how, norms in OTHERS:
        for norm in norms:
            for index, lr in enumerate(RATES):
                yield {**how, "norm": norm, "width": factor * 96, "lr": lr, "seed": FIRST_SEED + 100 + index}


def group(run: Run) -> str:
    if run.case.initialisation == "torch":
        return "PyTorch's initialisation"
    return "other task" if run.case.task != "recall-4" else "other seeds, sizes, rates"


def score_start(runs: Sequence[Run], calibrator: Calibrator, console: Console) -> dict[str, Any]:
    """Return AUROC and calibration of the calibrated probability, over all runs and in each group."""
    told = [run for run in runs if informative(run)]
    groups = {"all": told, **{name: [run for run in told if group(run) == name] for name in map(group, told)}}
    found: dict[str, Any] = {}
    table = Table(
        "runs", "number", "diverged", "calibrated", "effective rate", "learning rate", "near-unit mass", "error"
    )
    for name, mine in groups.items():
        labels = [died(run) for run in mine]
        probabilities = [calibrator.probability(example(run)) for run in mine]
        areas = {
            "calibrated": auroc(labels, probabilities),
            "effective rate": auroc(labels, [run.case.lr * run.case.width * run.case.num_layers for run in mine]),
            "learning rate": auroc(labels, [run.case.lr for run in mine]),
            "near-unit mass": auroc(labels, [run.scalars["initial"]["near_unit_mass"] for run in mine]),
        }
        error = calibration_error(labels, probabilities)
        found[name] = {
            "num_runs": len(mine),
            "num_diverged": sum(labels),
            "auroc": {score: area and asdict(area) for score, area in areas.items()},
            "calibration_error": error,
        }
        texts = [str(area) if area else "-" for area in areas.values()]
        table.add_row(name, str(len(mine)), str(sum(labels)), *texts, f"{error:.3f}")
    console.print(table)
    return found


def score_warnings(runs: Sequence[Run], thresholds: Mapping[str, float], console: Console) -> list[dict[str, Any]]:
    """Score every detector at the threshold from the other runs, if there is one."""
    known = {name: detector for name, detector in DETECTORS.items() if name in thresholds}
    verdicts = [judge(name, remembered(detector), runs, limit=thresholds[name]) for name, detector in known.items()]
    verdicts.sort(key=lambda verdict: (-verdict.median_lead, -(verdict.auroc or 0)))
    console.print(table("at the thresholds of benchmarks.early_warning", verdicts))
    return [asdict(verdict) for verdict in verdicts]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fresh", description=__doc__)
    campaign.options(parser, RESULT)
    options = parser.parse_args(arguments)
    console = campaign.console()
    runs = campaign.run(recipes(options.scale), train, options.work, workers=options.workers, console=console)
    calibrator = load(RESULT.with_name("calibrator.json"))
    thresholds = json.loads(RESULT.with_name("early_warning.json").read_text(encoding="utf-8"))["thresholds"]
    document = {
        "provenance": provenance(0),
        "scale": options.scale,
        "start": score_start(runs, calibrator, console),
        "warnings": score_warnings(runs, thresholds, console),
    }
    options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
