"""`koopmon demo`: one real training at a good rate, and at a wrong one alone and guarded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console

from koopmon import plots
from koopmon.cli.console import print_json, say
from koopmon.cli.options import AsJson, Policy, option
from koopmon.errors import KoopmonError

if TYPE_CHECKING:
    from koopmon.demo.training import DemoResult, Setting


OUT = Path("koopmon-demo")
GOOD_RATE = 0.003


def demo(
    policy: Policy = "auto",
    lr: Annotated[float, option("RATE", "Learning rate. The default one ruins the training.")] = 0.05,
    steps: Annotated[int, option("N", "Optimizer steps of each training.", min=1)] = 200,
    seed: Annotated[int, option("N", "Seed of all trainings.", min=0)] = 0,
    directory: Annotated[Path, option("DIR", "Directory of the picture, the logs and the histories.", "--out")] = OUT,
    as_json: AsJson = False,
) -> int:
    """Train a model four times on two ranks, alone and under koopmon, and compare: under 5 minutes.

    A byte-level Pre-LN transformer learns the source of Python's standard library with AdamW: at a good rate, at a rate
    that is too high, at that rate with gradient clipping, and at that rate with gradient clipping under `koopmon run`.
    The exit status is 1 if the rate did not ruin the training, or if koopmon did not save it.
    """
    from koopmon.demo.training import Setting, run_training
    from koopmon.demo.view import LiveView, summary_table, verdict

    setting = Setting(lr=lr, steps=steps, seed=seed)
    console = Console(stderr=as_json, highlight=False, soft_wrap=True)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KoopmonError(f"--out {directory}: {error.strerror}") from None
    console.print(
        f"{setting.num_ranks} ranks, {setting.layers} Pre-LN blocks of width {setting.width}, AdamW, "
        f"{setting.steps} steps, seed {setting.seed}; files in {directory}/"
    )

    def trained(name: str, setting: Setting, guard: str | None = None) -> DemoResult:
        view = LiveView(console, f"{name}: {setting.title(guard)}", guarded=guard is not None)
        with console.status("starting" if guard is None else "starting the monitor and the ranks"):
            return run_training(name, setting, guard, directory, view.update)

    good = trained("good", replace(setting, lr=GOOD_RATE))
    alone = trained("alone", replace(setting, clip=0.0))
    clipped = trained("clipped", setting)
    guarded = trained("guarded", setting, policy)
    outcomes = [good, alone, clipped, guarded]
    console.print()
    console.print(summary_table(outcomes))
    conclusion = verdict(good, clipped, guarded)
    console.print(conclusion, soft_wrap=True)
    picture = _draw(setting, outcomes, directory / "demo.png")
    if picture is not None:
        console.print(f"picture: {picture}", soft_wrap=True)
    shown = not clipped.is_as_good_as(good) and guarded.is_as_good_as(good)
    if as_json:
        fields = ("title", "policy", "diverged", "last_step", "final_loss", "first_command_step")
        trainings = [
            {name: getattr(outcome, name) for name in fields}
            | {"seconds": round(outcome.seconds, 1), "guard": outcome.summary}
            for outcome in outcomes
        ]
        drawn = None if picture is None else str(picture)
        result = {"setting": setting, "trainings": trainings, "verdict": conclusion, "picture": drawn, "shown": shown}
        print_json(result)
    return 0 if shown else 1


def _draw(setting: Setting, outcomes: list[DemoResult], path: Path) -> Path | None:
    """Draw the plot and return its path; None without matplotlib, which the demonstration does not require."""
    from koopmon.demo.training import applied_commands

    colours = [plots.REFERENCE, plots.KSS, plots.DEAD, plots.ALIVE]
    curves = [
        plots.Curve(
            label=outcome.title,
            steps=[step.step for step in outcome.record.steps],
            losses=[step.loss for step in outcome.record.steps],
            diverged=outcome.diverged,
            colour=colour,
        )
        for outcome, colour in zip(outcomes, colours, strict=True)
    ]
    guarded = outcomes[-1].record
    watched = plots.Watched(
        steps=[row.step for row in guarded.observations],
        risks=[row.risk for row in guarded.observations],
        lr_scales=[row.training.lr_scale for row in guarded.observations],
        kss_alphas=[row.training.kss_alpha for row in guarded.observations],
        commands=list(applied_commands(guarded.decisions)),
    )
    title = f"Byte-level Pre-LN transformer, AdamW, {setting.num_ranks} ranks"
    try:
        plots.demo(curves, watched, path, title=title)
    except plots.PlotError as error:
        say(str(error))
        return None
    return path
