"""`koopmon report`: writes a one-page report of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from koopmon.cli.find_history import opened
from koopmon.cli.options import ConfigFile
from koopmon.config import load
from koopmon.errors import KoopmonError, one_line

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
    """Write what happened in a run: one HTML file that needs nothing else.

    After a run or while it goes on: reading disturbs no monitor that writes. The risks that count as high are those of
    the configuration's `[policy]`, which a history does not keep.
    """
    from koopmon.report.glance import glance
    from koopmon.report.page import page
    from koopmon.report.run_report import build_report

    policy = load(config).policy
    with opened(run, store) as (history, path):
        facts = build_report(history, path.absolute(), run, policy)
    if out is None and not as_json:
        out = Path(f"koopmon-report-{run.replace('/', '_')}")
    if out is not None:
        path = out / "report.html"
        try:
            out.mkdir(parents=True, exist_ok=True)
            path.write_text(page(facts), encoding="utf-8")
        except OSError as error:
            raise KoopmonError(f"--out {out}: cannot be written: {error.strerror}") from None
        if not as_json:
            for name, value in glance(facts).items():
                print(one_line(f"{name}: {value}", 2000))  # noqa: T201 - a result
            print(path)  # noqa: T201 - a result
    if as_json:
        print(json.dumps(facts.to_dict()))  # noqa: T201 - a result
    return 0
