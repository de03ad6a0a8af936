"""Spectra of the other families, and the effect of KSS on their training: `python -m benchmarks.architectures`.

The first part is the spectrum at the start at the published size (docs/method.md: synthetic text, D 256, L 6, full
rank, N 2048) beside the published figures. Where the paper names a family without details, two variants are compared:
experts with softmax weights over all or over the chosen experts, and state spaces with and without their residual. The
second part trains small models of each family over rates, without KSS, with KSS as published, and with the unstable
penalty alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

import koopmon
from benchmarks import campaign
from benchmarks.campaign import Kept
from benchmarks.families import Family, language_model
from benchmarks.provenance import provenance
from benchmarks.tasks import TASKS, draw
from benchmarks.training import FIELDS, Recipe, full_profile, train

RESULT = Path(__file__).parent / "results" / "architectures.json"
WIDTH, NUM_LAYERS, NUM_SEQUENCES = 256, 6, 32
SHOWN = {
    "near_unit_mass": "near-unit",
    "contractive_mass": "contractive",
    "spectral_radius": "rho",
    "nonlinearity_ratio": "eta",
    "reliable_mode_ratio": "reliable",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One model of a family. `paper` has published figures by field."""

    label: str
    family: Family
    options: Mapping[str, Any] = field(default_factory=dict)
    paper: Mapping[str, float] = field(default_factory=dict)


def _paper(mass: float, radius: float, eta: float, **more: float) -> dict[str, float]:
    return {"near_unit_mass": mass, "spectral_radius": radius, "nonlinearity_ratio": eta, **more}


TOP_1, TOP_2, TOP_4 = _paper(0.72, 2.85, 0.68), _paper(0.58, 2.12, 0.55), _paper(0.45, 1.78, 0.48)
MAMBA, KAN = _paper(0.12, 0.95, 0.42, contractive_mass=0.85), _paper(0.52, 2.15, 0.78, reliable_mode_ratio=0.68)
OVER_ALL, NO_SKIP = {"renormalised": False}, {"residual": False}
VARIANTS = (
    Variant(label="transformer, Pre-LN", family="transformer"),
    Variant(label="experts, top 1 of 8", family="moe-1", options=OVER_ALL, paper=TOP_1),
    Variant(label="experts, top 2 of 8", family="moe-2", options=OVER_ALL, paper=TOP_2),
    Variant(label="experts, top 4 of 8", family="moe-4", options=OVER_ALL, paper=TOP_4),
    Variant(label="experts, top 2, weights of the chosen", family="moe-2", paper=TOP_2),
    Variant(label="experts, top 4, weights of the chosen", family="moe-4", paper=TOP_4),
    Variant(label="state space", family="mamba", paper=MAMBA),
    Variant(label="state space, residual left out", family="mamba", options=NO_SKIP, paper=MAMBA),
    Variant(label="splines", family="kan", paper=KAN),
)
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "nothing": {},
    "published": {"shaping": "published", "kss_every": 10, "layer_fraction": 0.5},
    "unstable alone, tau 2": {"shaping": "unstable", "tau_u": 2.0},
}
TRAINED: Sequence[Family] = ("transformer", "moe-2", "mamba", "kan")
RATES = (0.003, 0.01, 0.03)
BASE = Recipe(task="text", width=64, num_layers=4, steps=120, profile_every=0, warmup=10, lr=0.0, seed=0)
PAPER_BASE = Recipe(
    task="text-full", width=WIDTH, num_layers=NUM_LAYERS, steps=2000, profile_every=0, warmup=100, lr=0.0, seed=0
)


def spectra(seeds: Sequence[int], console: Console) -> list[dict[str, Any]]:
    """Profile every variant: each field as a mean over layers and seeds, and the measurements of the family."""
    shape = TASKS["text-full"]
    rows: list[dict[str, Any]] = []
    for variant in track(VARIANTS, description="spectra", console=console):
        found: dict[str, list[float]] = {}
        for seed in seeds:
            model = language_model(
                variant.family,
                width=WIDTH,
                num_layers=NUM_LAYERS,
                vocabulary=shape["vocabulary"],
                num_tokens=shape["num_tokens"],
                seed=seed,
                **variant.options,
            )
            tokens, _ = draw("text-full", NUM_SEQUENCES, seed=seed)
            _, profile = full_profile(model, tokens, seed=seed)
            for name in ("expansive_mass", "contractive_mass", *FIELDS):
                value = profile.mean(name)
                found.setdefault(name, []).extend([] if value is None else [value])
        means = {name: statistics.fmean(values) for name, values in found.items()}
        adapter = koopmon.discover(model, tokens[:1]).adapter.name
        rows.append({"label": variant.label, "adapter": adapter, "mean": means, "paper": dict(variant.paper)})
    table = Table("family", *SHOWN.values(), title=f"At the start, over {len(seeds)} seeds; in brackets the paper's")
    for row in rows:
        cells = [
            f"{row['mean'][name]:.2f}" + (f" ({row['paper'][name]:.2f})" if name in row["paper"] else "")
            for name in SHOWN
        ]
        table.add_row(row["label"], *cells)
    console.print(table)
    return rows


def cases(base: Recipe, seeds: Sequence[int]) -> list[tuple[str, Recipe]]:
    return [
        (name, replace(base, family=family, norm="pre", lr=lr, seed=seed, **how))
        for family in TRAINED
        for lr in RATES
        for seed in seeds
        for name, how in SETTINGS.items()
    ]


def trained(found: Sequence[tuple[str, Kept[Recipe]]], console: Console) -> list[dict[str, Any]]:
    """Train every family, rate and setting: number of diverged runs, and mean final loss of the others."""
    table = Table("family", "setting", *(f"{lr:g}" for lr in RATES), title="diverged, loss at the end of the others")
    rows = []
    for family in TRAINED:
        for setting in SETTINGS:
            cells = []
            for lr in RATES:
                runs = [
                    run.scalars for name, run in found if (name, run.case.family, run.case.lr) == (setting, family, lr)
                ]
                lived = [run["final_loss"] for run in runs if run["died_at"] is None]
                loss = statistics.fmean(lived) if lived else None
                cells.append(f"{len(runs) - len(lived)}/{len(runs)} " + ("-" if loss is None else f"{loss:.2f}"))
                row = {"family": family, "setting": setting, "lr": lr, "num_runs": len(runs)}
                rows.append({**row, "num_diverged": len(runs) - len(lived), "final_loss": loss})
            table.add_row(family, setting, *cells)
    console.print(table)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.architectures", description=__doc__)
    campaign.options(parser, RESULT)
    parser.add_argument("--seeds", type=int, default=3, help="of each model and training (default %(default)s)")
    options = parser.parse_args(arguments)
    console, seeds = campaign.console(), range(options.seeds)
    document: dict[str, Any] = {"provenance": provenance(0), "scale": options.scale, "seeds": options.seeds}
    document["spectra"] = spectra(seeds, console)
    wanted = cases(PAPER_BASE if options.scale == "paper" else BASE, seeds)
    runs = campaign.run([case for _, case in wanted], train, options.work, workers=options.workers, console=console)
    document["trained"] = trained([(name, run) for (name, _), run in zip(wanted, runs, strict=True)], console)
    options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
