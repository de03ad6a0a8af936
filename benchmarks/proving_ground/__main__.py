"""Trainings at rates that are too high and with other faults: `python -m benchmarks.proving_ground`.

Small models train on real text with warm-up, cosine, and gradient clipping at 1.0 in every arm. The parts are:

- rates: peak rates over a factor of 1,000 for Pre-LN and Llama-like decoders; over a factor of 100 for Post-LN, experts
  of a mixture, state spaces, splines, Muon and weight decay (Llama-like decoder). The arms are clipping alone;
  QK-norm, which is another model; and koopmon's detector and policy with their defaults.
- rules: other remedies at three rates that are too high: ZClip, AdaGC, StableAdamW, the rate halved at a loss spike.
- faults: faults at the best rate, with clipping alone and with koopmon.
- projection: KSS by projection, which is the policy `kss`, and the policies `lr` and `kss+lr`.

The detector's thresholds were chosen on seeds 0, 1 and 2 of the two decoders. Detector and policy run inside the
training's process. Their decisions take effect two steps after the snapshot, as over the wire. A call replaces the
parts, models and faults that it measures, and keeps all others of the results.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import campaign
from benchmarks.provenance import provenance
from benchmarks.proving_ground.models import FAMILIES, NORMS, Family
from benchmarks.proving_ground.optimizers import OptimizerName
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
from benchmarks.proving_ground.training import FAILURES, Arm, Failure, Recipe, train

RESULT = Path(__file__).resolve().parent.parent / "results" / "proving_ground.json"
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
FEWER_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""Rates of the other families, and of Muon and weight decay."""
SMALL, LARGE = (64, 4), (128, 6)
SIZES = {"small": SMALL, "large": LARGE}
"""Width and number of layers."""
SEEDS = (10, 11, 12)
ARMS: tuple[Arm, ...] = ("clip", "qk_norm", "guarded")
RULES: tuple[Arm, ...] = ("zclip", "adagc", "stable_adamw", "spike", "backoff")
RULE_RATES = (1e-2, 3e-2, 1e-1)
PROJECTED: tuple[Arm, ...] = ("backoff", "projection", "projection_lr")
PROJECTED_RATES = (3e-3, 1e-2, 3e-2)
FAULT_RATE = 3e-3
HIGHER: Mapping[Failure, tuple[float, ...]] = {"no_warmup": (1e-2, 3e-2)}
"""Further rates of a fault."""
REFERENCES: Mapping[Failure, Failure] = {"shift": "shift", "stale_shift": "shift"}
"""Run with clipping alone that a fault is compared with, where it is not the one without any fault."""
BASES: Mapping[Family, Mapping[str, Any]] = {
    "moe": {"steps": 400, "batch": 8},
    "mamba": {"steps": 300, "batch": 8},
    "kan": {"steps": 400, "batch": 8},
}
"""Shorter trainings for the families whose steps take longer."""
Part = Literal["rates", "rules", "faults", "projection"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True, slots=True, order=True)
class Model:
    """A family at a size, with its optimizer: a section of the results. Only two families have a second size."""

    width: int
    num_layers: int
    family: Family
    optimizer: OptimizerName = "adamw"
    weight_decay: float = 0.0

    @property
    def is_common(self) -> bool:
        """True for the decoders whose rates cover a factor of 1,000, beside QK-norm."""
        return self.family in NORMS and (self.optimizer, self.weight_decay) == ("adamw", 0.0)

    @property
    def exists(self) -> bool:
        """True if the campaign has this model."""
        if (self.width, self.num_layers) == SMALL:
            return self.family == "rms" or (self.optimizer, self.weight_decay) == ("adamw", 0.0)
        return self.is_common

    @classmethod
    def told(cls, result: Mapping[str, Any]) -> Model:
        """Return the model of a section of the results."""
        return cls(*(result[name] for name in ("width", "num_layers", "family", "optimizer", "weight_decay")))


@dataclass(frozen=True, slots=True)
class Plan:
    """Selection of what a call measures. Clipping alone is always part of it."""

    models: Sequence[Model]
    seeds: Sequence[int]
    parts: Sequence[Part] = PARTS
    arms: Sequence[Arm] = (*ARMS, *RULES, *PROJECTED[1:])
    failures: Sequence[Failure] = FAILURES
    rates: Sequence[float] = field(default=RATES)

    def cases(self) -> list[Recipe]:
        """Return every run once."""
        return list(
            dict.fromkeys(case for model in self.models for seed in self.seeds for case in self._of(model, seed))
        )

    def _of(self, model: Model, seed: int) -> Iterator[Recipe]:
        def case(lr: float, arm: Arm, failure: Failure = "") -> Recipe:
            return Recipe(**asdict(model), **BASES.get(model.family, {}), seed=seed, lr=lr, arm=arm, failure=failure)

        arms = ["clip", *(arm for arm in self.arms if arm != "clip")]
        if "rates" in self.parts:
            rates = [lr for lr in (RATES if model.is_common else FEWER_RATES) if lr in self.rates]
            mine = [arm for arm in ARMS if arm in arms and (arm != "qk_norm" or model.is_common)]
            yield from (case(lr, arm) for arm in mine for lr in rates)
        if "projection" in self.parts and model.is_common:
            mine = [arm for arm in PROJECTED if arm in arms]
            yield from (case(lr, arm) for arm in mine for lr in PROJECTED_RATES if lr in self.rates)
        if not model.is_common or (model.width, model.num_layers) != SMALL:
            return
        if "rules" in self.parts:
            yield case(FAULT_RATE, "clip")
            rules: tuple[Arm, ...] = ("clip", "guarded", *(arm for arm in RULES if arm in arms))
            yield from (case(lr, arm) for arm in rules for lr in RULE_RATES)
        if "faults" in self.parts:
            yield case(FAULT_RATE, "clip")
            for failure, lr in fault_cases(self.failures, self.rates):
                yield from (case(lr, arm, failure) for arm in ("clip", "guarded"))
                yield case(FAULT_RATE, "clip", REFERENCES.get(failure, ""))


def fault_cases(failures: Sequence[Failure], rates: Sequence[float] = RATES) -> list[tuple[Failure, float]]:
    """Return the rates of each fault: the best one, and those of HIGHER among `rates`."""
    further = {failure: [lr for lr in HIGHER.get(failure, ()) if lr in rates] for failure in failures}
    return [(failure, lr) for failure in failures for lr in (FAULT_RATE, *further[failure])]


def fault_name(failure: Failure, lr: float) -> str:
    """Name a fault in the results."""
    return failure if lr == FAULT_RATE else f"{failure} at {lr:g}"


def analyse(runs: Sequence[Run], plan: Plan) -> list[dict[str, Any]]:
    """Summarise each model: the parts of `plan`."""
    found = []
    for model in sorted(plan.models):
        mine = of(runs, **asdict(model))
        told: dict[str, Any] = asdict(model)
        if "rates" in plan.parts:
            told |= rates_part(of(mine, failure=""))
        if "projection" in plan.parts and model.is_common:
            told["projection"] = projection_part(mine)
        if mine and model.is_common and (model.width, model.num_layers) == SMALL:
            if "rules" in plan.parts:
                told["rules"] = rules_part(of(mine, failure=""))
            if "faults" in plan.parts:
                told |= faults_part(mine, plan)
        found.append(told)
    return found


def rates_part(runs: Sequence[Run]) -> dict[str, Any]:
    """Return final losses by arm and rate, outcomes, sensitivities, and the effect of the guard."""
    _, best = best_rate(of(runs, arm="clip"))
    arms = {}
    for arm in sorted({run.case.arm for run in runs if run.case.arm in ARMS}):
        at = of(runs, arm=arm)
        rates = sorted({run.case.lr for run in at})
        arms[arm] = {
            "losses": {f"{lr:g}": [round(final_loss(run), 4) for run in of(at, lr=lr)] for lr in rates},
            "outcomes": {f"{lr:g}": [outcome(run, best) for run in of(at, lr=lr)] for lr in rates},
            "sensitivity": asdict(sensitivity(at, best)) if len(rates) == len(RATES) else None,
        }
    case = runs[0].case
    return {"steps": case.steps, "batch": case.batch, "arms": arms, **summary(runs)}


def rules_part(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the final losses of each remedy at the rates that are too high, and of clipping at the best rate."""
    arms = [arm for arm in ("clip", *RULES, "guarded") if of(runs, arm=arm)]
    losses = {
        arm: {f"{lr:g}": [round(final_loss(run), 4) for run in of(runs, arm=arm, lr=lr)] for lr in RULE_RATES}
        for arm in arms
    }
    best = [round(final_loss(run), 4) for run in of(runs, arm="clip", lr=FAULT_RATE)]
    return {"best": best, "losses": losses}


def projection_part(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the final losses by arm and rate, the number of steps under ceilings, and the largest radii."""
    arms = [arm for arm in PROJECTED if of(runs, arm=arm)]
    rates = {arm: [lr for lr in PROJECTED_RATES if of(runs, arm=arm, lr=lr)] for arm in arms}
    losses = {
        arm: {f"{lr:g}": [round(final_loss(run), 4) for run in of(runs, arm=arm, lr=lr)] for lr in rates[arm]}
        for arm in arms
    }
    held = {
        arm: {f"{lr:g}": [run.scalars["held_steps"] for run in of(runs, arm=arm, lr=lr)] for lr in rates[arm]}
        for arm in arms
        if arm != "backoff"
    }
    radii = {
        arm: {f"{lr:g}": [late_radius(run) for run in of(runs, arm=arm, lr=lr)] for lr in rates[arm]} for arm in held
    }
    return {"losses": losses, "held_steps": held, "late_radii": radii}


def late_radius(run: Run) -> float:
    """Return the largest spectral radius of a block: its median over the snapshots of the second half."""
    late = run.series["profile_step"] >= run.case.steps // 2
    return round(float(np.median(run.series["spectral_radius"][late].max(axis=1))), 2)


def faults_part(runs: Sequence[Run], plan: Plan) -> dict[str, Any]:
    """Return the effect of each fault, alone and guarded."""
    faults = {}
    for failure, lr in fault_cases(plan.failures, plan.rates):
        reference = of(runs, failure=REFERENCES.get(failure, ""), arm="clip", lr=FAULT_RATE)
        faults[fault_name(failure, lr)] = fault(of(runs, failure=failure, lr=lr), reference)
    return {"faults": faults}


def table(model: Mapping[str, Any]) -> Table:
    rates = list(model["arms"]["clip"]["losses"])
    drawn = Table("arm", *rates, "sensitivity", title=f"{title(model)}: validation loss, mean [95%] over seeds")
    for arm, told in model["arms"].items():
        losses = [told["losses"].get(rate) for rate in rates]
        cells = ["-" if not each else str(interval(each)) for each in losses]
        spread = told["sensitivity"]
        drawn.add_row(arm, *cells, "-" if spread is None else f"{spread['mean']:.3f}")
    return drawn


def rules_table(model: Mapping[str, Any]) -> Table:
    told = model["rules"]
    drawn = Table("remedy", *(f"{lr:g}" for lr in RULE_RATES), title=f"{title(model)}: best {interval(told['best'])}")
    for arm, losses in told["losses"].items():
        drawn.add_row(arm, *(str(interval(each)) if each else "-" for each in losses.values()))
    return drawn


def title(model: Mapping[str, Any]) -> str:
    return (
        f"{model['family']}, D {model['width']}, L {model['num_layers']}, {model['optimizer']}, "
        f"weight decay {model['weight_decay']:g}"
    )


def show(models: Sequence[Mapping[str, Any]], console: Console) -> None:
    for model in models:
        if "arms" in model:
            console.print(table(model))
            healthy = model["healthy"]
            console.print(
                f"best rate {model['best_rate']:g} ({model['best_loss']:.3f}); guarded runs up to it untouched: "
                f"{healthy['untouched']:.0%} of {healthy['num_runs']}; above it within 0.05 of the best: "
                f"{model['within_0.05']} of {model['num_above']}; acted before the loss showed it in "
                f"{model['acted_before_shown']} of {model['ruined_alone']}"
            )
        if "rules" in model:
            console.print(rules_table(model))
        for name, told in model.get("faults", {}).items():
            console.print(
                f"{name}: alone {interval(told['clip'])}, guarded {interval(told['guarded'])}, without the fault "
                f"{interval(told['reference'])}; acted in {told['acted']}, within {FAULT_TOLERANCE} of the run "
                f"without the fault: alone {told['alone_within']}, guarded {told['guarded_within']}"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proving_ground", description=__doc__)
    campaign.options(parser, RESULT)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="held out from the detector's choice")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    every = (*ARMS, *RULES, *PROJECTED[1:])
    parser.add_argument("--arms", nargs="+", choices=every, default=every, help="beside clip, which is always trained")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=[*SIZES], help="large: the first two families")
    parser.add_argument("--optimizers", nargs="+", choices=("adamw", "muon"), default=("adamw", "muon"))
    parser.add_argument("--decays", type=float, nargs="+", choices=(0.0, 0.1), default=(0.0, 0.1), help="weight decay")
    parser.add_argument("--rates", type=float, nargs="+", choices=RATES, default=RATES, help="also of a fault's HIGHER")
    parser.add_argument("--failures", nargs="+", choices=FAILURES, default=FAILURES, help="of the part `faults`")
    options = parser.parse_args(arguments)
    console = campaign.console()
    possible = (
        Model(*SIZES[size], family, optimizer, decay)
        for size in options.sizes
        for family in options.families
        for optimizer in options.optimizers
        for decay in options.decays
    )
    plan = Plan(
        models=[model for model in possible if model.exists],
        seeds=options.seeds,
        parts=options.parts,
        arms=options.arms,
        failures=options.failures,
        rates=options.rates,
    )
    runs = campaign.run(plan.cases(), train, options.work, workers=options.workers, console=console)
    models = analyse(runs, plan)
    show(models, console)
    about = {"provenance": provenance(0), "seeds": list(options.seeds)}
    known = json.loads(options.out.read_text(encoding="utf-8"))["models"] if options.out.exists() else []
    document = {"models": merged(known, [signed(model, about) for model in models])}
    options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


def signed(model: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """Add the provenance and the seeds to each part of a model."""
    found = dict(model)
    if "arms" in model:
        found |= about
    if "rules" in model:
        found["rules"] = {**model["rules"], **about}
    if "projection" in model:
        found["projection"] = {**model["projection"], **about}
    brief = {"seeds": about["seeds"], "commit": about["provenance"]["commit"]}
    found["faults"] = {name: {**told, **brief} for name, told in model.get("faults", {}).items()}
    return found


def merged(known: Sequence[Mapping[str, Any]], measured: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the known models with the parts and faults of `measured` in place of their own."""
    found = {Model.told(model): dict(model) for model in known}
    for model in measured:
        before = found.get(Model.told(model), {})
        faults = {**before.get("faults", {}), **model["faults"]}
        found[Model.told(model)] = {**before, **model, "faults": faults}
    return [
        found[model] for model in sorted(found, key=lambda each: (astuple(each)[0], FAMILIES.index(each.family), each))
    ]


if __name__ == "__main__":
    raise SystemExit(main())
