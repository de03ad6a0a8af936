"""Prediction of divergence from the spectrum at initialisation: `python -m benchmarks.norms`.

The sweep is associative recall (docs/method.md) over residual scheme x learning rate x seed x size. It records the
profile at the start and the outcome of each run. It compares near-unit mass and the calibrated score with the paper's
baselines in the same runs, and with the learning rate alone, both in the paper's setting (one rate) and over all rates.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import campaign
from benchmarks.campaign import Kept
from benchmarks.models import NORMS, Norm
from benchmarks.provenance import provenance
from benchmarks.scoring import auroc
from benchmarks.training import Recipe, train
from koopmon import plots
from koopmon.risk.calibration import Example, calibration_error, fit, held_out, reliability, save

RESULT = Path(__file__).parent / "results" / "norms.json"
RECIPE_LR = 0.01
"""Rate of the paper's setting."""
LRS = (0.001, 0.002, 0.003, 0.005, 0.01, 0.03)
Sizes = Sequence[tuple[int, int]]
SIZES: Sizes = ((64, 4), (128, 4), (96, 6))
PAPER_SIZES: Sizes = ((128, 4), (256, 8), (512, 12), (1024, 24))
SEEDS: Mapping[Norm, Sequence[int]] = {"none": range(5), "deep": range(2)}
EARLY = 20
SPIKE_STEPS = 100
FIRST = {"Pre-LN": "pre", "Post-LN": "post", "RMSNorm": "rms", "SubLN": "sub", "No-Norm": "none", "DeepNorm": "deep"}
REPRODUCED: Mapping[Norm, float] = {"pre": 0.12, "rms": 0.13, "post": 0.73, "sub": 0.13, "none": 0.97}
"""Near-unit mass of a plain re-implementation (docs/method.md, "Reported spectra")."""

Run = Kept[Recipe]
Score = Callable[[Run], float]


def recipes(scale: str) -> list[Recipe]:
    """Return every training of the sweep.

    Schemes without normalisation, with varied outcomes, have five seeds, DeepNorm two, and the schemes that hardly ever
    diverge one. The `paper` scale has the paper's sizes and seeds, and longer runs.
    """
    paper = scale == "paper"
    sizes = PAPER_SIZES if paper else SIZES
    steps, every = (2000, 5) if paper else (200, 1)
    return [
        Recipe(norm=norm, width=width, num_layers=layers, lr=lr, seed=seed, steps=steps, profile_every=every)
        for norm in sorted(NORMS, key=lambda norm: norm not in SEEDS)  # schemes with varied outcomes first
        for width, layers in sizes
        for index, lr in enumerate(LRS)
        for seed in ((42, 123, 456) if paper else SEEDS.get(norm, (index % 2,)))
    ]


def spikes(run: Run) -> float:
    """Count steps among the first 100 whose loss is three standard deviations above the mean of the 20 before."""
    loss = run.series["loss"][:SPIKE_STEPS]
    if len(loss) <= EARLY:  # the run diverged before there was a comparison
        return 0.0
    before = np.lib.stride_tricks.sliding_window_view(loss, EARLY)[:-1]
    return float(np.sum(loss[EARLY:] > before.mean(-1) + 3 * before.std(-1)))


SCORES: Mapping[str, Score] = {
    "update exponent": lambda run: run.scalars["initial"]["update_exponent"],
    "reliable modes": lambda run: run.scalars["initial"]["reliable_mode_ratio"],
    "near-unit mass": lambda run: run.scalars["initial"]["near_unit_mass"],
    "rho": lambda run: run.scalars["initial"]["spectral_radius"],
    "kappa(V)": lambda run: run.scalars["initial"]["eigenvector_condition_number"],
    "gradient norm, first step": lambda run: float(run.series["grad_norm"][0]),
    f"gradient norm, mean of {EARLY} steps": lambda run: float(run.series["grad_norm"][:EARLY].mean()),
    f"gradient norm, variance of {EARLY} steps": lambda run: float(run.series["grad_norm"][:EARLY].var()),
    f"loss spikes in {SPIKE_STEPS} steps": spikes,
    "learning rate": lambda run: run.case.lr,
    "learning rate x width x depth": lambda run: run.case.lr * run.case.width * run.case.num_layers,
}


def example(run: Run) -> Example:
    initial = run.scalars["initial"]
    return Example(
        update_exponent=initial["update_exponent"],
        learning_rate=run.case.lr,
        width=run.case.width,
        num_layers=run.case.num_layers,
        diverged=died(run),
    )


def died(run: Run) -> bool:
    return run.scalars["died_at"] is not None


def informative(run: Run) -> bool:
    return bool(run.scalars["initial"]["informative"])


def analyse(runs: Sequence[Run], console: Console) -> dict[str, Any]:
    """Print the tables; return them for the JSON."""
    document: dict[str, Any] = {"num_runs": len(runs), "num_diverged": sum(map(died, runs))}
    document["spectra"] = _spectra(runs, console)
    told = [run for run in runs if informative(run)]
    settings = {f"one rate ({RECIPE_LR:g})": [r for r in told if r.case.lr == RECIPE_LR], "learning-rate sweep": told}
    document["auroc"] = {}
    for title, chosen in settings.items():
        labels = [died(run) for run in chosen]
        rows = {name: auroc(labels, [score(run) for run in chosen]) for name, score in SCORES.items()}
        if title == "learning-rate sweep":
            groups: dict[str, list[Hashable]] = {
                "size": [(run.case.width, run.case.num_layers) for run in chosen],
                "scheme": [run.case.norm for run in chosen],
            }
            for kind, group in groups.items():
                told_so = held_out([example(run) for run in chosen], group)
                rows[f"calibrated score, {kind} held out"] = auroc(labels, told_so)
                document[f"calibration_error_{kind}_held_out"] = calibration_error(labels, told_so)
        table = Table("score at the start", "AUROC [95%]", title=f"{title}: {len(chosen)} runs, {sum(labels)} diverged")
        for name, area in sorted(rows.items(), key=lambda item: -(item[1].value if item[1] else 0)):
            table.add_row(name, str(area) if area else "-")
        console.print(table)
        document["auroc"][title] = {name: area and asdict(area) for name, area in rows.items()}
    for kind in ("size", "scheme"):
        console.print(f"calibration error, {kind}s held out: {document[f'calibration_error_{kind}_held_out']:.3f}")
    return document


def _spectra(runs: Sequence[Run], console: Console) -> list[dict[str, Any]]:
    rows = []
    table = Table("scheme", "runs", "diverged", "near-unit", "expansive", "rho", *(f"{lr:g}" for lr in LRS))
    for norm in NORMS:
        mine = [run for run in runs if run.case.norm == norm]
        at = {lr: [died(run) for run in mine if run.case.lr == lr] for lr in LRS}
        means = {
            field: statistics.fmean(run.scalars["initial"][field] for run in mine)
            for field in ("near_unit_mass", "expansive_mass", "spectral_radius")
        }
        share = statistics.fmean(map(died, mine))
        cells = [f"{sum(deaths)}/{len(deaths)}" for deaths in at.values()]
        table.add_row(norm, str(len(mine)), f"{share:.0%}", *(f"{value:.2f}" for value in means.values()), *cells)
        rows.append(
            {
                "norm": norm,
                "num_runs": len(mine),
                "diverged": share,
                **means,
                "by_lr": dict(zip(LRS, cells, strict=True)),
            }
        )
    console.print(table)
    return rows


def _calibrate(runs: Sequence[Run], out: Path, source: Mapping[str, Any]) -> None:
    """Write the calibrator of all runs, and a picture of its predictions for excluded sizes, beside the results."""
    examples = [example(run) for run in runs if informative(run)]
    labels, probabilities = [each.diverged for each in examples], held_out([*examples])
    error = calibration_error(labels, probabilities)
    calibrator = fit(
        examples,
        adapter="transformer",
        held_out_error=error,
        provenance={"campaign": "benchmarks.norms", "date": source["date"], "commit": source["commit"]},
    )
    save(calibrator, out.with_name("calibrator.json"))
    title = f"benchmarks.norms, sizes held out: {len(examples)} runs, error {error:.3f}"
    plots.reliability(reliability(labels, probabilities), out.with_name("reliability.png"), title=title)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.norms", description=__doc__)
    campaign.options(parser, RESULT)
    options = parser.parse_args(arguments)
    console = campaign.console()
    cases = recipes(options.scale)
    runs = campaign.run(cases, train, options.work, workers=options.workers, console=console)
    document = {"provenance": provenance(0), "scale": options.scale, **analyse(runs, console)}
    _calibrate(runs, options.out, document["provenance"])
    options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
