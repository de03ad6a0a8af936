"""Writes the README's figures from the results: `python -m benchmarks.readme`; with `--check` it only compares.

Each section stands between `<!-- results: NAME -->` and `<!-- end of results -->` and comes from results/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = Path(__file__).parent / "results"
SECTION = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)", re.DOTALL)
Document = Mapping[str, Any]


def unchanged_script(told: Document) -> list[str]:
    """Rates that kill, by policy; then the healthy runs and the slowest commands."""
    others = told["settings"]["policies"]
    heading = [
        "learning rate",
        f"unguarded dies at step ({len(told['settings']['seeds'])} seeds)",
        "saved, default policy",
    ]
    heading += [f"saved, policy `{name}`" for name in others]
    rows = []
    for lr, group in groupby(sorted(told["rows"], key=lambda row: row["lr"]), key=lambda row: row["lr"]):
        runs = list(group)
        first = [run for run in runs if not run["policy"]]
        saved = [
            f"{sum(run['saved'] for run in mine)} of {len(mine)}"
            for mine in ([run for run in runs if run["policy"] == name] for name in ("", *others))
        ]
        losses = ", ".join(f"{run['final_loss'] / run['best_fixed']:.2f}" for run in first if run["final_loss"])
        rows.append([f"{lr:g}", ", ".join(str(run["died_at"] or "-") for run in first), *saved, losses])
    lost = [run for run in told["rows"] if not run["saved"]]
    total, healthy = told["totals"], told["totals"]["healthy_runs"]
    waits = sorted(run["max_latency_steps"] for run in told["results"].values() if run["max_latency_steps"] is not None)
    identical = "all of them ended" if total["identical_when_left_alone"] else "not all of them ended"
    missed = [f"Not saved: policy `{run['policy'] or 'default'}` at {run['lr']:g}, {run['why']}." for run in lost]
    prose = [
        *missed,
        f"At the safe rate {told['settings']['safe_lr']:g} the default policy acted on {total['acted_no_norm']} of",
        f"{healthy} runs of that model and on {total['acted_pre_ln']} of {healthy} with Pre-LN, and {identical} with",
        "bit-identical parameters. The slowest command of a run was in force",
        f"{waits[len(waits) // 2]} steps after the snapshot that it answers in the median run,",
        f"{waits[-1]} in the worst.",
    ]
    return [*_table([*heading, "loss at the end / best fixed rate, default"], rows), "", *_prose(prose)]


def norm_table(told: Document) -> list[str]:
    rows = []
    for row in told["rows"]:
        paper, mean = row["reference"]["paper"], row["mean"]
        fields = ("near_unit_mass", "expansive_mass", "spectral_radius")
        label = row["reference"]["label"] + ("" if row["num_informative"] else " (not informative)")
        cells = [f"{mean[field]:.2f}" for field in fields]
        rows.append([label, *cells, ", ".join(f"{value:.2f}" for value in paper) if paper else "-"])
    heading = ["residual scheme", "near-unit mass", "expansive mass", "radius", "paper: near-unit, expansive, radius"]
    return _table(heading, rows)


def spectral_speed(told: Document) -> list[str]:
    settings, took, ratios = told["settings"], told["seconds_per_12_layers"], told["ratios"]
    cores = f"{settings['threads']} {'core' if settings['threads'] == 1 else 'cores'}"
    full = ratios["ours_full"]
    return _prose(
        [
            f"Whole profiles of {settings['num_layers']} transitions at D {settings['width']}, N",
            f"{settings['num_samples']}, svd_rank {settings['svd_rank']} take {took['ours']['wall_median']:.2f} s on",
            f"{cores}; PyDMD's `fit(x, y).eigs` takes {ratios['ours']['cpu']:.0f} times as much CPU, its inner",
            "operator alone",
            f"{ratios['ours']['cpu_against_operator']:.0f} times. At full rank the two take {full['cpu']:.1f} and",
            f"{full['cpu_against_operator']:.1f} times as much as we do.",
        ]
    )


def agent_overhead(told: Document) -> list[str]:
    settings, mean, snapshot = told["settings"], told["wall"]["mean_step"], told["wall"]["snapshot_step"]

    def of(found: Mapping[str, float]) -> str:
        return f"{found['ratio']:.3f} times (95%: {found['low']:.3f} to {found['high']:.3f})"

    return _prose(
        [
            f"With {settings['ranks']} ranks, D {settings['d']}, L {settings['layers']} and a snapshot every",
            f"{settings['every']} steps on the {settings['device'].upper()}, the mean step takes {of(mean)} as long as",
            f"one without hooks, a snapshot step {of(snapshot)}.",
        ]
    )


WRITERS: Mapping[str, Callable[[Document], list[str]]] = {
    "unchanged_script": unchanged_script,
    "norm_table": norm_table,
    "spectral_speed": spectral_speed,
    "agent_overhead": agent_overhead,
}


def rendered(text: str, results: Path = RESULTS) -> str:
    """`text` with every section written anew. Raises ValueError for a section that nobody writes or has no result."""

    def write(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        path = results / f"{name}.json"
        if name not in WRITERS:
            raise ValueError(f"results: {name}: allowed are {', '.join(WRITERS)}")
        if not path.is_file():
            raise ValueError(f"results: {name}: {path.name} is missing; run python -m benchmarks.{name}")
        return begin + "\n".join(WRITERS[name](json.loads(path.read_text(encoding="utf-8")))) + "\n" + end

    return SECTION.sub(write, text)


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(cells)} |" for cells in (heading, *rows)]
    return [lines[0], "|" + "---|" * len(heading), *lines[1:]]


def _prose(parts: Sequence[str]) -> list[str]:
    return textwrap.wrap(" ".join(parts), width=120)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 when the README is stale")
    options = parser.parse_args(arguments)
    text = README.read_text(encoding="utf-8")
    wanted = rendered(text)
    if options.check and text != wanted:
        sys.stderr.write("README.md is stale: run python -m benchmarks.readme\n")
        return 1
    if not options.check:
        README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
