"""Comparison of detectors by their lead: `python -m benchmarks.early_warning`.

Every run is recorded once, and all detectors are scored on the same recordings. A detector's threshold is the lowest
with at most one false alarm per 1,000 healthy steps, found on the runs of other seeds. An alarm starts at a step at
which the score exceeds the threshold, and lasts 20 steps. The lead of a diverging run is the time from its first alarm
to the divergence, or 0 without an alarm. Runs with a fault that survived are neither healthy nor diverged; they are
counted separately.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import campaign
from benchmarks.campaign import Kept
from benchmarks.detectors import DETECTORS, Detector, Series
from benchmarks.faults import FAULTS
from benchmarks.models import Norm
from benchmarks.norms import died
from benchmarks.norms import recipes as sweep
from benchmarks.provenance import provenance
from benchmarks.scoring import auroc
from benchmarks.training import Recipe, train

RESULT = Path(__file__).parent / "results" / "early_warning.json"
HOLD = 20
ALLOWED = 1.0
"""Allowed false alarms per 1,000 healthy steps."""
FAULT_STEP = 60
FAULT_RATES: Mapping[Norm, tuple[float, ...]] = {"none": (0.001, 0.002, 0.003), "pre": (0.003,)}

Run = Kept[Recipe]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One detector over all runs. `leads` has the lead in steps of each diverged run; `lives` has their lengths."""

    name: str
    auroc: float | None
    low: float | None
    high: float | None
    warned: int
    died: int
    median_lead: float
    median_share: float
    """Median share of the run's life: lead over step of divergence."""
    false_alarms: float
    """False alarms per 1,000 healthy steps, on runs that were not used for the threshold."""
    healthy_runs_alarmed: int


def recipes(scale: str) -> list[Recipe]:
    """Return the sweep of `benchmarks.norms`, and runs at safe rates with an injected fault."""
    base = sweep(scale)
    steps, every = base[0].steps, base[0].profile_every
    return [
        Recipe(norm=norm, lr=lr, seed=seed, steps=steps, profile_every=every, fault=fault, fault_step=FAULT_STEP)
        for norm, rates in FAULT_RATES.items()
        for lr in rates
        for fault in FAULTS
        for seed in (0, 1)
    ] + base


def alarms(scores: Series, steps: Series, threshold: float) -> list[int]:
    """Return the steps at which alarms start."""
    found: list[int] = []
    for step in steps[scores > threshold]:
        if not found or step - found[-1] >= HOLD:
            found.append(int(step))
    return found


def threshold(scored: Sequence[tuple[Series, Series]], num_steps: int) -> float:
    """Return the lowest threshold with at most `ALLOWED` false alarms per 1,000 of the `num_steps` healthy steps."""
    allowed = ALLOWED * num_steps / 1000
    candidates = np.unique(np.concatenate([scores for scores, _ in scored]))
    low, high = 0, len(candidates) - 1  # no score exceeds the highest one
    while low < high:
        middle = (low + high) // 2
        if sum(len(alarms(scores, steps, candidates[middle])) for scores, steps in scored) <= allowed:
            high = middle
        else:
            low = middle + 1
    return float(candidates[high])


def limit_of(detector: Detector, runs: Sequence[Run]) -> float:
    """Return the threshold of `detector` from the healthy runs of `runs`."""
    healthy = [run for run in runs if not died(run) and not run.case.fault]
    num_steps = sum(len(run.series["loss"]) for run in healthy)
    return threshold([(detector(run), run.series["profile_step"]) for run in healthy], num_steps)


def judge(name: str, detector: Detector, runs: Sequence[Run], *, limit: float | None = None) -> Verdict:
    """Score `detector` on `runs` at the threshold `limit`, else at thresholds from the runs of other seeds."""
    scores = [detector(run) for run in runs]
    steps = [run.series["profile_step"] for run in runs]
    healthy = [not died(run) and not run.case.fault for run in runs]
    leads, shares, num_false, num_steps, num_alarmed = [], [], 0, 0, 0
    for parity in (0, 1):
        others = [run for run in runs if run.case.seed % 2 != parity]
        level = limit_of(detector, others) if limit is None else limit
        for i, run in enumerate(runs):
            if run.case.seed % 2 != parity:
                continue
            found = alarms(scores[i], steps[i], level)
            if died(run):
                death = run.scalars["died_at"]
                lead = death - found[0] if found else 0
                leads.append(lead)
                shares.append(lead / max(death, 1))
            elif healthy[i]:
                num_false += len(found)
                num_alarmed += bool(found)
                num_steps += len(run.series["loss"])
    chosen = [i for i in range(len(runs)) if healthy[i] or died(runs[i])]
    # Drop the last score before the divergence: a score at the divergence is no warning.
    peaks = [_peak(scores[i], steps[i], runs[i]) for i in chosen]
    area = auroc([died(runs[i]) for i in chosen], peaks)
    return Verdict(
        name=name,
        auroc=area.value if area else None,
        low=area.low if area else None,
        high=area.high if area else None,
        warned=sum(lead > 0 for lead in leads),
        died=len(leads),
        median_lead=float(np.median(leads)) if leads else 0.0,
        median_share=float(np.median(shares)) if shares else 0.0,
        false_alarms=1000 * num_false / max(num_steps, 1),
        healthy_runs_alarmed=num_alarmed,
    )


BEFORE = 5
"""Steps before the divergence that do not count for AUROC."""


def _peak(scores: Series, steps: Series, run: Run) -> float:
    death = run.scalars["died_at"]
    seen = scores if death is None else scores[steps <= death - BEFORE]
    return float(seen.max()) if len(seen) else -np.inf


def analyse(runs: Sequence[Run], console: Console) -> dict[str, Any]:
    """Print one table over all runs and one per kind of fault; return them for the JSON."""
    document: dict[str, Any] = {"num_runs": len(runs), "allowed_per_1000_steps": ALLOWED, "tables": {}}
    rate = [run for run in runs if not run.case.fault]
    groups = {"all": list(runs), "learning rate": rate}
    groups["No-Norm, learning rate"] = [run for run in rate if run.case.norm == "none"]
    groups |= {
        fault: [*(r for r in rate if not died(r)), *(r for r in runs if r.case.fault == fault)] for fault in FAULTS
    }
    detectors = {name: remembered(detector) for name, detector in DETECTORS.items()}
    document["thresholds"] = {name: limit_of(detector, runs) for name, detector in detectors.items()}
    for title, chosen in groups.items():
        verdicts = [judge(name, detector, chosen) for name, detector in detectors.items()]
        verdicts.sort(key=lambda verdict: (-verdict.median_lead, -(verdict.auroc or 0)))
        document["tables"][title] = [asdict(verdict) for verdict in verdicts]
        console.print(table(title, verdicts))
    return document


def remembered(detector: Detector) -> Detector:
    """Cache `detector`, so that each run is scored once."""
    known: dict[int, Series] = {}

    def score(run: Run) -> Series:
        if id(run) not in known:
            known[id(run)] = detector(run)
        return known[id(run)]

    return score


def table(title: str, verdicts: Sequence[Verdict]) -> Table:
    drawn = Table("detector", "AUROC [95%]", "warned", "median lead", "of its life", "false / 1,000", title=title)
    for v in verdicts:
        area = "-" if v.auroc is None else f"{v.auroc:.2f} [{v.low:.2f}, {v.high:.2f}]"
        lead, share = f"{v.median_lead:.0f}", f"{v.median_share:.0%}"
        drawn.add_row(v.name, area, f"{v.warned}/{v.died}", lead, share, f"{v.false_alarms:.2f}")
    return drawn


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.early_warning", description=__doc__)
    campaign.options(parser, RESULT)
    options = parser.parse_args(arguments)
    console = campaign.console()
    cases = recipes(options.scale)
    runs = campaign.run(cases, train, options.work, workers=options.workers, console=console)
    document = {"provenance": provenance(0), "scale": options.scale, **analyse(runs, console)}
    options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
