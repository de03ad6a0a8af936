"""`koopmon compare`: shows runs side by side, and the facts that only the bad ones share."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from koopmon.cli.console import print_json, results
from koopmon.cli.find_history import opened
from koopmon.cli.options import AsJson, ConfigFile, HistoryFile, option, run_names
from koopmon.config import load
from koopmon.errors import ConfigError, KoopmonError, one_line
from koopmon.files import write_whole

if TYPE_CHECKING:
    from koopmon.views.comparison import ComparedRun


def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Names of two or more runs.", autocompletion=run_names)
    ],
    store: HistoryFile = None,
    out: Annotated[Path | None, option("FILE", "HTML file with charts of all runs on one axis of steps.")] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> int:
    """Compare runs side by side, and list the facts that only the bad ones share.

    A run is bad if its risk reached `[policy] act_risk` of the configuration, or if its states or its loss were not
    finite. The facts are settings, sizes, versions, and measurements at the start of the run.
    """
    from koopmon.views.comparison import compared_run, shared_facts
    from koopmon.views.run_summary import RecordedRun

    names = list(dict.fromkeys(runs))
    if len(names) < 2:
        raise ConfigError("RUN...: expected two or more different runs; `koopmon runs` lists them")
    policy = load(config).policy
    act_risk = policy.act_risk
    found, recorded = [], []
    for each in names:
        with opened(each, store) as (history, path, name):
            found.append(compared_run(history, path.absolute(), name, act_risk, time.time()))
            if out is not None:
                recorded.append(RecordedRun.read(history, name))
    shared = shared_facts(found)
    if out is not None:
        from koopmon.report.comparison_page import comparison_page

        try:
            write_whole(out, comparison_page(_rows(found), shared, _nothing(found, act_risk), recorded, policy))
        except OSError as error:
            raise KoopmonError(f"--out {out}: cannot be written: {error.strerror}") from None
    if as_json:
        print_json({"act_risk": act_risk, "runs": [asdict(run) for run in found], "only_bad": shared})
        return 0
    _print(found)
    num_bad = sum(run.problem is not None for run in found)
    if num_bad in (0, len(found)):
        lines = [_nothing(found, act_risk)]
    else:
        lines = [f"only the bad runs ({num_bad} of {len(found)}) have in common:"]
        lines += [one_line(f"  {fact.words}", 500) for fact in shared] or [f"  {_nothing(found, act_risk)}"]
    results().print(*lines, sep="\n", soft_wrap=True)
    return 0


def _nothing(runs: Sequence[ComparedRun], act_risk: float) -> str:
    """Return the sentence for runs without a shared fact."""
    num_bad = sum(run.problem is not None for run in runs)
    if num_bad in (0, len(runs)):
        kind = "good: no risk" if not num_bad else "bad: a risk"
        return f"all runs are {kind} of {act_risk:.2f} or more"
    return "no known fact"


def _print(runs: Sequence[ComparedRun]) -> None:
    from rich.table import Column, Table

    table = Table("", *(Column(one_line(run.run, 128), overflow="fold") for run in runs))
    for name, cells in _rows(runs).items():
        table.add_row(name, *cells)
    results(width=max(120, 40 * len(runs))).print(table, soft_wrap=True)


def _rows(runs: Sequence[ComparedRun]) -> dict[str, list[str]]:
    """Return one text for each run, by title."""
    return {
        "state": [run.state for run in runs],
        "verdict": ["good" if run.problem is None else f"bad: {run.problem}" for run in runs],
        "launches": [str(run.num_launches) for run in runs],
        "snapshots": [str(run.num_snapshots) for run in runs],
        "last step": ["–" if run.last_step is None else str(run.last_step) for run in runs],
        "loss, first to last": [f"{_number(run.first_loss)} → {_number(run.last_loss)}" for run in runs],
        "highest risk": [_risk(run) for run in runs],
        "peak learning rate": [_number(run.peak_learning_rate) for run in runs],
        "lowest LR scale": [_number(run.min_lr_scale) for run in runs],
        "actions": ["\n".join(run.actions) or "none" for run in runs],
    }


def _risk(run: ComparedRun) -> str:
    return "–" if run.max_risk is None else f"{run.max_risk:.2f} at step {run.max_risk_step}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
