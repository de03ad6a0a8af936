"""Writer of results/proving_ground.json, as lines of Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.markdown import paragraph, table

Document = Mapping[str, Any]

NAMES = {
    "pre": "Pre-LN",
    "rms": "RMSNorm",
    "post": "Post-LN",
    "moe": "Experts, top 2 of 8",
    "mamba": "State space",
    "kan": "Splines",
}
ARMS = {
    "clip": "clipping at 1.0",
    "qk_norm": "clipping and QK-norm (another model)",
    "zclip": "clipping and ZClip",
    "adagc": "clipping and AdaGC",
    "stable_adamw": "clipping and StableAdamW",
    "spike": "clipping, rate halved at a loss spike",
    "backoff": "clipping and koopmon, policy `lr`",
    "guarded": "clipping and koopmon",
    "projection": "clipping and koopmon, policy `kss`",
    "projection_lr": "clipping and koopmon, policy `kss+lr`",
}
FAULTS = {
    "no_warmup": "no warm-up",
    "restart": "schedule restarts at 30 times its rate",
    "bad_batches": "five batches of random bytes",
    "stale_moments": "second moments x 0.001",
    "lost_state": "restart without the optimizer's state",
    "finetune": "restart without it, at 30 times the rate",
    "no_warmup at 0.01": "no warm-up, at 3 times the rate",
    "no_warmup at 0.03": "no warm-up, at 10 times the rate",
    "bad_stretch": "100 batches of random bytes",
    "shift": "change of the data",
    "stale_shift": "change of the data, beta2 0.999",
    "attention_rate": "attention at 30 times the rate",
    "head_rate": "output layer at 30 times the rate",
    "bf16": "attention in bfloat16",
    "nan_batch": "one batch with a loss of NaN",
}
NEAR = 0.02
"""Nats above the best loss up to which a rate is usable."""
COMMON_LENGTH = (500, 16)
"""Steps, and sequences of a batch, of most models."""


def proving_ground(told: Document) -> list[str]:
    """Write the tables of each model, and the failures of all models by their kind."""
    lines: list[str] = []
    for model in told["models"]:
        for written in (_rates(model), _faults(model), _rules(model), _projection(model)):
            lines += [*written, ""] if written else []
    return [*lines, *_kinds(told["models"])]


def title(model: Document) -> str:
    """Name a model in words, with its size and all settings that are not the usual ones."""
    parts = [NAMES[model["family"]], f"D {model['width']}", f"L {model['num_layers']}"]
    if model["optimizer"] == "muon":
        parts.append("Muon and AdamW")
    if model["weight_decay"]:
        parts.append(f"weight decay {model['weight_decay']:g}")
    return ", ".join(parts)


def _rates(model: Document) -> list[str]:
    """Write the losses by arm and rate, and the effect of the guard."""
    if "arms" not in model:
        return []
    arms = model["arms"]
    rates = list(arms["clip"]["losses"])
    has_spread = any(found["sensitivity"] for found in arms.values())
    rows = []
    for arm, words in ARMS.items():
        if arm in arms:
            found = arms[arm]
            cells = [_mean(found["losses"].get(rate)) for rate in rates]
            spread = found["sensitivity"]
            shown = f"{spread['mean']:.3f} [{spread['low']:.3f}, {spread['high']:.3f}]" if spread else "-"
            rows.append([words, *cells, *([shown] if has_spread else [])])
    healthy = model["healthy"]
    seeds = max(map(len, arms["clip"]["losses"].values()))
    length = (model["steps"], model["batch"])
    shorter = "" if length == COMMON_LENGTH else f" ({length[0]} steps, batch {length[1]})"
    prose = [
        f"{title(model)}, {_count(seeds, 'seed')}{shorter}: the best rate is",
        f"{model['best_rate']:g}. koopmon did not act on {healthy['untouched']:.0%} of {healthy['num_runs']} guarded",
        f"runs up to that rate. Above it, {model['ruined_alone']} runs are ruined with clipping alone. koopmon acted",
        f"before the loss rose in {model['acted_before_shown']} of them{_lead(model)}. Of the guarded runs",
        f"above the best rate, {model['within_0.05']} of {model['num_above']} end within 0.05 nats of the best loss.",
    ]
    if model.get("rewound"):
        prose.append(
            f"It rewound {model['rewound']} of them, at a cost of {model['median_lost_steps']:g} steps in the median."
        )
    columns = ["validation loss (nats)", *rates, *(["sensitivity [95%]"] if has_spread else [])]
    return [*table(columns, rows), "", *paragraph(prose)]


def _faults(model: Document) -> list[str]:
    faults = {name: model["faults"][name] for name in FAULTS if name in model.get("faults", {})}
    rows = [
        [
            FAULTS[name],
            *(_mean(told[key]) for key in ("reference", "clip", "guarded")),
            *(f"{told[key]} of {len(told['guarded'])}" for key in ("alone_within", "guarded_within", "acted")),
        ]
        for name, told in faults.items()
    ]
    columns = [f"{NAMES[model['family']]}, fault", "without it", "clipping alone", "koopmon"]
    return table([*columns, "alone within 0.03", "koopmon within 0.03", "acted"], rows) if rows else []


def _rules(model: Document) -> list[str]:
    """Write the losses of other remedies at rates that are too high."""
    if "rules" not in model:
        return []
    told = model["rules"]
    rates = list(told["losses"]["clip"])
    rows = [
        [words, *(_mean(told["losses"][arm][rate]) for rate in rates)]
        for arm, words in ARMS.items()
        if arm in told["losses"]
    ]
    best = f"Clipping alone ends at {_mean(told['best'])} at the best rate ({_count(len(told['best']), 'seed')})."
    return [*table([f"{NAMES[model['family']]}, remedy", *rates], rows), "", *paragraph([best])]


def _projection(model: Document) -> list[str]:
    """Write the losses under projection beside those of the same seeds alone and guarded."""
    if "projection" not in model:
        return []
    told = model["projection"]
    rates = list(dict.fromkeys(rate for losses in told["losses"].values() for rate in losses))
    alone = _first(model, "clip", f"{model['best_rate']:g}", told["seeds"])
    best = statistics.fmean(alone or [model["best_loss"]])
    rows = []
    arms = ("clip", "backoff", "guarded", "projection", "projection_lr")
    for arm in [each for each in arms if each in told["losses"] or each in model["arms"]]:
        losses = told["losses"].get(arm) or {rate: _first(model, arm, rate, told["seeds"]) for rate in rates}
        cells = [_mean(losses.get(rate)) for rate in rates]
        near = [
            loss <= best + NEAR for rate in rates for loss in losses.get(rate) or () if float(rate) > model["best_rate"]
        ]
        rows.append([ARMS[arm], *cells, f"{sum(near)} of {len(near)}"])
    heading = f"{title(model)}, {_count(len(told['seeds']), 'seed')}"
    found = table([heading, *rates, f"within {NEAR:g} of the best, above the best rate"], rows)
    radii = told.get("late_radii", {}).get("projection", {})
    if radii:
        words = ", ".join(f"{statistics.fmean(each):.2g} at {rate}" for rate, each in radii.items())
        found += ["", *paragraph([f"The largest spectral radius of a block under `kss`, in the second half: {words}."])]
    return found


def _first(model: Document, arm: str, rate: str, seeds: Sequence[int]) -> Sequence[float]:
    """Return the losses of these seeds among those of the part `rates`."""
    found = model["arms"][arm]["losses"].get(rate) or ()
    return [loss for seed, loss in zip(model["seeds"], found, strict=False) if seed in seeds]


def _kinds(models: Sequence[Document]) -> list[str]:
    """Write the failures with clipping alone by their kind, over all models."""
    found: dict[str, list[Document]] = {}
    for model in models:
        if "arms" in model:
            found.setdefault(f"rate, {_group(model)}", []).append(model)
    for name, words in FAULTS.items():
        found[words] = [model["faults"][name] for model in models if name in model.get("faults", {})]
    rows, sums = [], [0, 0, 0, 0]
    for kind, parts in found.items():
        timed = [each for each in parts if "acted_before_shown" in each]
        counts = [
            sum(each["ruined_alone"] for each in parts),
            sum(each["acted_before_shown"] for each in timed),
            sum(each["ruined_alone"] for each in timed),
            sum(each["ruined_within"] for each in parts),
        ]
        if counts[0]:
            rows.append(_counted(kind, counts))
            sums = [total + count for total, count in zip(sums, counts, strict=True)]
    rows.append(_counted("all", sums))
    return table(["kind of failure", "ruined with clipping alone", "koopmon acted before", "koopmon repaired"], rows)


def _counted(kind: str, counts: Sequence[int]) -> list[str]:
    ruined, before, timed, repaired = counts
    return [kind, str(ruined), f"{before} of {timed}" if timed else "-", f"{repaired} of {ruined}"]


def _group(model: Document) -> str:
    more = [
        words
        for words, is_true in (("Muon", model["optimizer"] == "muon"), ("weight decay", model["weight_decay"]))
        if is_true
    ]
    return ", ".join([NAMES[model["family"]], *more])


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _lead(model: Document) -> str:
    lead = model["median_lead_steps"]
    return "" if lead is None else f" (median lead {lead:g} steps)"


def _mean(losses: Sequence[float] | None) -> str:
    return f"{statistics.fmean(losses):.2f}" if losses else "-"


WRITERS: Mapping[str, Callable[[Document], list[str]]] = {"proving_ground": proving_ground}
