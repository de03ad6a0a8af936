"""Writer of results/proving_ground.json, as lines of Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.markdown import paragraph, table

Document = Mapping[str, Any]

NAMES = {"pre": "Pre-LN", "rms": "RMSNorm"}
ARMS = {
    "clip": "clipping at 1.0",
    "qk_norm": "clipping and QK-norm (another model)",
    "zclip": "clipping and ZClip",
    "adagc": "clipping and AdaGC",
    "spike": "clipping, rate halved at a loss spike",
    "backoff": "clipping and koopmon, policy `lr`",
    "guarded": "clipping and koopmon",
}
FAULTS = {
    "no_warmup": "no warm-up",
    "restart": "schedule restarts at 30 times its rate",
    "bad_batches": "five batches of random bytes",
    "stale_moments": "second moments x 0.001",
    "lost_state": "restart without the optimizer's state",
    "finetune": "restart without it, at 30 times the rate",
}


def proving_ground(told: Document) -> list[str]:
    """Write a table of losses by arm and rate for each model, and the effect of the guard."""
    lines: list[str] = []
    for model in told["models"]:
        lines += [*_model(model), ""]
    return lines[:-1]


def _model(model: Document) -> list[str]:
    arms = model["arms"]
    rates = list(arms["clip"]["losses"])
    rows = []
    for arm, words in ARMS.items():
        if arm in arms:
            found = arms[arm]
            cells = [_mean(found["losses"].get(rate)) for rate in rates]
            spread = found["sensitivity"]
            shown = f"{spread['mean']:.3f} [{spread['low']:.3f}, {spread['high']:.3f}]" if spread else "-"
            rows.append([words, *cells, shown])
    healthy = model["healthy"]
    seeds = max(map(len, arms["clip"]["losses"].values()))
    prose = [
        f"{NAMES[model['family']]}, D {model['width']}, L {model['num_layers']}, {seeds} seeds: the best rate is",
        f"{model['best_rate']:g}. koopmon did not act on {healthy['untouched']:.0%} of {healthy['num_runs']} guarded",
        f"runs up to that rate. Above it, {model['ruined_alone']} runs are ruined with clipping alone. koopmon acted",
        f"before the loss rose in {model['acted_before_shown']} of them{_lead(model)}. Of the guarded runs",
        f"above the best rate, {model['within_0.05']} of {model['num_above']} end within 0.05 nats of the best loss.",
    ]
    if model.get("rewound"):
        prose.append(
            f"It rewound {model['rewound']} of them, at a cost of {model['median_lost_steps']:g} steps in the median."
        )
    losses = table(["validation loss (nats)", *rates, "sensitivity [95%]"], rows)
    return [*losses, "", *paragraph(prose), *_faults(model)]


def _faults(model: Document) -> list[str]:
    rows = [
        [
            FAULTS[name],
            *(_mean(losses) for losses in (model["unfaulted"], told["clip"], told["guarded"])),
            *(f"{told[key]} of {len(told['guarded'])}" for key in ("alone_within", "guarded_within", "acted")),
        ]
        for name, told in model["faults"].items()
        if told["guarded"]
    ]
    columns = ("fault", "without it", "clipping alone", "koopmon", "alone within 0.03", "koopmon within 0.03", "acted")
    return ["", *table(list(columns), rows)] if rows else []


def _lead(model: Document) -> str:
    lead = model["median_lead_steps"]
    return "" if lead is None else f" (median lead {lead:g} steps)"


def _mean(losses: Sequence[float] | None) -> str:
    return f"{statistics.fmean(losses):.2f}" if losses else "-"


WRITERS: Mapping[str, Callable[[Document], list[str]]] = {"proving_ground": proving_ground}
