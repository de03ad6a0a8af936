"""`koopmon demo`: one real training, unguarded and guarded, side by side."""

from __future__ import annotations

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


def demo(
    # Not the default policy of a guarded job: the demonstration shows every action and the effect of KSS.
    policy: Policy = "kss+lr",
    lr: Annotated[float, option("RATE", "Learning rate. The default one makes the training diverge.")] = 0.01,
    steps: Annotated[int, option("N", "Optimizer steps of each training.", min=1)] = 150,
    seed: Annotated[int, option("N", "Seed of both trainings.", min=0)] = 0,
    directory: Annotated[Path, option("DIR", "Directory of the picture, the logs and the histories.", "--out")] = OUT,
    as_json: AsJson = False,
) -> int:
    """Train a model twice on two ranks, alone and under koopmon, and compare: under 5 minutes.

    A byte-level transformer without normalisation learns the source of Python's standard library, first alone, then
    under `koopmon run` with the same seeds. If the policy has KSS beside the back-off, a third training with back-off
    alone shows the effect of KSS. The exit status is 1 if the unguarded training did not diverge, or if the guarded
    one did.
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
        f"{setting.num_ranks} ranks, {setting.layers} blocks of width {setting.width} without normalisation, "
        f"AdamW at {setting.lr:g}, {setting.steps} steps, seed {setting.seed}; files in {directory}/"
    )

    def trained(guard: str | None, title: str) -> DemoResult:
        view = LiveView(console, title, guarded=guard is not None)
        with console.status("starting" if guard is None else "starting the monitor and the ranks"):
            return run_training(setting, guard, directory, view.update)

    unguarded = trained(None, "1. unguarded")
    guarded = trained(policy, f"2. the same under koopmon run --policy {policy}")
    yardstick = trained("lr", "3. the same with back-off alone, for comparison") if policy == "kss+lr" else None
    outcomes = [outcome for outcome in (unguarded, guarded, yardstick) if outcome is not None]
    console.print()
    console.print(summary_table(outcomes))
    lines = verdict(unguarded, guarded, yardstick)
    console.print(*lines, sep="\n", soft_wrap=True)
    picture = _draw(setting, outcomes, directory / "demo.png")
    if picture is not None:
        console.print(f"picture: {picture}", soft_wrap=True)
    shown = unguarded.diverged and guarded.survived
    if as_json:
        fields = ("policy", "diverged", "last_step", "start_loss", "final_loss", "first_command_step")
        trainings = [
            {name: getattr(outcome, name) for name in fields}
            | {"seconds": round(outcome.seconds, 1), "guard": outcome.summary}
            for outcome in outcomes
        ]
        drawn = None if picture is None else str(picture)
        result = {"setting": setting, "trainings": trainings, "verdict": lines, "picture": drawn, "shown": shown}
        print_json(result)
    return 0 if shown else 1


def _draw(setting: Setting, outcomes: list[DemoResult], path: Path) -> Path | None:
    """Draw the plot and return its path; None without matplotlib, which the demonstration does not require."""
    from koopmon.demo.training import applied_commands

    colours = [plots.DEAD, plots.ALIVE, plots.REFERENCE]
    curves = [
        plots.Curve(
            label="unguarded" if outcome.policy is None else f"koopmon run --policy {outcome.policy}",
            steps=[step.step for step in outcome.record.steps],
            losses=[step.loss for step in outcome.record.steps],
            diverged=outcome.diverged,
            colour=colour,
        )
        for outcome, colour in zip(outcomes, colours, strict=False)
    ]
    guarded = outcomes[1].record
    watched = plots.Watched(
        steps=[row.step for row in guarded.observations],
        risks=[row.risk for row in guarded.observations],
        lr_scales=[row.training.lr_scale for row in guarded.observations],
        kss_alphas=[row.training.kss_alpha for row in guarded.observations],
        commands=list(applied_commands(guarded.decisions)),
    )
    title = f"Byte-level transformer without normalisation, AdamW at {setting.lr:g}, {setting.num_ranks} ranks"
    try:
        plots.demo(curves, watched, path, title=title)
    except plots.PlotError as error:
        say(str(error))
        return None
    return path
