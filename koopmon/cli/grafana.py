"""`koopmon grafana`: dashboards and alert rules, as files or in a running Grafana."""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from koopmon.cli.console import print_json, say, warn
from koopmon.cli.options import AsJson, ConfigFile, option, overrides
from koopmon.config import load
from koopmon.errors import GrafanaKeptError, KoopmonError

if TYPE_CHECKING:
    from koopmon.grafana.push import PushResult
    from koopmon.grafana.resources import Change

DocsUrl = Annotated[
    str | None, option("URL", "Page that runbook links point to. Default: /alerts of the alert's monitor.")
]


def add_to(app: typer.Typer) -> None:
    title, example = "Dashboards and alert rules for Prometheus and Grafana.", "koopmon grafana export grafana"
    group = typer.Typer(no_args_is_help=True, help=title, epilog=f"Example: {example}")
    example = "koopmon grafana export grafana --docs-url https://docs.example.org/alerts"
    group.command("export", epilog=f"Example: {example}")(export)
    example = "koopmon grafana push --url https://grafana.example.org/ --token-file ~/grafana.token --dry-run"
    group.command("push", epilog=f"Example: {example}")(push)
    app.add_typer(group, name="grafana")


def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Created if missing; its files are replaced.")],
    docs_url: DocsUrl = None,
    prometheus_url: Annotated[
        str, option("URL", "Where the provisioned Grafana finds Prometheus.")
    ] = "http://prometheus:9090",
    docs: Annotated[
        Path | None, option("DIR", "Write the pages alerts.md and metrics.md there, for --docs-url.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Write dashboards, Prometheus' rules and Grafana's provisioning as files."""
    # Imported late because it imports prometheus_client.
    from koopmon.grafana.files import files, pages, write

    wanted = {directory: files(docs_url=docs_url, prometheus_url=prometheus_url)}
    if docs is not None:
        wanted[docs] = {**wanted.get(docs, {}), **pages()}
    for place, contents in wanted.items():
        try:
            write(place, contents)
        except OSError as error:
            raise KoopmonError(f"{error.filename or place}: cannot be written: {error.strerror}") from None
        if not as_json:
            say(f"{len(contents)} files in {place}")
    if as_json:
        print_json({"files": sorted(str(place / name) for place in wanted for name in wanted[place])})
    return 0


def push(
    url: Annotated[
        str | None, option("URL", "Grafana's address, with its sub-path.", envvar="KOOPMON_GRAFANA_URL")
    ] = None,
    token_file: Annotated[
        Path | None, option("FILE", "Service account's token, mode 0600. Default: KOOPMON_GRAFANA_TOKEN.")
    ] = None,
    prometheus_url: Annotated[
        str | None, option("URL", "Where Grafana finds Prometheus. Default: as is, else http://localhost:9090.")
    ] = None,
    datasource: Annotated[str | None, option("UID", "Existing data source to use in place of ours.")] = None,
    folder: Annotated[str, option("UID", "Folder for everything; created if missing.")] = "koopmon",
    no_alerts: Annotated[bool, typer.Option("--no-alerts", help="Push the dashboards without alert rules.")] = False,
    docs_url: DocsUrl = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite manual edits too.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the difference and write nothing.")] = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> int:
    """Write data source, folder, dashboards and alert rules to Grafana.

    A second push changes nothing. Resources of others are never touched; manual edits are overwritten only with
    --force.

    Exit status: 0 done; 1 Grafana failed or refused; 2 wrong options, or no Grafana at that address; 3 unknown token,
    or missing permission; 4 no answer; 5 done, but something was kept.
    """
    from koopmon.grafana.access import read_access
    from koopmon.grafana.push import PushOptions, push_to

    options = PushOptions(
        datasource, prometheus_url, folder, docs_url, alerts=not no_alerts, force=force, dry_run=dry_run
    )
    settings = load(config, overrides=overrides("grafana", url=url, token_file=token_file))
    access = read_access(settings.grafana, os.environ)
    if access.in_clear:
        warn(f"{access.url} has no TLS: others on the network can read the token")
    result = push_to(access, options)
    if as_json:
        shown = ("kind", "name", "action", "why", "done")
        rows = [{name: getattr(each, name) for name in shown} for each in result.changes]
        changes = [row | {"difference": _difference(each)} for row, each in zip(rows, result.changes, strict=True)]
        print_json({"url": access.url, "version": result.version, "dry_run": dry_run, "changes": changes})
    else:
        _print(result, access.url, dry_run=dry_run)
    if result.error is not None:
        made, planned = sum(each.done for each in result.changes), sum(each.writes for each in result.changes)
        raise type(result.error)(f"{result.error}; {made} of {planned} changes are made; the same command continues")
    if kept := [change for change in result.changes if change.action == "kept"]:
        raise GrafanaKeptError("; ".join(f"{change.kind} {change.name!r}: kept: {change.why}" for change in kept))
    return 0


def _print(result: PushResult, url: str, *, dry_run: bool) -> None:
    typer.echo(f"{url} (Grafana {result.version})")
    for change in result.changes:
        why = f" ({change.why})" if change.why else ""
        failed = ": not done" if change.writes and not (change.done or dry_run) else ""
        typer.echo(f"{change.action:9} {change.kind} {change.name}{why}{failed}")
        typer.echo(_difference(change) if dry_run else "", nl=False)
    if dry_run:
        typer.echo("dry run: nothing was written")


def _difference(change: Change) -> str:
    """Return a unified diff of an update, or of the difference that prevents one."""
    if change.before is None or change.action == "unchanged":
        return ""
    before, after = (json.dumps(each, indent=1, sort_keys=True).splitlines() for each in (change.before, change.after))
    lines = difflib.unified_diff(before, after, "grafana", "koopmon", n=2, lineterm="")
    return "".join(f"{line}\n" for line in lines)
