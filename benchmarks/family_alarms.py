"""Detector on the other families: `python -m benchmarks.family_alarms`.

The runs are experts, state spaces, splines and transformers, each with the usual normalisation before its sublayers and
without any, from usual rates to rates that diverge. The risk has online settings and the thresholds of the adapter. A
run counts as warned if the risk reached the policy's threshold before the divergence. An alarm on a surviving run is
false. The table also has the risk, as log-odds, at which the surviving runs of a family would raise one false alarm per
1,000 steps at any rate.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import campaign
from benchmarks.campaign import Kept
from benchmarks.detectors import online
from benchmarks.early_warning import alarms, threshold
from benchmarks.families import SCHEMES, Family
from benchmarks.norms import died
from benchmarks.provenance import provenance
from benchmarks.scoring import auroc
from benchmarks.training import Recipe, train
from koopmon.config import PolicyConfig, RiskConfig, merged
from koopmon.plugins import adapters

RESULT = Path(__file__).parent / "results" / "family_alarms.json"
ADAPTERS: Mapping[Family, str] = {"transformer": "transformer", "moe-2": "moe", "mamba": "mamba", "kan": "kan"}
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
FIRST_SEEDS: Mapping[Family, int] = {"kan": 20}
"""Seeds below it were used to choose the settings of splines. Other families start at 0."""
BASE = Recipe(task="text", width=64, num_layers=4, steps=150, warmup=10, lr=0.0, seed=0)
BEFORE = 5
"""Steps before the divergence that do not count for AUROC."""

Run = Kept[Recipe]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One family with or without normalisation, over all rates. `leads` has the lead in steps of each diverged run."""

    family: Family
    norm: str
    commit: str | None
    num_runs: int
    num_diverged: int
    update_exponent: float | None
    """Update exponent at the start, mean over the runs; None if the layers hardly change the state."""
    auroc: float | None
    num_warned: int
    median_lead: float | None
    healthy_steps: int
    false_alarms: int
    alarms_by_rate: Mapping[str, int]
    """False alarms by learning rate."""
    tolerable: float | None
    """Log-odds of the risk at which surviving runs raise one false alarm per 1,000 steps."""


def recipes(families: Sequence[Family], num_seeds: int, scale: str) -> list[Recipe]:
    base = replace(BASE, width=256, num_layers=6, steps=2000, warmup=100) if scale == "paper" else BASE
    return [
        replace(base, family=family, norm=norm, lr=lr, seed=seed)
        for family in families
        for norm in SCHEMES
        for lr in RATES
        for seed in range(FIRST_SEEDS.get(family, 0), FIRST_SEEDS.get(family, 0) + num_seeds)
    ]


def risks(run: Run, config: RiskConfig) -> np.ndarray[Any, Any]:
    """Return the risk at each profiled step as log-odds within [-30, 30]."""
    values = np.clip([risk.value for risk in online(run, config)], 1e-13, 1 - 1e-13)
    return np.asarray(np.log(values) - np.log1p(-values))


def summarise(family: Family, norm: str, runs: Sequence[Run], config: RiskConfig, commit: str | None) -> Row:
    act = PolicyConfig().act_risk
    limit = math.log(act / (1 - act))
    scored = [(run, risks(run, config), run.series["profile_step"]) for run in runs]
    leads = []
    for run, scores, steps in scored:
        if died(run):
            found = alarms(scores, steps, limit)
            leads.append(run.scalars["died_at"] - found[0] if found else 0)
    living = [(run, scores, steps) for run, scores, steps in scored if not died(run)]
    raised = {f"{lr:g}": 0 for lr in RATES}
    for run, scores, steps in living:
        raised[f"{run.case.lr:g}"] += len(alarms(scores, steps, limit))
    num_steps = sum(len(run.series["loss"]) for run, _, _ in living)
    peaks = [
        float(scores[steps <= (run.scalars["died_at"] - BEFORE if died(run) else math.inf)].max(initial=-30.0))
        for run, scores, steps in scored
    ]
    area = auroc([died(run) for run in runs], peaks)
    exponents = [k for run in runs if (k := run.scalars["initial"]["update_exponent"]) is not None]
    return Row(
        family=family,
        norm=norm,
        commit=commit,
        num_runs=len(runs),
        num_diverged=len(leads),
        update_exponent=statistics.fmean(exponents) if exponents else None,
        auroc=None if area is None else area.value,
        num_warned=sum(lead > 0 for lead in leads),
        median_lead=statistics.median(leads) if leads else None,
        healthy_steps=num_steps,
        false_alarms=sum(raised.values()),
        alarms_by_rate=raised,
        tolerable=threshold([(scores, steps) for _, scores, steps in living], num_steps) if living else None,
    )


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    drawn = Table("family", "k", "diverged", "warned", "lead", "AUROC", "false alarms", "steps", "tolerable log-odds")
    for row in rows:
        drawn.add_row(
            f"{row['family']}, {row['norm']}",
            "-" if row["update_exponent"] is None else f"{row['update_exponent']:.2f}",
            f"{row['num_diverged']}/{row['num_runs']}",
            str(row["num_warned"]),
            "-" if row["median_lead"] is None else f"{row['median_lead']:g}",
            "-" if row["auroc"] is None else f"{row['auroc']:.2f}",
            f"{row['false_alarms']} " + " ".join(f"{lr}:{n}" for lr, n in row["alarms_by_rate"].items() if n),
            str(row["healthy_steps"]),
            "-" if row["tolerable"] is None else f"{row['tolerable']:.1f}",
        )
    return drawn


def _known(path: Path) -> list[Mapping[str, Any]]:
    """Read the rows of `path`. Raises ValueError if they have other rates."""
    if not path.exists():
        return []
    told = json.loads(path.read_text(encoding="utf-8"))
    if tuple(told["rates"]) != RATES:
        raise ValueError(f"rates = {told['rates']} in {path}, expected {list(RATES)}: name another file with --out")
    return list(told["rows"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.family_alarms", description=__doc__)
    campaign.options(parser, RESULT)
    every = tuple(ADAPTERS)
    parser.add_argument(
        "--family", nargs="+", choices=every, default=every, help="measure these, keep the others' rows"
    )
    parser.add_argument("--seeds", type=int, default=2, help="of each family, scheme and rate (default %(default)s)")
    options = parser.parse_args(arguments)
    console: Console = campaign.console()
    wanted = recipes(options.family, options.seeds, options.scale)
    runs = campaign.run(wanted, train, options.work, workers=options.workers, console=console)
    about, known = provenance(0), adapters()
    before = _known(options.out)
    rows: list[Mapping[str, Any]] = []
    for family, name in ADAPTERS.items():
        if family not in options.family:
            rows += [row for row in before if row["family"] == family]
            continue
        config = merged(RiskConfig(), known[name].thresholds(), "thresholds")
        for norm in SCHEMES:
            mine = [run for run in runs if (run.case.family, run.case.norm) == (family, norm)]
            rows.append(asdict(summarise(family, norm, mine, config, about["commit"])))
    console.print(table(rows))
    document = {"provenance": about, "scale": options.scale, "rates": RATES, "rows": rows}
    options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
