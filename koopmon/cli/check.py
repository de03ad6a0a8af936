"""`koopmon adapters check`: tests whether an architecture adapter meets koopmon's requirements."""

from __future__ import annotations

import logging
import re
import sys
from dataclasses import astuple
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from koopmon.cli import factory as factories
from koopmon.cli.console import print_json, results
from koopmon.cli.options import AsJson, option
from koopmon.errors import AdapterError, foreign_code

if TYPE_CHECKING:
    from koopmon.api import ArchitectureAdapter, ExampleModel
    from koopmon.conformance import CheckResult
    from koopmon.plugins import PluginManager

_STYLES = {"passed": "green", "failed": "bold red", "skipped": "yellow"}


def check(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="A package, an adapter's name, or module:object, or file.py:object.")
    ],
    model: Annotated[
        list[str] | None,
        option(
            "FACTORY",
            "module:function or file.py:function that returns (model, batch), in place of the example models of the"
            " package. May be repeated.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Check an architecture adapter: train small models of its family for a few steps.

    The exit status is 0 when no check failed, 1 when one did, 2 when there is nothing to check.
    """
    # The table already contains the adapter errors that koopmon's agent logs.
    logging.getLogger("koopmon").addHandler(logging.NullHandler())
    console = Console(stderr=True)
    with console.status("loading torch") as status:
        from koopmon import plugins
        from koopmon.conformance import CheckResult, checks

        known, manager = _adapters(target)
        factory_models = [_named_model(name) for name in model or ()]
        # A module may be registered twice.
        offered = () if factory_models else dict.fromkeys(plugins.example_models(manager))
        battery, outcomes = [], []
        for adapter in known:
            examples = factory_models or [each for each in offered if each.adapter == adapter.name]
            if not examples:
                outcomes.append(CheckResult(adapter.name, "none", "example", "skipped", _no_model(manager)))
            for example in examples:
                battery += checks(adapter, example)
        if not battery:
            raise AdapterError(f"adapter {known[0].name!r}: {_no_model(manager)}")
        for each in battery:
            status.update(f"{each.bench.adapter.name}, {each.bench.example.name}: {each.name}")
            outcomes.append(each.run())
    counts = {verdict: sum(outcome.verdict == verdict for outcome in outcomes) for verdict in _STYLES}
    if as_json:
        names = ("adapter", "model", "check", "verdict", "detail")
        rows = [dict(zip(names, astuple(outcome), strict=True)) for outcome in outcomes]
        print_json({"checks": rows, **counts})
    else:
        _print(outcomes)
        results().print(", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count))
    return 1 if counts["failed"] else 0


def _adapters(target: str) -> tuple[list[ArchitectureAdapter], PluginManager]:
    """Return the adapters of `target`, and a plugin manager with their example models. Raises KoopmonError."""
    from koopmon import plugins

    manager = plugins.plugin_manager()
    if ":" in target:
        found = _instances(target, factories.named(target, "adapter"))
        module = sys.modules.get(type(found[0]).__module__)
        if module is not None and not manager.is_registered(module):
            manager.register(module, name=target)
        return found, manager
    known = plugins.adapters(manager)
    if target in known:
        return [plugins.original(known[target])], manager
    brought = [plugin for plugin, homes in manager.homes.items() if _normal(target) in map(_normal, homes)]
    for plugin in brought:
        if plugin in manager.failures:
            raise AdapterError(f"plugin {plugin} of {target} is not usable: {manager.failures[plugin]}")
    found = [plugins.original(adapter) for plugin in brought for adapter in manager.offers.get(plugin, ())]
    if found:
        return found, manager
    raise AdapterError(
        f"{target!r} offers no adapter or is not installed; adapters are {', '.join(known) or 'none'}; a module in the "
        "entry-point group koopmon.adapters offers some by a function koopmon_architecture_adapters with "
        "@koopmon.hookimpl; or name one as module:object"
    )


def _instances(target: str, named: Any) -> list[ArchitectureAdapter]:
    """Return the adapters of an object, a class or a function."""
    from koopmon.api import ArchitectureAdapter

    if callable(named) and not isinstance(named, ArchitectureAdapter):
        with foreign_code(lambda why: AdapterError(f"adapter {target!r} {why}")):
            named = named()
    found = list(named) if isinstance(named, (list, tuple)) else [named]
    for each in found:
        if not isinstance(each, ArchitectureAdapter) or not isinstance(getattr(each, "name", None), str):
            what = type(each).__name__
            raise AdapterError(f"adapter {target!r}: expected an ArchitectureAdapter with a name, it is of type {what}")
    if not found:
        raise AdapterError(f"adapter {target!r}: it gives no adapter")
    return found


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _named_model(name: str) -> ExampleModel:
    """Return an example model for any adapter, from the factory `name`. A test call has verified the factory."""
    from koopmon.api import ExampleModel

    factory = factories.named(name)
    factories.call(name, factory)
    return ExampleModel(name, "", lambda seed: factory()[:2])


def _no_model(manager: PluginManager) -> str:
    failed = "".join(f"; plugin {name}: {reason}" for name, reason in manager.failures.items())
    return (
        "no model to test with: offer some by the hook koopmon_example_models, or name one with "
        f"--model file.py:function{failed}"
    )


def _print(outcomes: list[CheckResult]) -> None:
    console = results(width=160)
    for adapter, example in dict.fromkeys((each.adapter, each.example) for each in outcomes):
        columns = (Column("check", no_wrap=True), Column("outcome", no_wrap=True), Column("", overflow="fold"))
        table = Table(*columns, title=f"adapter {adapter}, model {example}", title_justify="left", title_style="")
        for each in outcomes:
            if (each.adapter, each.example) == (adapter, example):
                table.add_row(each.check, Text(each.verdict, _STYLES[each.verdict]), each.detail)
        console.print(table)
