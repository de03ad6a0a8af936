"""`koopmon doctor`: finds the reason why the monitor does not receive a job."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.table import Table
from rich.text import Text

from koopmon.cli.console import print_json, results
from koopmon.cli.launch_inspection import state_directory
from koopmon.cli.options import AsJson, ConfigFile, KeysDirectory, PlaintextTcp, option, overrides
from koopmon.config import Config, load
from koopmon.errors import StoreError
from koopmon.run_names import check_run_name

if TYPE_CHECKING:
    from koopmon.doctor.findings import Finding

SOMETHING_FAILS = 3
_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(
    factory: Annotated[
        str | None, typer.Argument(metavar="[FACTORY]", help="Model to check: module:function or file.py:function.")
    ] = None,
    monitor: Annotated[
        str | None, option("ENDPOINT", "Endpoint of the monitor. Default: KOOPMON_ENDPOINT, else tcp://127.0.0.1:9465.")
    ] = None,
    http: Annotated[str | None, option("URL", "Pages of the monitor. Default: those of the default monitor.")] = None,
    run: Annotated[str | None, option("NAME", "Run to check at the monitor.")] = None,
    config: ConfigFile = None,
    keys: KeysDirectory = None,
    insecure_plaintext_tcp: PlaintextTcp = False,
    python: Annotated[str | None, option("FILE", "Python of the job. Default: this one.")] = None,
    as_json: AsJson = False,
) -> int:
    """Find out why the monitor does not see a job, and print each finding with its fix.

    Run it in the environment of the job. It does not disturb a monitor: it creates no run and changes no count. The
    exit status is 0 when no check fails, else 3.
    """
    if run is not None:
        check_run_name(run, "--run")
    from koopmon.doctor import environment, http_checks
    from koopmon.doctor.connection import DEFAULT, Connection, wanted_endpoint
    from koopmon.wire.auth_policy import make_auth_policy

    environ = os.environ
    found, finding = environment.configuration(config, environ)
    findings = [finding]
    settings = found or Config()
    if security := overrides("security", keys=keys, insecure_plaintext_tcp=insecure_plaintext_tcp):
        settings = msgspec.structs.replace(settings, security=load(overrides=security).security)
    trust = make_auth_policy(**msgspec.structs.asdict(settings.security), environ=environ)
    endpoint, source = wanted_endpoint(monitor, environ)
    connection = Connection(endpoint, source, trust, run or environ.get("KOOPMON_RUN") or None)
    findings += connection.findings()
    pages = None
    if http is not None or endpoint.replace("localhost", "127.0.0.1") == DEFAULT:
        token = environ.get("KOOPMON_HTTP_TOKEN", "")
        pages = http_checks.Pages(http or http_checks.DEFAULT, token, optional=http is None)
        findings += pages.findings()
    if run is not None:
        of_run = list(http_checks.of_run(run, connection.reply, pages))
        is_chosen = monitor is not None or "KOOPMON_ENDPOINT" in environ
        if not is_chosen and any(each.level != "ok" for each in of_run) and (own := _of_own_monitor(run)) is not None:
            of_run = [own]
        findings += of_run
    findings += environment.python(python or sys.executable, environ)
    findings += environment.environment(environ, connection.reply)
    findings.append(environment.store(state_directory()))
    if factory is not None:
        findings.append(_taps(factory, settings))
    failing = any(finding.level == "fail" for finding in findings)
    if as_json:
        print_json({"ok": not failing, "findings": findings})
    else:
        _show(findings)
    return SOMETHING_FAILS if failing else 0


def _of_own_monitor(run: str) -> Finding | None:
    """Return the finding about a run of `koopmon run`, which had or has a monitor of its own; None for another run."""
    from koopmon.cli.find_history import opened
    from koopmon.cli.live_monitors import live_monitors
    from koopmon.doctor.findings import fail, ok
    from koopmon.views.run_summary import state_of

    for live in live_monitors():
        if live.run == run:
            return ok("run", f"{run}: running, with a monitor of its own at {live.page}")
    try:
        with opened(run, None) as (history, path, _):
            row = history.run(run)
    except StoreError:
        return None
    if row is None:
        return None
    state = state_of(row.state, row.last_seen, time.time())
    found = f"{run}: {state}; its history is {path}"
    return ok("run", found) if state == "ended" else fail("run", found, f"look at `koopmon report {run}`")


def _taps(factory: str, settings: Config) -> Finding:
    from koopmon.cli import factory as factories
    from koopmon.doctor.findings import fail
    from koopmon.doctor.model import taps

    try:
        model, args, kwargs = factories.load(factory)
    except factories.FactoryError as error:
        return fail("taps", str(error), "give a function that returns (model, batch): file.py:function")
    return taps(model, args, kwargs, settings.model)


def _show(findings: list[Finding]) -> None:
    out = results()
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for finding in findings:
        level = Text(finding.level, style=_STYLES[finding.level])
        said = Text(finding.found)
        if finding.fix:
            said.append(f"\n→ {finding.fix}", style="bold")
        table.add_row(level, Text(finding.check), said)
    out.print(table)
    failed, warned = (sum(finding.level == level for finding in findings) for level in ("fail", "warn"))
    out.print(f"{failed} failed, {warned} warnings" if failed or warned else "all checks passed", soft_wrap=True)
