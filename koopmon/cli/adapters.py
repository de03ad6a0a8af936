"""`koopmon adapters`: which architectures are known here, and which plugin brought each; `check` tries one out."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from koopmon.cli import check

EPILOG = "Example: koopmon adapters --json"


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(invoke_without_command=True)
    group.callback(epilog=EPILOG)(adapters)
    check.add_to(group)
    app.add_typer(group, name="adapters")


def adapters(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> int:
    """List the architecture adapters with the plugin and the distribution that brought each.

    A plugin that cannot be used is listed with the reason.
    """
    if context.invoked_subcommand is not None:
        return 0
    found = _found()
    if as_json:
        print(json.dumps(found))  # noqa: T201 - a result
        return 0
    table = Table("adapter", "plugin", "distribution", "")
    for row in found["adapters"]:
        table.add_row(row["name"], row["plugin"], row["distribution"], row["summary"])
    for row in found["failures"]:
        table.add_row("-", row["plugin"], row["distribution"], f"not usable: {row['reason']}", style="red")
    Console(soft_wrap=True).print(table)
    return 0


def _found() -> dict[str, list[dict[str, str]]]:
    # Late: torch comes with it.
    from koopmon import plugins
    from koopmon.hookspecs import PROJECT

    homes: dict[str, str] = {}
    for entry in entry_points(group=PROJECT):
        home = "" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
        homes |= {entry.name: home, f"{entry.name} of {entry.value}": home}
    manager = plugins.plugin_manager()
    known = plugins.adapters(manager)
    brought: dict[str, str] = {}
    for implementation in manager.hook.koopmon_architecture_adapters.get_hookimpls():
        for adapter in _offers(implementation):
            brought[adapter.name] = implementation.plugin_name
    rows = []
    for name, adapter in known.items():
        plugin = brought.get(name, "")
        summary = (type(adapter).__doc__ or "").strip().split("\n")[0]
        rows.append({"name": name, "plugin": plugin, "distribution": homes.get(plugin, ""), "summary": summary})
    failures = [
        {"plugin": plugin, "distribution": homes.get(plugin, ""), "reason": reason}
        for plugin, reason in manager.failures.items()
    ]
    return {"adapters": rows, "failures": failures}


def _offers(implementation: Any) -> list[Any]:
    return list(implementation.function())
