"""`koopmon grafana`: dashboards and alert rules for Prometheus and Grafana."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from koopmon.cli.console import say
from koopmon.cli.grafana_push import EPILOG as PUSH_EPILOG
from koopmon.cli.grafana_push import push
from koopmon.errors import KoopmonError

EPILOG = "Example: koopmon grafana export grafana"
EXPORT_EPILOG = "Example: koopmon grafana export grafana --docs-url https://docs.example.org/alerts"

DocsUrl = Annotated[
    str | None,
    typer.Option(
        "--docs-url",
        metavar="URL",
        help="Page that runbook links point to. Default: /alerts of the monitor that the alert is about.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="Dashboards and alert rules for Prometheus and Grafana.")
    group.callback(epilog=EPILOG)(lambda: None)
    group.command("export", epilog=EXPORT_EPILOG)(export)
    group.command("push", epilog=PUSH_EPILOG)(push)
    app.add_typer(group, name="grafana")


def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Made if need be; its files are replaced.")],
    docs_url: DocsUrl = None,
    prometheus_url: Annotated[
        str, typer.Option("--prometheus-url", metavar="URL", help="Where the provisioned Grafana finds Prometheus.")
    ] = "http://prometheus:9090",
    docs: Annotated[
        Path | None,
        typer.Option("--docs", metavar="DIR", help="Write the pages alerts.md and metrics.md there, for --docs-url."),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Write dashboards, Prometheus' rules and Grafana's provisioning as files."""
    # Imported late because it imports prometheus_client.
    from koopmon.grafana.files import files, write
    from koopmon.grafana.pages import pages

    wanted = {directory: files(docs_url=docs_url, prometheus_url=prometheus_url)}
    if docs is not None:
        wanted[docs] = {**wanted.get(docs, {}), **pages()}
    for place, contents in wanted.items():
        try:
            write(place, contents)
        except OSError as error:
            raise KoopmonError(f"{error.filename or place}: cannot be written: {error.strerror}") from None
    if as_json:
        written = sorted(str(place / name) for place, contents in wanted.items() for name in contents)
        print(json.dumps({"files": written}))  # noqa: T201 - a result
    for place, contents in () if as_json else wanted.items():
        say(f"{len(contents)} files in {place}")
    return 0
