"""`koopmon doctor`: finds the reason why the monitor does not receive a job."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.table import Table
from rich.text import Text

from koopmon.cli.console import print_json, results
from koopmon.cli.launch_inspection import state_directory
from koopmon.cli.options import AsJson, ConfigFile, KeysDirectory, PlaintextTcp, security_overrides
from koopmon.config import Config, load
from koopmon.run_names import check_run_name

if TYPE_CHECKING:
    from koopmon.doctor.findings import Finding

SOMETHING_FAILS = 3
_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(
    factory: Annotated[
        str | None,
        typer.Argument(metavar="[FACTORY]", help="Model to check: module:function or file.py:function."),
    ] = None,
    monitor: Annotated[
        str | None,
        typer.Option(
            metavar="ENDPOINT", help="Endpoint of the monitor. Default: KOOPMON_ENDPOINT, else tcp://127.0.0.1:9465."
        ),
    ] = None,
    http: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Pages of the monitor. Default: those of the default monitor."),
    ] = None,
    run: Annotated[str | None, typer.Option(metavar="NAME", help="Run to check at the monitor.")] = None,
    config: ConfigFile = None,
    keys: KeysDirectory = None,
    insecure_plaintext_tcp: PlaintextTcp = False,
    python: Annotated[str | None, typer.Option(metavar="FILE", help="Python of the job. Default: this one.")] = None,
    as_json: AsJson = False,
) -> int:
    """Find out why the monitor does not see a job, and print each finding with its fix.

    Run it in the environment of the job. It does not disturb a monitor: it creates no run and changes no count. The
    exit status is 0 when no check fails, else 3.
    """
    if run is not None:
        check_run_name(run, "--run")
    findings = list(
        _examine(factory, monitor, http, run, config, security_overrides(keys, insecure_plaintext_tcp), python)
    )
    failing = any(finding.level == "fail" for finding in findings)
    if as_json:
        print_json({"ok": not failing, "findings": [dataclasses.asdict(each) for each in findings]})
    else:
        _show(findings)
    return SOMETHING_FAILS if failing else 0


def _examine(
    factory: str | None,
    monitor: str | None,
    http: str | None,
    run: str | None,
    config: Path | None,
    security: Mapping[str, object],
    python: str | None,
) -> Iterator[Finding]:
    from koopmon.doctor import environment, http_checks
    from koopmon.doctor.connection import DEFAULT, Connection, Named
    from koopmon.wire.auth_policy import make_auth_policy

    environ = os.environ
    settings, finding = environment.configuration(config, environ)
    yield finding
    settings = settings or Config()
    if security:
        settings = msgspec.structs.replace(settings, security=load(overrides=security).security)
    named = Named.of(monitor, environ)
    asked = run or environ.get("KOOPMON_RUN") or None
    trust = make_auth_policy(**msgspec.structs.asdict(settings.security), environ=environ)
    connection = Connection(named, trust, asked)
    yield from connection.findings()
    shown = None
    if http is not None or named.endpoint.replace("localhost", "127.0.0.1") == DEFAULT:
        token = environ.get("KOOPMON_HTTP_TOKEN", "")
        shown = http_checks.Pages(http or http_checks.DEFAULT, token, optional=http is None)
        yield from shown.findings()
    if run is not None:
        yield from http_checks.of_run(run, connection.reply, shown)
    yield from environment.python(python or sys.executable, environ)
    yield from environment.environment(environ, connection.reply)
    yield environment.store(state_directory())
    if factory is not None:
        yield _taps(factory, settings)


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
    count = sum(finding.level == "fail" for finding in findings)
    warned = sum(finding.level == "warn" for finding in findings)
    out.print(f"{count} failed, {warned} warnings" if count or warned else "all checks passed", soft_wrap=True)
