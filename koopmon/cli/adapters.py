"""`koopmon adapters`: lists the architecture adapters and their plugins; `check` tests one adapter."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from koopmon.cli import check
from koopmon.errors import one_line

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

    What cannot be used is listed with the reason: a plugin that fails or takes too long, and an adapter whose name is
    taken. Of equal claims on a model koopmon's own adapter wins, and a log line says so when the model is attached.
    """
    if context.invoked_subcommand is not None:
        return 0
    found = _found()
    if as_json:
        print(json.dumps(found))  # noqa: T201 - a result
        return 0
    table = Table()
    for heading in ("adapter", "plugin", "distribution", ""):
        table.add_column(heading, overflow="fold")
    for row in found["adapters"]:
        table.add_row(*_cells(row["name"], row["plugin"], row["distribution"], row["summary"]))
    for row in found["left_out"]:
        table.add_row(
            *_cells(row["name"], row["plugin"], row["distribution"], f"not used: {row['reason']}"), style="red"
        )
    for row in found["failures"]:
        table.add_row(*_cells("-", row["plugin"], row["distribution"], f"not usable: {row['reason']}"), style="red")
    Console(soft_wrap=True).print(table)
    return 0


def _cells(*texts: str) -> list[Text]:
    return [Text(text) for text in texts]  # no markup: the text comes from plugins


def _found() -> dict[str, list[dict[str, str]]]:
    # Imported late because it imports torch.
    from koopmon import plugins

    manager = plugins.plugin_manager()
    known = plugins.adapters(manager)
    brought = {adapter.name: plugin for plugin, offers in manager.offers.items() for adapter in offers}

    def place(plugin: str) -> dict[str, str]:
        return {"plugin": plugin, "distribution": manager.calls(plugin).distribution}

    rows = []
    for name, adapter in known.items():
        summary = one_line((type(plugins.original(adapter)).__doc__ or "").strip().split("\n")[0])
        rows.append({"name": name, **place(brought[name]), "summary": summary})
    left_out = [
        {"name": name, **place(plugin), "reason": reason} for (plugin, name), reason in manager.left_out.items()
    ]
    failures = [{**place(plugin), "reason": reason} for plugin, reason in manager.failures.items()]
    return {"adapters": rows, "left_out": left_out, "failures": failures}
