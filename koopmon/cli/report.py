"""`koopmon report`: writes a one-page report of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from koopmon.cli.console import print_json, results
from koopmon.cli.find_history import opened
from koopmon.cli.options import AsJson, ConfigFile, HistoryFile, RunArgument, option
from koopmon.config import load
from koopmon.errors import KoopmonError, one_line


def report(
    run: RunArgument,
    store: HistoryFile = None,
    out: Annotated[Path | None, option("DIR", "Directory of the report. Default: koopmon-report-RUN, here.")] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> int:
    """Write a report of a run: one HTML file that needs no other file.

    It works during a run and after it; the monitor may write meanwhile. `[policy]` of the configuration defines a high
    risk, because a history does not hold it. With --json, files are written only with --out.
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
            lines = [one_line(f"{name}: {value}", 2000) for name, value in glance(facts).items()]
            results().print(*lines, path, sep="\n", soft_wrap=True)
    if as_json:
        print_json(facts.to_dict())
    return 0
