"""Loading of plugins through an entry-point group, and calls of their hooks. A failed plugin is skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import Distribution, EntryPoint, distributions, entry_points
from types import ModuleType
from typing import Any

import pluggy

from koopmon import hookspecs
from koopmon.api import ArchitectureAdapter
from koopmon.errors import PluginError, one_line
from koopmon.plugin_calls import PluginCalls, WrongResultError, bounded_list, describe_failure, say_once

OWN_PACKAGE = "koopmon_adapters"
GROUP = "koopmon.adapters"
"""The entry-point group of the plugins."""
FORMER_GROUP = "koopmon"
"""The group until version 0.1. It is still read."""


class PluginManager(pluggy.PluginManager):
    """pluggy's manager, with a record of unusable plugins and adapters and the reasons."""

    def __init__(self) -> None:
        super().__init__(hookspecs.PROJECT)
        self.failures: dict[str, str] = {}
        """Reasons for the plugins that are skipped, by name."""
        self.left_out: dict[tuple[str, str], str] = {}
        """Reasons for the adapters that are not used, by (plugin, adapter)."""
        self.offers: dict[str, list[ArchitectureAdapter]] = {}
        """The adapters that `adapters` took from each plugin."""
        self.homes: dict[str, tuple[str, ...]] = {}
        """Module, package and distribution of each entry point, by the plugin's name."""
        self._calls: dict[str, PluginCalls] = {}
        self.add_hookspecs(hookspecs)

    def skip(self, name: str, reason: str) -> None:
        """Skip a plugin, and log it once per process."""
        if self.has_plugin(name):
            self.unregister(name=name)
        self.failures[name] = reason
        say_once(f"{self.calls(name).label} is skipped: {reason}")

    def leave_out(self, plugin: str, adapter: str, reason: str) -> None:
        """Leave out one adapter of a plugin, and log it once per process."""
        self.left_out[plugin, adapter] = reason
        say_once(f"{self.calls(plugin).label}: adapter {adapter!r} is left out: {reason}")

    def calls(self, name: str) -> PluginCalls:
        """Return the caller of the code of the plugin `name`."""
        if name not in self._calls:
            self._calls[name] = PluginCalls(name, package=_package(self.get_plugin(name)))
        return self._calls[name]

    def load(self, name: str, entry: EntryPoint) -> None:
        """Import and register the plugin of an entry point, or skip it."""
        package = _top(entry)
        self._calls[name] = calls = PluginCalls(name, _distribution(entry), package)
        self.homes[name] = (entry.value, package, calls.distribution.partition(" ")[0])
        try:
            plugin = calls.run("its import", entry.load, limited=package != OWN_PACKAGE)
            calls.contained("its registration", self._register, plugin, name)
        except PluginError as error:
            self.skip(name, error.reason)

    def _register(self, plugin: object, name: str) -> None:
        self.register(plugin, name=name)
        self.check_pending()
        if not self.get_hookcallers(plugin):
            raise WrongResultError("found no hook: decorate its functions with @koopmon.hookimpl")

    def offered(self, hook: str, check: Callable[[Any], None]) -> Iterator[tuple[str, list[Any]]]:
        """Yield the results of `hook` with each plugin's name: koopmon's own plugins first, then by name.

        A plugin is skipped if it fails, or if `check` raises for one of its results.
        """
        implementations = getattr(self.hook, hook).get_hookimpls()
        for each in sorted(implementations, key=lambda each: (not is_own(each.plugin), each.plugin_name)):

            def call(function: Callable[[], Iterable[Any]] = each.function) -> list[Any]:
                found = bounded_list(function())
                for offer in found:
                    check(offer)
                return found

            try:
                calls = self.calls(each.plugin_name)
                found = calls.run(f"{hook}()", call, limited=not is_own(each.plugin))
            except PluginError as error:
                self.skip(each.plugin_name, error.reason)
            else:
                yield each.plugin_name, found


def _package(plugin: object) -> str:
    """Return the top-level package of a plugin, which is a module or an object."""
    return (plugin.__name__ if isinstance(plugin, ModuleType) else type(plugin).__module__).partition(".")[0]


def is_own(plugin: object) -> bool:
    return _package(plugin) == OWN_PACKAGE


def _top(entry: EntryPoint) -> str:
    return entry.value.partition(":")[0].partition(".")[0]


def _distribution(entry: EntryPoint) -> str:
    """Return name and version of the distribution of an entry point; empty if its metadata lacks them."""
    try:
        return "" if entry.dist is None else _full_name(entry.dist)
    except Exception:  # damaged metadata
        return ""


def _full_name(distribution: Distribution) -> str:
    return one_line(f"{distribution.name} {distribution.version}", 100)


def _entries() -> list[EntryPoint]:
    """Return the entry points of all plugins: koopmon's own first, then in the order of their names."""
    try:
        everything = [entry for group in (GROUP, FORMER_GROUP) for entry in entry_points(group=group)]
    except Exception:  # one damaged file of any distribution is enough
        everything = []
        for distribution in distributions():
            try:
                everything += distribution.entry_points
            except Exception as error:
                say_once(f"the entry points of {_full_name(distribution)} cannot be read: {describe_failure(error)}")
    found = {(entry.name, entry.value): entry for entry in everything if entry.group == GROUP}
    for entry in everything:
        if entry.group == FORMER_GROUP and (entry.name, entry.value) not in found:
            found[entry.name, entry.value] = entry
            if _top(entry) != OWN_PACKAGE:
                whose = _distribution(entry) or entry.value
                say_once(f"{whose}: its entry-point group {FORMER_GROUP!r} is deprecated: rename it to {GROUP!r}")
    return sorted(found.values(), key=lambda entry: (_top(entry) != OWN_PACKAGE, entry.name, entry.value))


def plugin_manager() -> PluginManager:
    """Return a new manager with every plugin of the entry-point group loaded, including koopmon's own.

    A plugin is skipped, logged once and listed in `failures` if it cannot be imported in time, misspells a hook or
    implements none.
    """
    manager = PluginManager()
    loaded: dict[str, str] = {}
    for entry in _entries():
        name = entry.name if entry.name not in loaded else f"{entry.name} of {entry.value}"
        loaded[name] = entry.value
        manager.load(name, entry)
    return manager
