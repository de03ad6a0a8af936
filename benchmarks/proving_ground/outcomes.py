"""Outcomes of runs and arms: final losses, learning-rate sensitivity, intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from benchmarks.campaign import Kept
from benchmarks.proving_ground.training import Recipe

Outcome = Literal["diverged", "ruined", "spiked", "healthy"]
RUINED = 0.1
"""Nats above the loss at the best rate from which a finished run counts as ruined."""
SPIKE, BAND = 1.1, 20
"""Factor on the highest loss of the steps before, after the warm-up, above which a loss is a spike."""
FAULT_TOLERANCE = 0.03
"""Nats above the same run without the fault up to which a fault did no harm."""
RESAMPLES = 2000

Run = Kept[Recipe]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its 95% bootstrap interval over runs."""

    mean: float
    low: float
    high: float
    num_runs: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Compute the interval. Raises ValueError without values."""
    if not values:
        raise ValueError("values: at least one is needed")
    drawn = np.random.default_rng(seed).choice(np.asarray(values), (RESAMPLES, len(values)))
    low, high = np.quantile(drawn.mean(axis=1), (0.025, 0.975))
    return Interval(statistics.fmean(values), float(low), float(high), len(values))


def final_loss(run: Run) -> float:
    """Return the final validation loss in nats, or the initial one if it is lower or the run diverged."""
    first, last = run.scalars["first_loss"], run.scalars["final_loss"]
    return float(first if last is None or not math.isfinite(last) else min(first, last))


def outcome(run: Run, best_loss: float) -> Outcome:
    """Classify a run; `best_loss` is that of the best rate with clipping alone, for the same model and seeds."""
    if run.scalars["diverged_at"] is not None:
        return "diverged"
    if final_loss(run) > best_loss + RUINED:
        return "ruined"
    return "spiked" if spiked(run.series["loss"][run.case.warmup :]) else "healthy"


def spiked(losses: np.ndarray[Any, Any]) -> bool:
    return any(losses[t] > SPIKE * losses[t - BAND : t].max() for t in range(BAND, len(losses)))


def of(runs: Iterable[Run], **fields: object) -> list[Run]:
    """Return the runs whose case has these values."""
    return [run for run in runs if all(getattr(run.case, name) == value for name, value in fields.items())]


def best_rate(runs: Sequence[Run]) -> tuple[float, float]:
    """Return the rate with the lowest mean loss over seeds and that loss, for runs of one model with clipping alone."""
    rates = sorted({run.case.lr for run in runs})
    means = {lr: statistics.fmean(final_loss(run) for run in of(runs, lr=lr)) for lr in rates}
    lr = min(means, key=means.__getitem__)
    return lr, means[lr]


def sensitivity(runs: Sequence[Run], best_loss: float) -> Interval:
    """Compute the learning-rate sensitivity (Wortsman et al. 2023, arXiv 2309.14322).

    It is the mean over rates of the final loss minus `best_loss`, for each seed; the interval is over seeds.
    """
    seeds = sorted({run.case.seed for run in runs})
    return interval([statistics.fmean(final_loss(run) for run in of(runs, seed=seed)) - best_loss for seed in seeds])


def false_alarms(runs: Sequence[Run]) -> dict[str, float]:
    """Return the share of healthy guarded runs without an action, and the actions per 1,000 steps."""
    steps = sum(len(run.series["loss"]) for run in runs)
    touched = [run for run in runs if run.scalars["num_actions"]]
    return {
        "num_runs": len(runs),
        "untouched": 1.0 - len(touched) / len(runs) if runs else math.nan,
        "actions_per_1000_steps": 1000.0 * sum(r.scalars["num_actions"] for r in runs) / steps if steps else math.nan,
    }


def shown_at(alone: Run, healthy: Run) -> int | None:
    """Return the step from which the loss of `alone` shows that the run is ruined.

    From there its mean over 20 steps stays 0.1 above that of `healthy`, the same seed at the best rate. None without
    such a step.
    """
    width = BAND
    length = min(len(alone.series["loss"]), len(healthy.series["loss"]))
    kernel = np.ones(width) / width
    above = np.convolve(alone.series["loss"][:length] - healthy.series["loss"][:length], kernel, mode="valid") > RUINED
    if alone.scalars["diverged_at"] is not None:
        return int(alone.scalars["diverged_at"])
    if not len(above) or not above[-1]:
        return None
    below = np.flatnonzero(~above)
    return int(below[-1] + width if len(below) else width - 1)


def summary(runs: Sequence[Run]) -> Mapping[str, Any]:
    """Return for each guarded run of one model if it ends near the best loss, by the factor on the best rate."""
    alone = of(runs, arm="clip", failure="")
    rate, best = best_rate(alone)
    guarded = of(runs, arm="guarded", failure="")
    above = [run for run in guarded if run.case.lr > 2.0 * rate]
    healthy = [run for run in guarded if run.case.lr <= rate]
    leads = []
    within = 0
    for run in above:
        same = of(alone, lr=run.case.lr, seed=run.case.seed)
        reference = of(alone, lr=rate, seed=run.case.seed)
        if not same or not reference or outcome(same[0], best) not in ("ruined", "diverged"):
            continue
        within += final_loss(run) <= best + 0.05
        shown = shown_at(same[0], reference[0])
        acted = run.scalars["first_action"]
        leads.append(None if acted is None or shown is None else shown - acted)
    known = [lead for lead in leads if lead is not None]
    return {
        "best_rate": rate,
        "best_loss": best,
        "healthy": false_alarms(healthy),
        "ruined_alone": len(leads),
        "ruined_within": within,
        "acted_before_shown": sum(lead > 0 for lead in known),
        "median_lead_steps": statistics.median(known) if known else None,
        "within_0.05": sum(final_loss(run) <= best + 0.05 for run in above),
        "num_above": len(above),
        "rewound": sum(run.scalars.get("num_rewinds", 0) > 0 for run in above),
        "median_lost_steps": statistics.median(lost) if (lost := [_lost(run) for run in above if _lost(run)]) else None,
    }


def _lost(run: Run) -> int:
    """Return the number of steps that the rewinds of a run cost."""
    return int(run.scalars.get("lost_steps", 0))


def fault(runs: Sequence[Run], references: Sequence[Run]) -> Mapping[str, Any]:
    """Compare the runs with one fault, alone and guarded, with the references of the same seeds without it."""
    alone, guarded = of(runs, arm="clip"), of(runs, arm="guarded")
    reference = {run.case.seed: run for run in references}

    def above(run: Run) -> float:
        return final_loss(run) - final_loss(reference[run.case.seed])

    ruined = [run for run in alone if above(run) > RUINED or run.scalars["diverged_at"] is not None]
    partners = [(run, same[0]) for run in ruined if (same := of(guarded, seed=run.case.seed))]
    leads = []
    for run, partner in partners:
        shown, acted = shown_at(run, reference[run.case.seed]), partner.scalars["first_action"]
        if shown is not None and acted is not None:
            leads.append(shown - acted)
    return {
        "reference": [round(final_loss(run), 4) for run in references],
        "clip": [round(final_loss(run), 4) for run in alone],
        "guarded": [round(final_loss(run), 4) for run in guarded],
        "alone_within": sum(above(run) <= FAULT_TOLERANCE for run in alone),
        "guarded_within": sum(above(run) <= FAULT_TOLERANCE for run in guarded),
        "acted": sum(run.scalars["num_actions"] > 0 for run in guarded),
        "rewound": sum(run.scalars.get("num_rewinds", 0) > 0 for run in guarded),
        "ruined_alone": len(ruined),
        "ruined_within": sum(above(partner) <= FAULT_TOLERANCE for _, partner in partners),
        "acted_before_shown": sum(lead > 0 for lead in leads),
        "median_lead_steps": statistics.median(leads) if leads else None,
    }
