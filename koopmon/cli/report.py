"""`koopmon report`: writes a one-page report of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from koopmon.cli.console import print_json, results, warn
from koopmon.cli.find_history import opened
from koopmon.cli.options import AsJson, ConfigFile, HistoryFile, RunArgument, option
from koopmon.config import load
from koopmon.errors import KoopmonError, one_line
from koopmon.files import write_whole
from koopmon.run_names import file_name


def report(
    run: RunArgument = None,
    store: HistoryFile = None,
    out: Annotated[Path | None, option("DIR", "Directory of the report. Default: koopmon-report-RUN, here.")] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Show the page in a browser.")] = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> int:
    """Write a report of a run: one HTML file that needs no other file.

    Without RUN it reports the latest run. It works during a run and after it; the monitor may write meanwhile.
    `[policy]` of the configuration defines a high risk, because a history does not hold it. With --json, files are
    written only with --out or --open.
    """
    from koopmon.report.glance import glance
    from koopmon.report.page import page
    from koopmon.report.run_report import build_report

    policy = load(config).policy
    with opened(run, store) as (history, path, name):
        facts = build_report(history, path.absolute(), name, policy)
        if out is None and (open_page or not as_json):
            out = Path(f"koopmon-report-{file_name(name)}")
        text = "" if out is None else page(facts)
    if out is not None:
        path = out / "report.html"
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_whole(path, text)
        except OSError as error:
            raise KoopmonError(f"--out {out}: cannot be written: {error.strerror}") from None
        if not as_json:
            heading = [f"Run: {name}"] if run is None else []
            lines = [one_line(f"{name}: {value}", 2000) for name, value in glance(facts).items()]
            results().print(*heading, *lines, path, sep="\n", soft_wrap=True)
        if open_page:
            _open(path)
    if as_json:
        print_json(facts.to_dict())
    return 0


def _open(path: Path) -> None:
    # Imported late because few calls need it.
    import webbrowser

    if not webbrowser.open(path.resolve().as_uri()):
        warn(f"--open: no browser was found; the page is {path}")
