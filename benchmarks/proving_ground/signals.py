"""Local signals as early warnings: `python -m benchmarks.proving_ground.signals`.

Each signal is compared with a threshold of its own. The threshold is the lowest at which the healthy runs of some seeds
show one false alarm per 1,000 steps at most. It is then tried on other seeds: the lead is the number of steps from the
first alarm to the step from which the loss shows that the run is ruined. Healthy runs are those up to the best rate.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks import campaign
from benchmarks.provenance import provenance
from benchmarks.proving_ground.models import NORMS
from benchmarks.proving_ground.outcomes import Run, best_rate, of, outcome, shown_at
from benchmarks.proving_ground.training import Recipe, train
from koopmon.config import RiskConfig
from koopmon.risk.online_detector import Observation, OnlineRisk, RiskState, assess
from koopmon.wire.messages import TrainingStep

RESULT = Path(__file__).resolve().parent.parent / "results" / "signals.json"
HEALTHY_RATES, RUINED_RATES = (1e-3, 3e-3), (1e-2, 3e-2, 1e-1)
CHOSEN, SEEDS = (0, 1), (10, 11)
ONE_ALARM = 20
"""Steps without an alarm after which a further one counts as another."""
PER_STEPS = 1000

Series = np.ndarray[Any, Any]


def _largest(name: str) -> Callable[[Run], Series]:
    return lambda run: run.series[name].max(axis=1)


def _replayed(run: Run) -> list[OnlineRisk]:
    """Replay the detector on the recorded spectra and losses."""
    case, series, state, found = run.case, run.series, RiskState(), []
    for row, step in enumerate(series["profile_step"]):
        training = TrainingStep(
            step=int(step), learning_rate=case.scheduled_rate(int(step)), loss=float(series["loss"][step])
        )
        seen = Observation(
            training=training,
            informative=bool(series["informative"][row, 0]),
            non_finite=bool(np.isnan(series["update_ratio"][row]).any()),
            update_ratios=tuple(series["update_ratio"][row]),
            expansive_mass=float(series["expansive_mass"][row].mean()),
            reliable_mode_ratio=float(series["reliable_mode_ratio"][row].mean()),
            width=case.width,
            num_layers=case.num_layers,
            update_exponent=0.0,
        )
        state, risk = assess(state, seen, RiskConfig())
        found.append(risk)
    return found


SIGNALS: Mapping[str, Callable[[Run], Series]] = {
    "loss, z-score": lambda run: np.array([risk.components.get("loss", 0.0) for risk in _replayed(run)]),
    "gradient norm": lambda run: run.series["grad_norm"][run.series["profile_step"]],
    "update RMS": _largest("update_rms"),
    "log-partition": lambda run: np.abs(run.series["log_partition"]).max(axis=1),
    "attention logit": _largest("max_logit"),
    "stream RMS": _largest("stream_rms"),
    "spectral radius": _largest("spectral_radius"),
    "update ratio": _largest("update_ratio"),
    "koopmon risk": lambda run: np.array([risk.value for risk in _replayed(run)]),
}
"""One value for each snapshot; high is bad. Of a signal by layer the largest layer counts."""


def alarms(steps: Series, values: Series, threshold: float) -> list[int]:
    """Return the steps at which an alarm begins: a value above `threshold`, ONE_ALARM steps after the last such."""
    high = [int(step) for step, value in zip(steps, values, strict=True) if value > threshold]
    return [step for before, step in zip([-ONE_ALARM, *high], high, strict=False) if step - before >= ONE_ALARM]


def false_alarm_rate(runs: Sequence[Run], signal: Callable[[Run], Series], threshold: float) -> float:
    """Return the alarms per 1,000 steps of these runs."""
    count = sum(len(alarms(run.series["profile_step"], signal(run), threshold)) for run in runs)
    return PER_STEPS * count / sum(len(run.series["loss"]) for run in runs)


def lowest_threshold(runs: Sequence[Run], signal: Callable[[Run], Series]) -> float:
    """Return the lowest value of the healthy `runs` above which they have one false alarm per 1,000 steps at most."""
    values = np.unique(np.concatenate([signal(run) for run in runs]))
    allowed = [value for value in values if false_alarm_rate(runs, signal, value) <= 1.0]
    # The rate is not monotonic: one long alarm at a low threshold counts once. The threshold lies above all that fail.
    failing = [value for value in values if value not in set(allowed)]
    return float(min(value for value in allowed if not failing or value > max(failing)))


def score(chosen: Sequence[Run], tried: Sequence[Run]) -> list[dict[str, Any]]:
    """Score each signal for one model. Both arguments are runs with clipping alone."""
    rate, best = best_rate(tried)
    healthy = [run for run in chosen if run.case.lr <= rate]
    calm = [run for run in tried if run.case.lr <= rate]
    ruined = list(_ruined(tried, rate, best))
    rows = []
    for name, signal in SIGNALS.items():
        threshold = lowest_threshold(healthy, signal)
        leads = []
        for run, shown in ruined:
            first = next(iter(alarms(run.series["profile_step"], signal(run), threshold)), None)
            leads.append(None if first is None else shown - first)
        early = [lead for lead in leads if lead is not None and lead > 0]
        rows.append(
            {
                "signal": name,
                "threshold": threshold,
                "num_ruined": len(leads),
                "num_early": len(early),
                "median_lead_steps": statistics.median(early) if early else None,
                "leads": leads,
                "false_alarms_per_1000": round(false_alarm_rate(calm, signal, threshold), 2),
            }
        )
    return rows


def _ruined(runs: Sequence[Run], rate: float, best: float) -> Iterator[tuple[Run, int]]:
    """Yield each run that a high rate has ruined, with the step from which its loss shows it."""
    for run in (run for run in runs if run.case.lr > rate):
        healthy = of(runs, lr=rate, seed=run.case.seed)
        if outcome(run, best) in ("ruined", "diverged") and (shown := shown_at(run, healthy[0])) is not None:
            yield run, shown


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proving_ground.signals", description=__doc__)
    campaign.options(parser, RESULT)
    parser.add_argument("--families", nargs="+", choices=NORMS, default=NORMS)
    parser.add_argument("--chosen", type=int, nargs="+", default=CHOSEN, help="seeds that set the thresholds")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="seeds that are scored")
    options = parser.parse_args(arguments)
    console = campaign.console()
    rates = dict.fromkeys(options.chosen, HEALTHY_RATES)
    rates |= dict.fromkeys(options.seeds, (*HEALTHY_RATES, *RUINED_RATES))
    cases = [
        Recipe(family=family, lr=lr, seed=seed, signals=True)
        for family in options.families
        for seed in rates
        for lr in rates[seed]
    ]
    runs = campaign.run(cases, train, options.work, workers=options.workers, console=console)
    models = {}
    for family in options.families:
        chosen = [run for run in of(runs, family=family) if run.case.seed in options.chosen]
        tried = [run for run in of(runs, family=family) if run.case.seed in options.seeds]
        models[family] = score(chosen, tried)
        drawn = Table("signal", "threshold", "early", "median lead", "false alarms / 1,000", title=family)
        for row in models[family]:
            lead = row["median_lead_steps"]
            drawn.add_row(
                row["signal"],
                f"{row['threshold']:.3g}",
                f"{row['num_early']} of {row['num_ruined']}",
                "-" if lead is None or math.isnan(lead) else f"{lead:g}",
                f"{row['false_alarms_per_1000']:g}",
            )
        console.print(drawn)
    document = {"provenance": provenance(0), "seeds": [*options.seeds], "chosen": [*options.chosen], "models": models}
    options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
