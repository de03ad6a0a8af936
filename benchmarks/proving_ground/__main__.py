"""Sensitivity of trainings to the learning rate: `python -m benchmarks.proving_ground`.

Pre-LN and Llama-like decoders train on real text with AdamW, warm-up, cosine, and gradient clipping at 1.0 in every
arm. There are seven peak rates over a factor of 1,000, and six faults at one rate. The arms are
clipping alone; QK-norm, which is another model; ZClip; AdaGC; the rate halved at a loss spike; and koopmon's detector
and policy with their defaults. The detector's thresholds were chosen on other seeds (0, 1, 2). Detector and policy run
inside the training's process. Their decisions take effect two steps after the snapshot, as over the wire.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import campaign
from benchmarks.provenance import provenance
from benchmarks.proving_ground.models import NORMS
from benchmarks.proving_ground.outcomes import (
    FAULT_TOLERANCE,
    Run,
    best_rate,
    fault,
    final_loss,
    interval,
    of,
    outcome,
    sensitivity,
    summary,
)
from benchmarks.proving_ground.training import FAILURES, Arm, Recipe, train

RESULT = Path(__file__).resolve().parent.parent / "results" / "proving_ground.json"
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SMALL, LARGE = (64, 4), (128, 6)
SIZES = {"small": SMALL, "large": LARGE}
"""Width and number of layers."""
SEEDS = (10, 11, 12)
ARMS: tuple[Arm, ...] = ("clip", "qk_norm", "guarded")
BASELINES: tuple[Arm, ...] = ("zclip", "adagc", "spike", "backoff")
BASELINE_RATES = (1e-2, 1e-1)
FAULT_RATE = 3e-3


def plan(seeds: Sequence[int], sizes: Sequence[tuple[int, int]]) -> Iterator[Recipe]:
    """Return every case; the baselines have two rates, and the faults have the small size only."""
    for (width, num_layers), family, seed in (
        (size, family, seed) for size in sizes for family in NORMS for seed in seeds
    ):

        def case(lr: float, arm: Arm, **more: Any) -> Recipe:
            return Recipe(family=family, width=width, num_layers=num_layers, seed=seed, lr=lr, arm=arm, **more)  # noqa: B023

        yield from (case(lr, arm) for arm in ARMS for lr in RATES)
        if (width, num_layers) == SMALL:
            yield from (case(lr, arm) for arm in BASELINES for lr in BASELINE_RATES)
            yield from (case(FAULT_RATE, arm, failure=each) for each in FAILURES for arm in ("clip", "guarded"))


def analyse(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Summarise each model: final losses by arm and rate, outcomes, sensitivities, and the effect of the guard."""
    found = []
    for width, num_layers, family in sorted({(r.case.width, r.case.num_layers, r.case.family) for r in runs}):
        mine = of(runs, width=width, num_layers=num_layers, family=family)
        plain = of(mine, failure="")
        _, best = best_rate(of(plain, arm="clip"))
        arms = {}
        for arm in sorted({run.case.arm for run in plain}):
            at = of(plain, arm=arm)
            rates = sorted({run.case.lr for run in at})
            arms[arm] = {
                "losses": {f"{lr:g}": [round(final_loss(run), 4) for run in of(at, lr=lr)] for lr in rates},
                "outcomes": {f"{lr:g}": [outcome(run, best) for run in of(at, lr=lr)] for lr in rates},
                "sensitivity": asdict(sensitivity(at, best)) if len(rates) == len(RATES) else None,
            }
        unfaulted = of(plain, arm="clip", lr=FAULT_RATE)
        found.append(
            {
                "width": width,
                "num_layers": num_layers,
                "family": family,
                "arms": arms,
                "unfaulted": [round(final_loss(run), 4) for run in unfaulted],
                "faults": {each: fault(of(mine, failure=each), unfaulted) for each in FAILURES},
                **summary(plain),
            }
        )
    return found


def table(model: Mapping[str, Any]) -> Table:
    title = f"{model['family']}, D {model['width']}, L {model['num_layers']}: validation loss, mean [95%] over seeds"
    drawn = Table("arm", *(f"{lr:g}" for lr in RATES), "sensitivity", title=title)
    for arm, told in model["arms"].items():
        losses = [told["losses"].get(f"{lr:g}") for lr in RATES]
        cells = ["-" if not each else str(interval(each)) for each in losses]
        spread = told["sensitivity"]
        drawn.add_row(arm, *cells, "-" if spread is None else f"{spread['mean']:.3f}")
    return drawn


def show(models: Sequence[Mapping[str, Any]], console: Console) -> None:
    for model in models:
        console.print(table(model))
        healthy = model["healthy"]
        console.print(
            f"best rate {model['best_rate']:g} ({model['best_loss']:.3f}); guarded runs up to it untouched: "
            f"{healthy['untouched']:.0%} of {healthy['num_runs']}; above it within 0.05 of the best: "
            f"{model['within_0.05']} of {model['num_above']}; acted before the loss showed it in "
            f"{model['acted_before_shown']} of {model['ruined_alone']}"
        )
        for name, told in model["faults"].items():
            if told["guarded"]:
                console.print(
                    f"{name}: alone {interval(told['clip'])}, guarded {interval(told['guarded'])}, without the fault "
                    f"{interval(model['unfaulted'])}; acted in {told['acted']}, within {FAULT_TOLERANCE} of the run "
                    f"without the fault: alone {told['alone_within']}, guarded {told['guarded_within']}"
                )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proving_ground", description=__doc__)
    campaign.options(parser, RESULT)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="held out from the detector's choice")
    every = (*ARMS, *BASELINES)
    parser.add_argument("--arms", nargs="+", choices=every, default=every, help="beside clip, which is always trained")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=[*SIZES], help="others keep their kept results")
    options = parser.parse_args(arguments)
    console = campaign.console()
    sizes = [SIZES[name] for name in options.sizes]
    cases = [case for case in plan(options.seeds, sizes) if case.arm in ("clip", *options.arms)]
    runs = campaign.run(cases, train, options.work, workers=options.workers, console=console)
    models = analyse(runs)
    show(models, console)
    told = {"provenance": provenance(0), "seeds": list(options.seeds)}
    models = [{**model, **told} for model in models]
    models = sorted([*kept_models(options.out, sizes), *models], key=itemgetter("width", "family"))
    document = {"models": models}
    options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


def kept_models(path: Path, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """Return the models of an earlier result whose size is not one of `sizes`."""
    if not path.exists():
        return []
    models = json.loads(path.read_text(encoding="utf-8"))["models"]
    return [model for model in models if (model["width"], model["num_layers"]) not in sizes]


if __name__ == "__main__":
    raise SystemExit(main())
