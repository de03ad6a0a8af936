"""`koopmon doctor`: finds the reason why the monitor does not receive a job."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from koopmon.cli.launch_inspection import state_directory
from koopmon.cli.options import KeysDirectory, PlaintextTcp, security_overrides
from koopmon.config import Config, load
from koopmon.run_names import check_run_name

if TYPE_CHECKING:
    from koopmon.doctor.findings import Finding

EPILOG = "Example: koopmon doctor --monitor tcp://127.0.0.1:9465 --run train-1a2b3c4d"
SOMETHING_FAILS = 3
_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def add_to(app: typer.Typer) -> None:
    app.command("doctor", epilog=EPILOG)(doctor)


def doctor(
    factory: Annotated[
        str | None,
        typer.Argument(metavar="[FACTORY]", help="A model to look at: module:function or file.py:function."),
    ] = None,
    monitor: Annotated[
        str | None, typer.Option(metavar="ENDPOINT", help="The monitor's. Default: KOOPMON_ENDPOINT, else its default.")
    ] = None,
    http: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Its pages. Default: those of the default monitor."),
    ] = None,
    run: Annotated[str | None, typer.Option(metavar="NAME", help="Say what the monitor knows of this run.")] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Configuration, TOML. Default: KOOPMON_CONFIG.")
    ] = None,
    keys: KeysDirectory = None,
    insecure_plaintext_tcp: PlaintextTcp = False,
    python: Annotated[
        str | None, typer.Option(metavar="FILE", help="The Python that the job uses. Default: this one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> int:
    """Say why a job is not seen: each finding with its fix. To be run where the job runs, in its environment.

    Nothing of it disturbs a monitor in use: no run is made, and nothing is counted. The exit status is 0 when nothing
    fails, 3 when something does.
    """
    if run is not None:
        check_run_name(run, "--run")
    findings = list(
        _examine(factory, monitor, http, run, config, security_overrides(keys, insecure_plaintext_tcp), python)
    )
    failing = any(finding.level == "fail" for finding in findings)
    if as_json:
        print(json.dumps({"ok": not failing, "findings": [dataclasses.asdict(each) for each in findings]}))  # noqa: T201
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
        return fail("taps", str(error), "name a function that returns (model, batch): file.py:function")
    return taps(model, args, kwargs, settings.model)


def _show(findings: list[Finding]) -> None:
    out = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
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
    out.print(f"{count} failed, {warned} to look at" if count or warned else "all is well", soft_wrap=True)
