"""Highest safe peak rates by `koopmon profile --max-lr`, compared with trainings: `python -m benchmarks.max_rate`.

The probe sees each normalised model of the proving ground before training. The trainings are those of
results/proving_ground.json with clipping alone: a rate is safe if the mean final loss is at most 0.1 above the best
one. Models without normalisation have the calibrator instead of a probe; their trainings are run here, and a rate is
safe if no seed diverges or ends more than 0.1 above the best loss.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import campaign
from benchmarks.models import Decoder
from benchmarks.provenance import provenance
from benchmarks.proving_ground import text
from benchmarks.proving_ground.models import FAMILIES, build
from benchmarks.proving_ground.outcomes import RUINED
from benchmarks.proving_ground.training import BETA2, CLIP, MAX_LOSS, Recipe, loss_of, validation_loss
from benchmarks.sections import max_rate
from koopmon.profiling import capture_states
from koopmon.rate_probe import peak_rate
from koopmon.risk.calibration import SHIPPED, Example, load
from koopmon.risk.initial_score import initial_risk
from koopmon.spectral import profile_states

RESULT = Path(__file__).resolve().parent / "results" / "max_rate.json"
TRAININGS = RESULT.with_name("proving_ground.json")
SEEDS = (10, 11, 12)
SIZES = ((64, 4), (128, 6))
BATCH = {"moe": 8, "mamba": 8, "kan": 8}
BARE_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SURVIVES = 0.95


def probe(family: str, width: int, num_layers: int, seed: int) -> dict[str, Any]:
    """Run the probe on an untrained model of the proving ground; return its result."""
    model = build(family, width=width, num_layers=num_layers, max_tokens=64, seed=seed)  # type: ignore[arg-type]
    return probe_model(model, BATCH.get(family, 16), seed)


def probe_model(model: nn.Module, batch: int, seed: int) -> dict[str, Any]:
    """Run the probe on a model; `batch` is the number of sequences."""
    generator = torch.Generator().manual_seed(100 + seed)

    def loss(copied: nn.Module) -> Tensor:
        return loss_of(copied, text.batch(generator, batch, 64))

    tokens = text.batch(generator, batch, 64)[:, :-1]
    began = time.process_time()
    captured = capture_states(model, tokens, num_samples=512)
    risk = initial_risk(profile_states(captured.states, svd_rank=32), known_exponent=captured.known_exponent)
    found = peak_rate(model, loss, captured, risk.update_exponent or 0.0, (tokens,), {})
    return {
        "rate": found.rate,
        "low": found.low,
        "high": found.high,
        "alarm_rates": list(found.alarm_rates),
        "num_steps": found.num_steps,
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def safe_rates(losses: Mapping[str, Sequence[float]]) -> tuple[float, float | None]:
    """Return the highest safe rate, and the next rate of the grid; None if the highest rate of the grid is safe.

    `losses` holds the final losses of each rate.
    """
    means = {float(rate): statistics.fmean(found) for rate, found in losses.items()}
    best = min(means.values())
    safe = max(rate for rate, mean in means.items() if mean <= best + RUINED)
    return safe, min((rate for rate in means if rate > safe), default=None)


def overlaps(found: Mapping[str, Any], safe: float, ruined: float | None) -> bool | None:
    """Return True if the interval of a probe and the range from `safe` to `ruined` overlap; None without a result."""
    if found["low"] is None:
        return None
    reaches = found["high"] is None or found["high"] >= safe
    return reaches and (ruined is None or found["low"] <= ruined)


def is_safe(found: Mapping[str, Any], ruined: float | None) -> bool | None:
    """Return True if the estimate lies below the lowest rate that ruins a run; None without an estimate."""
    if found["low"] is None or ruined is None:
        return None
    return found["rate"] is not None and found["rate"] < ruined


def bare_training(recipe: Recipe) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """Train a decoder without normalisation by `recipe`, with clipping alone."""
    model = bare(recipe.width, recipe.num_layers, recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, BETA2), weight_decay=recipe.weight_decay)
    generator = torch.Generator().manual_seed(100 + recipe.seed)
    first_loss, losses = validation_loss(model, recipe), []
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.scheduled_rate(step)
        loss = loss_of(model, recipe.batch_at(step, generator))
        losses.append(loss.item())
        if not losses[-1] <= MAX_LOSS:
            break
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    final = validation_loss(model, recipe) if len(losses) == recipe.steps and losses[-1] <= MAX_LOSS else MAX_LOSS
    return {"first_loss": first_loss, "final_loss": min(final, MAX_LOSS)}, {"loss": np.array(losses)}


def bare(width: int, num_layers: int, seed: int) -> Decoder:
    return Decoder("none", width=width, num_layers=num_layers, max_tokens=64, seed=seed)


def calibrated(width: int, num_layers: int) -> float | None:
    """Return the rate that a decoder without normalisation survives with probability SURVIVES, by the calibrator."""
    tokens = text.batch(torch.Generator().manual_seed(0), 16, 64)[:, :-1]
    captured = capture_states(bare(width, num_layers, 0), tokens, num_samples=2048)
    risk = initial_risk(profile_states(captured.states), known_exponent=captured.known_exponent)
    example = Example(
        update_exponent=risk.update_exponent or 0.0, learning_rate=1.0, width=width, num_layers=num_layers
    )
    return load(SHIPPED).max_learning_rate(example, 1.0 - SURVIVES)


def trainings() -> dict[tuple[str, int], tuple[float, float | None]]:
    """Return the highest safe rate and the next one, by family and width, from the results of the proving ground."""
    told = json.loads(TRAININGS.read_text(encoding="utf-8"))["models"]
    return {
        (model["family"], model["width"]): safe_rates(model["arms"]["clip"]["losses"])
        for model in told
        if "arms" in model and model["optimizer"] == "adamw" and not model["weight_decay"]
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.max_rate", description=__doc__)
    campaign.options(parser, RESULT)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    options = parser.parse_args(arguments)
    console = campaign.console()
    torch.set_num_threads(1)
    known, models = trainings(), []
    for width, num_layers in SIZES:
        for family in FAMILIES:
            if (family, width) not in known:
                continue
            safe, ruined = known[family, width]
            probes = [probe(family, width, num_layers, seed) for seed in options.seeds]
            for each in probes:
                each |= {"overlaps": overlaps(each, safe, ruined), "is_safe": is_safe(each, ruined)}
            models.append(
                {"family": family, "width": width, "num_layers": num_layers, "safe": safe, "ruined": ruined}
                | {"probes": probes}
            )
            console.print(f"{family}, D {width}: {[each['rate'] for each in probes]}")
    cases = [Recipe(family="pre", lr=lr, seed=seed) for seed in options.seeds[:1] for lr in BARE_RATES]
    runs = campaign.run(cases, bare_training, options.work, workers=options.workers, console=console)
    losses: dict[str, list[float]] = {}
    for run in runs:
        losses.setdefault(f"{run.case.lr:g}", []).append(run.scalars["final_loss"])
    safe, ruined = safe_rates(losses)
    width, num_layers = SIZES[0]
    unnormalised = {"width": width, "num_layers": num_layers, "losses": losses, "safe": safe, "ruined": ruined}
    unnormalised["calibrated"] = calibrated(width, num_layers)
    document = {
        "provenance": provenance(0),
        "seeds": list(options.seeds),
        "models": models,
        "unnormalised": unnormalised,
    }
    console.print("\n".join(max_rate(document)), soft_wrap=True)
    options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
