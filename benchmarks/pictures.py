"""Pictures of the concepts pages: `python -m benchmarks.pictures`; `--only NAME` draws one.

schemes: eigenvalues of three residual schemes before training, beside the unit circle. alarm: one training that
diverges, with its spectra before its loss rises. backoff: the demonstration under the default policy. faults: results
of `benchmarks.fault_campaign`. learning_rates: results of `benchmarks.proving_ground`. The pictures have seeds and
rates.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Annulus, Circle

from benchmarks import detectors
from benchmarks.campaign import Kept
from benchmarks.models import Decoder, Norm, associative_recall
from benchmarks.training import Recipe, full_profile, train
from koopmon import plots
from koopmon.config import PolicyConfig
from koopmon.demo.training import Setting, applied_commands, run_training

ROOT = Path(__file__).resolve().parent.parent
DIRECTORY = ROOT / "docs" / "pictures"
FAULTS = ROOT / "benchmarks" / "results" / "fault_campaign.json"
PROVING_GROUND = ROOT / "benchmarks" / "results" / "proving_ground.json"
ARMS = {
    "clip": ("clipping at 1.0 only", plots.DEAD, "o-"),
    "qk_norm": ("clipping and QK-norm (another model)", plots.REFERENCE, "s--"),
    "guarded": ("clipping and koopmon", plots.ALIVE, "o-"),
}
"""Arms in the picture: words, colour and line."""
SCHEMES: dict[Norm, str] = {"pre": "Pre-LN", "post": "Post-LN", "none": "No-Norm"}
SEED = 42
DYING, LIVING = 0.006, 0.001
FRAME = 3.5
"""Largest real part in the picture."""
INK, BAND = "#555555", "#f1c40f"


def schemes(path: Path) -> None:
    """Compute all eigenvalues of all layers of three untrained decoders (D 128, L 4, full rank, N 2048)."""
    figure, panels = _figure(1, len(SCHEMES), (12.6, 4.9))
    for panel, (norm, label) in zip(panels, SCHEMES.items(), strict=True):
        tokens, _ = associative_recall(64, seed=SEED)
        _, profile = full_profile(Decoder(norm, seed=SEED), tokens, seed=SEED)
        panel.add_patch(Annulus((0, 0), 1.05, 0.15, facecolor=BAND, alpha=0.25, edgecolor="none"))
        panel.add_patch(Circle((0, 0), 1.0, fill=False, edgecolor=INK, linewidth=1))
        for depth, layer in enumerate(profile.layers):
            values = layer.eigenvalues.numpy()
            colour = _depth_colour(depth, profile.num_layers)
            panel.scatter(values.real, values.imag, s=9, alpha=0.8, color=colour, label=f"layer {depth}")
        masses = f"near-unit {profile.mean('near_unit_mass'):.2f}, expansive {profile.mean('expansive_mass'):.2f}"
        panel.set_title(f"{label}\n{masses}, radius {profile.mean('spectral_radius'):.2f}", fontsize=11)
        panel.set(xlim=(-1.3, FRAME), ylim=(-2.4, 2.4), aspect="equal", xlabel="Re λ", ylabel="Im λ")
        outside = [int(layer.eigenvalues.real.gt(FRAME).sum()) for layer in profile.layers]
        if any(outside):
            farthest = max(layer.spectral_radius for layer in profile.layers)
            words = f"{sum(outside)} of layer {outside.index(max(outside))} lie outside,\nup to {farthest:.0f} →"
            panel.annotate(words, (FRAME, 0), xytext=(-4, 60), textcoords="offset points", fontsize=9, ha="right")
    panels[0].legend(fontsize=8, loc="lower left")
    _save(figure, path)


def alarm(path: Path) -> None:
    """Draw one No-Norm training at a rate that diverges, and the same seed at a safe rate."""
    dying, living = (_recorded(Recipe(lr=lr, seed=SEED, steps=120)) for lr in (DYING, LIVING))
    figure, (losses, masses, ratios, scores) = _figure(4, 1, (9.0, 10.0))
    died, steps = dying.scalars["died_at"], dying.series["profile_step"]
    losses.set_title(
        f"No-Norm decoder, D 128, L 4, AdamW, seed {SEED}: at {DYING:g} it dies at step {died}", fontsize=11
    )
    for run, colour, lr in ((living, plots.REFERENCE, LIVING), (dying, plots.DEAD, DYING)):
        losses.plot(run.series["loss"], color=colour, label=f"learning rate {lr:g}")
        masses.plot(run.series["profile_step"], run.series["expansive_mass"].mean(1), color=colour)
    losses.set(yscale="log", ylabel="loss (nats)")
    losses.minorticks_off()
    losses.set_yticks([6, 10, 20, 50], ["6", "10", "20", "50"])
    masses.set(ylabel="expansive mass,\nmean over layers", ylim=(-0.02, 0.5))
    for depth in range(dying.case.num_layers):
        colour = _depth_colour(depth, dying.case.num_layers)
        ratios.plot(steps, dying.series["update_ratio"][:, depth], color=colour, label=f"layer {depth}")
    ratios.set(yscale="log", ylabel=f"update ratio\nat {DYING:g}")
    judged, calm = detectors.online(dying), detectors.online(living)
    scores.plot(steps, [risk.forecast for risk in judged], color=plots.ALIVE, label="forecast: warns")
    scores.plot(steps, [risk.value for risk in judged], color=plots.DEAD, label="risk: acts")
    scores.plot(living.series["profile_step"], [risk.value for risk in calm], color=plots.REFERENCE,
                label=f"risk at {LIVING:g}")  # fmt: skip
    scores.set(ylabel="scores", ylim=(-0.03, 1.03), xlabel="optimizer step")
    acts = PolicyConfig().act_risk
    first = next(int(step) for step, risk in zip(steps, judged, strict=True) if risk.value >= acts)
    for panel in (losses, masses, ratios, scores):
        panel.axvline(first, color=INK, linewidth=1, linestyle=":")
        panel.set_xlim(0, 1.35 * died)
    words = f"risk above {acts:g}\nfrom step {first}"
    scores.annotate(words, (first, 0.5), xytext=(-6, 0), textcoords="offset points", fontsize=9, ha="right")
    losses.legend(fontsize=9, loc="upper left")
    ratios.legend(fontsize=8, loc="upper left", ncols=2)
    scores.legend(fontsize=8, loc="center right")
    _save(figure, path)


def backoff(path: Path) -> None:
    """Draw a training without normalisation, alone and under the default policy. It takes minutes of two cores."""
    setting = Setting(lr=0.01, norm="none", clip=0.0, steps=150, context=128, width=128)
    with tempfile.TemporaryDirectory() as directory:
        alone = run_training("alone", setting, None, Path(directory))
        guarded = run_training("guarded", setting, PolicyConfig().name, Path(directory))
    trained = {"unguarded": (alone, plots.DEAD), "koopmon run": (guarded, plots.ALIVE)}
    curves = [
        plots.Curve(
            label=label,
            steps=[step.step for step in outcome.record.steps],
            losses=[step.loss for step in outcome.record.steps],
            diverged=outcome.diverged,
            colour=colour,
        )
        for label, (outcome, colour) in trained.items()
    ]
    rows = guarded.record.observations
    watched = plots.Watched(
        steps=[row.step for row in rows],
        risks=[row.risk for row in rows],
        lr_scales=[row.training.lr_scale for row in rows],
        kss_alphas=[row.training.kss_alpha for row in rows],
        commands=list(applied_commands(guarded.record.decisions)),
    )
    title = f"Byte-level transformer without normalisation, AdamW at {setting.lr:g}, {setting.num_ranks} ranks"
    plots.demo(curves, watched, path, title=title)


def faults(path: Path) -> None:
    """Draw the recovery of each kind of fault in the campaign's results: the median and the longest."""
    told = json.loads(FAULTS.read_text(encoding="utf-8"))
    kinds = sorted(told["kinds"], key=lambda kind: float(kind["recovery_median_seconds"]), reverse=True)
    figure, (panel,) = _figure(1, 1, (9.0, 6.6))
    for row, kind in enumerate(kinds):
        median, longest = kind["recovery_median_seconds"], kind["recovery_max_seconds"]
        panel.plot([median, longest], [row, row], color=plots.REFERENCE, linewidth=1.5, zorder=1)
        panel.scatter([median], [row], color=plots.ALIVE, zorder=2)
        panel.scatter([longest], [row], color=plots.REFERENCE, marker="|", s=80, zorder=2)
    names = [f"{kind['kind'].replace('_', ' ')}  ({kind['unaffected']} of {kind['injections']})" for kind in kinds]
    panel.set_yticks(range(len(kinds)), names, fontsize=9)
    panel.set_xlabel("seconds from the end of the fault until the guard sees again: median, and the longest")
    total = told["total"]
    title = f"Training went on undisturbed in {total['unaffected']} of {total['injections']} injected faults"
    panel.set_title(title, fontsize=11)
    _save(figure, path)


def learning_rates(path: Path) -> None:
    """Draw the final loss by peak learning rate, its mean and range over seeds: a panel a decoder, a row a size."""
    models = json.loads(PROVING_GROUND.read_text(encoding="utf-8"))["models"]
    names = {"pre": "Pre-LN", "rms": "RMSNorm"}
    usual = ("adamw", 0.0)
    models = [each for each in models if each["family"] in names and (each["optimizer"], each["weight_decay"]) == usual]
    rows = len({model["width"] for model in models})
    figure, panels = _figure(rows, len(models) // rows, (5.6 * len(models) // rows, 4.4 * rows))
    for panel, model in zip(panels, models, strict=True):
        for arm, (words, colour, line) in ARMS.items():
            losses = model["arms"].get(arm, {}).get("losses", {})
            if not losses:
                continue
            rates = [float(rate) for rate in losses]
            means = [float(np.mean(found)) for found in losses.values()]
            panel.plot(rates, means, line, color=colour, markersize=4, label=words)
            lowest, highest = [min(found) for found in losses.values()], [max(found) for found in losses.values()]
            panel.fill_between(rates, lowest, highest, color=colour, alpha=0.15, linewidth=0)
        seeds = len(model["arms"]["clip"]["losses"][f"{model['best_rate']:g}"])
        name = names[model["family"]]
        size = f"D {model['width']}, L {model['num_layers']}"
        panel.set_title(f"{name}, {size}: mean and range of {seeds} held-out seeds", fontsize=11)
        panel.set(xscale="log", xlabel="peak learning rate", ylabel="final validation loss (nats)")
        panel.legend(fontsize=9, loc="upper left")
    _save(figure, path)


PICTURES: dict[str, Callable[[Path], None]] = {
    "schemes": schemes,
    "alarm": alarm,
    "backoff": backoff,
    "faults": faults,
    "learning_rates": learning_rates,
}


def _recorded(recipe: Recipe) -> Kept[Recipe]:
    return Kept(recipe, *train(recipe))


def _depth_colour(depth: int, num_layers: int) -> Any:
    return colormaps["viridis"](0.9 * depth / max(1, num_layers - 1))


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    figure: Any = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = np.ravel(figure.subplots(rows, columns, sharex="col", squeeze=False)).tolist()
    for panel in panels:
        panel.grid(alpha=0.25)
    return figure, panels


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, format="png")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=__doc__)
    parser.add_argument("--only", choices=PICTURES, action="append")
    parser.add_argument("--out", type=Path, default=DIRECTORY)
    options = parser.parse_args(arguments)
    for name in options.only or PICTURES:
        PICTURES[name](options.out / f"{name}.png")
        print(f"{name}: {options.out / name}.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
