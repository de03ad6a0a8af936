"""`koopmon report`: writes a one-page report of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from koopmon import plots
from koopmon.cli.console import say
from koopmon.cli.find_history import opened
from koopmon.cli.options import ConfigFile
from koopmon.config import load
from koopmon.errors import KoopmonError, one_line

if TYPE_CHECKING:
    from koopmon.report.run_report import RunReport

EPILOG = "Example: koopmon report train-1a2b3c4d --out report"


def add_to(app: typer.Typer) -> None:
    app.command("report", epilog=EPILOG, no_args_is_help=True)(report)


def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run's name, as `koopmon run` printed it.")],
    store: Annotated[
        Path | None, typer.Option(metavar="FILE", help="History, SQLite. Default: the run's own, else the monitor's.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where it is written. Default: koopmon-report-RUN, here.")
    ] = None,
    config: ConfigFile = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the facts as JSON; files are written with --out alone.")
    ] = False,
) -> int:
    """Write what happened in a run: one HTML file that needs nothing else, and its pictures as PNGs.

    After a run or while it goes on: reading disturbs no monitor that writes. The risks that count as high are those of
    the configuration's `[policy]`, which a history does not keep.
    """
    from koopmon.report import narrative
    from koopmon.report.run_report import build_report

    policy = load(config).policy
    with opened(run, store) as (history, path):
        facts = build_report(history, path.absolute(), run, policy)
    if out is None and not as_json:
        out = Path(f"koopmon-report-{run.replace('/', '_')}")
    if out is not None:
        page = _write(facts, out)
        if not as_json:
            print(one_line(narrative.headline(facts), 2000))  # noqa: T201 - a result
            print(page)  # noqa: T201 - a result
    if as_json:
        print(json.dumps({"headline": narrative.headline(facts), "helped": narrative.helped(facts), **facts.to_dict()}))  # noqa: T201
    return 0


def _write(facts: RunReport, out: Path) -> Path:
    """Write the page and its plots; return the page's path. Without matplotlib it writes only the page.

    Raises KoopmonError.
    """
    from koopmon.report.page import page
    from koopmon.report.pictures import Picture, draw

    pictures: dict[str, Picture] = {}
    without = ""
    path = out / "report.html"
    try:
        out.mkdir(parents=True, exist_ok=True)
        try:
            plots.require("pictures")
        except plots.PlotError as error:
            without = str(error)
            say(without)
        else:
            pictures = draw(facts, out)
        path.write_text(page(facts, pictures, without), encoding="utf-8")
    except OSError as error:
        raise KoopmonError(f"--out {out}: cannot be written: {error.strerror}") from None
    return path
