"""`koopmon adapters`: lists the architecture adapters and their plugins; `check` tests one adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich.table import Column, Table
from rich.text import Text

from koopmon.cli.check import check
from koopmon.cli.console import print_json, results
from koopmon.cli.options import AsJson
from koopmon.errors import one_line

if TYPE_CHECKING:
    from koopmon.api import ArchitectureAdapter


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(invoke_without_command=True)
    group.callback(epilog="Example: koopmon adapters --json")(adapters)
    group.command("check", epilog="Example: koopmon adapters check mypackage", no_args_is_help=True)(check)
    app.add_typer(group, name="adapters")


def adapters(context: typer.Context, as_json: AsJson = False) -> int:
    """List the architecture adapters with the plugin and the distribution of each.

    Unusable ones are listed with the reason: a plugin that fails or takes too long, and an adapter whose name is taken.
    If two adapters claim a model equally, koopmon's own wins, with a log line when the model is attached.
    """
    if context.invoked_subcommand is not None:
        return 0
    found = _found()
    if as_json:
        print_json(found)
        return 0
    table = Table(*(Column(heading, overflow="fold") for heading in ("adapter", "plugin", "distribution", "")))
    for kind, said in (("adapters", ""), ("left_out", "not used: "), ("failures", "not usable: ")):
        for row in found[kind]:
            told = f"{said}{row.get('summary') or row.get('reason', '')}"
            cells = (row.get("name", "-"), row["plugin"], row["distribution"], told)
            table.add_row(*map(Text, cells), style="red" if said else "")  # no markup: the text comes from plugins
    results().print(table, soft_wrap=True)
    return 0


def _found() -> dict[str, list[dict[str, str]]]:
    # Imported late because it imports torch.
    from koopmon import plugins

    manager = plugins.plugin_manager()
    known = plugins.adapters(manager)
    brought = {adapter.name: plugin for plugin, offers in manager.offers.items() for adapter in offers}

    def place(plugin: str) -> dict[str, str]:
        return {"plugin": plugin, "distribution": manager.calls(plugin).distribution}

    def summary(adapter: ArchitectureAdapter) -> str:
        return one_line((type(plugins.original(adapter)).__doc__ or "").strip().split("\n")[0])

    left_out = manager.left_out.items()
    return {
        "adapters": [{"name": name, **place(brought[name]), "summary": summary(each)} for name, each in known.items()],
        "left_out": [{"name": name, **place(plugin), "reason": reason} for (plugin, name), reason in left_out],
        "failures": [{**place(plugin), "reason": reason} for plugin, reason in manager.failures.items()],
    }
