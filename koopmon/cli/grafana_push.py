"""`koopmon grafana push`: writes dashboards, alert rules and notification settings to a running Grafana."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from koopmon.cli.console import say
from koopmon.cli.options import ConfigFile, grafana_overrides
from koopmon.config import load
from koopmon.errors import ConfigError, GrafanaKeptError, KoopmonError, one_line

if TYPE_CHECKING:
    from koopmon.grafana.plan import Change
    from koopmon.grafana.push import Grafana

EPILOG = "Example: koopmon grafana push --url https://grafana.example.org/ --token-file ~/grafana.token --dry-run"


def push(
    url: Annotated[
        str | None,
        typer.Option(envvar="KOOPMON_GRAFANA_URL", metavar="URL", help="Grafana's address, with its sub-path."),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Service account's token, mode 0600. Default: KOOPMON_GRAFANA_TOKEN."),
    ] = None,
    prometheus_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Where Grafana finds Prometheus. Default: as is, else http://localhost:9090."),
    ] = None,
    datasource: Annotated[
        str | None, typer.Option(metavar="UID|NAME", help="A data source that is there already, in place of ours.")
    ] = None,
    folder: Annotated[
        str, typer.Option(metavar="UID", help="Folder for everything; made when it is not there.")
    ] = "koopmon",
    webhook: Annotated[str | None, typer.Option(metavar="URL", help="Alerts go to this webhook.")] = None,
    slack: Annotated[
        str | None,
        typer.Option(envvar="KOOPMON_SLACK_WEBHOOK", metavar="URL", help="Alerts go to this webhook of Slack's."),
    ] = None,
    email: Annotated[
        list[str] | None, typer.Option(metavar="ADDRESS", help="Alerts go to this address; repeatable.")
    ] = None,
    no_alerts: Annotated[
        bool, typer.Option("--no-alerts", help="Dashboards alone: no rules, contact point and policy.")
    ] = False,
    docs_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Page that runbook links point to. Default: /alerts of the alert's monitor."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite also what was edited by hand.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the difference and write nothing.")] = False,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="How long one answer may take. Default: 5.")
    ] = None,
    config: ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> int:
    """Put data source, folder, dashboards, alert rules, contact point and notification policy into Grafana.

    Done twice, the second time changes nothing. What others made is never touched; what was edited by hand, only with
    --force.

    Exit status: 0 done; 1 Grafana failed or refused; 2 a mistake in what was asked, or no Grafana at that address;
    3 the token is not known, or may not; 4 nobody answers; 5 done but for what was kept as it is.
    """
    from koopmon.grafana.access import check_url, read_access
    from koopmon.grafana.bundle import DataSource, make_bundle, make_contacts
    from koopmon.grafana.plan import plan
    from koopmon.grafana.push import Grafana

    access = read_access(load(config, overrides=grafana_overrides(url, token_file, timeout)).grafana, os.environ)
    wanted = DataSource(datasource, prometheus_url and check_url(prometheus_url, "--prometheus-url").rstrip("/"))
    contacts = make_contacts(webhook, slack, email or ())
    _check(datasource, prometheus_url, folder, contacts_alone=bool(contacts) and no_alerts)
    if access.in_clear:
        say(f"{access.url} has no TLS: whoever is on the way can read the token")
    with Grafana(access) as grafana:
        there = grafana.find_datasource(wanted)
        used = {"datasource_uid": there["uid"], "datasource_name": there["name"]} if there is not None else {}
        bundle = make_bundle(wanted, contacts, **used, folder_uid=folder, alerts=not no_alerts, docs_url=docs_url)
        changes = plan(bundle, grafana.find(bundle, there), force=force)
        done, failure = ([], None) if dry_run else _make(grafana, changes, force=force)
    if as_json:
        rows = [_row(change, change in done) for change in changes]
        result = {"url": access.url, "version": grafana.version, "dry_run": dry_run, "changes": rows}
        print(json.dumps(result))  # noqa: T201 - a result
    else:
        _show(changes, done, f"{access.url} (Grafana {grafana.version})", dry_run=dry_run)
    if failure is not None:
        left = _listed(change for change in changes if change.writes and change not in done)
        raise type(failure)(f"{failure}. Done: {_listed(done)}; not done: {left}; the same command goes on from there")
    if kept := [change for change in changes if change.kept]:
        raise GrafanaKeptError("; ".join(f"{change.kind} {change.name!r}: kept: {change.why}" for change in kept))
    return 0


def _check(datasource: str | None, prometheus_url: str | None, folder: str, *, contacts_alone: bool) -> None:
    if datasource is not None and prometheus_url is not None:
        raise ConfigError("--datasource and --prometheus-url: one or the other")
    if datasource == "":
        raise ConfigError("--datasource '': expected a uid or a name")
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", folder):
        raise ConfigError(f"--folder {one_line(folder)!r}: expected a uid: 1 to 40 letters, digits, '-' and '_'")
    if contacts_alone:
        raise ConfigError("--no-alerts: --webhook, --slack and --email are for alerts")


def _make(grafana: Grafana, changes: Sequence[Change], *, force: bool) -> tuple[list[Change], KoopmonError | None]:
    """Apply the changes; return the completed ones and the first error, at which it stops."""
    done: list[Change] = []
    for change in changes:
        if change.writes:
            try:
                grafana.make(change, force=force)
            except KoopmonError as error:
                return done, error
            done.append(change)
    return done, None


def _show(changes: Sequence[Change], done: Sequence[Change], title: str, *, dry_run: bool) -> None:
    table = Table("what", "name", "change", "why", title=title, title_justify="left")
    for change in changes:
        what = "kept" if change.kept else change.action
        failed = change.writes and not dry_run and change not in done
        table.add_row(change.kind, change.name, f"{what}: not done" if failed else what, change.why)
    out = Console(soft_wrap=True, markup=False, highlight=False)
    out.print(table)
    if dry_run:
        for change in changes:
            out.print(_difference(change), end="")
        out.print("dry run: nothing was written")


def _difference(change: Change) -> str:
    """Return a unified diff of an update, or of the difference that prevents one."""
    if change.before is None or change.after is None or change.action == "unchanged":
        return ""
    shown = (json.dumps(each, indent=1, sort_keys=True) for each in (change.before, change.after))
    name = f"{change.kind}/{change.name}"
    before, after = (text.splitlines() for text in shown)
    lines = difflib.unified_diff(before, after, f"grafana/{name}", f"koopmon/{name}", n=2, lineterm="")
    return "".join(f"{line}\n" for line in lines)


def _row(change: Change, done: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": change.kind, "name": change.name, "uid": change.uid, "action": change.action}
    row |= {"why": change.why, "done": done, "kept": change.kept}
    return row | ({"difference": text} if (text := _difference(change)) else {})


def _listed(changes: Iterable[Change]) -> str:
    return ", ".join(f"{change.kind} {change.name!r}" for change in changes) or "nothing"
