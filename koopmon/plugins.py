"""The door for plugins: loading them through the entry-point group `koopmon`, and choosing the adapter for a model."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, replace
from importlib.metadata import entry_points

import pluggy
from torch import nn

from koopmon import hookspecs
from koopmon.api import ArchitectureAdapter, ExampleModel, Stack
from koopmon.errors import AdapterError, DiscoveryError
from koopmon.observables import flaw
from koopmon.structure import canonical_name, container_stack, survey

__all__ = ["PluginManager", "Selection", "adapters", "claimed", "example_models", "plugin_manager", "select"]

logger = logging.getLogger(__name__)

MAX_SEEN = 16
"""Containers that an error lists."""
FAMILY = 11
"""Claims from here on are those of a family of its own, known by its parts; see `ArchitectureAdapter.specificity`."""


class PluginManager(pluggy.PluginManager):
    """pluggy's manager, with the plugins that could not be used: `failures` maps each one's name to why."""

    def __init__(self) -> None:
        super().__init__(hookspecs.PROJECT)
        self.failures: dict[str, str] = {}
        self.add_hookspecs(hookspecs)

    def skip(self, name: str, reason: str) -> None:
        """Leave a plugin out, tell so once per process, and go on."""
        if self.has_plugin(name):
            self.unregister(name=name)
        self.failures[name] = reason
        _warn_once(name, reason)


@functools.cache
def _warn_once(name: str, reason: str) -> None:
    logger.warning("plugin %s is skipped: %s", name, reason)


def plugin_manager() -> PluginManager:
    """A new manager with every plugin of the entry-point group `koopmon` loaded, koopmon's own among them.

    A plugin that cannot be imported, misspells a hook or implements none is skipped, logged once and listed in
    `failures`.
    """
    manager = PluginManager()
    loaded: dict[str, str] = {}
    for entry in sorted(entry_points(group=hookspecs.PROJECT), key=lambda entry: (entry.name, entry.value)):
        if loaded.get(entry.name) == entry.value:  # one distribution, seen twice on the path
            continue
        name = entry.name if entry.name not in loaded else f"{entry.name} of {entry.value}"
        loaded[name] = entry.value
        try:
            plugin = entry.load()
            manager.register(plugin, name=name)
            manager.check_pending()
            if not manager.get_hookcallers(plugin):
                manager.skip(name, "it implements no hook: decorate its functions with @koopmon.hookimpl")
        except Exception as error:  # a guest of ours may fail in any way
            manager.skip(name, f"{type(error).__name__}: {error}".splitlines()[0])
    return manager


def adapters(manager: PluginManager | None = None) -> dict[str, ArchitectureAdapter]:
    """Every architecture adapter by its name, in the order of the names.

    Raises AdapterError when two plugins offer one name, or when a plugin registered by hand misspells a hook.
    """
    manager = plugin_manager() if manager is None else manager
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise AdapterError(f"plugin {manager.get_name(error.plugin)}: {error}") from None
    offered: dict[str, tuple[str, ArchitectureAdapter]] = {}
    for implementation in manager.hook.koopmon_architecture_adapters.get_hookimpls():
        plugin = implementation.plugin_name
        try:
            offers = list(implementation.function())  # type: ignore[call-overload]  # pluggy: object
            for adapter in offers:
                _check_adapter(adapter)
        except Exception as error:  # as above
            manager.skip(plugin, f"{type(error).__name__}: {error}".splitlines()[0])
            continue
        for adapter in offers:
            if adapter.name in offered:
                other = offered[adapter.name][0]
                raise AdapterError(
                    f"adapter {adapter.name!r} is offered by plugin {other!r} and by plugin {plugin!r}: uninstall one"
                )
            offered[adapter.name] = (plugin, adapter)
    return {name: offered[name][1] for name in sorted(offered)}


def _check_adapter(adapter: object) -> None:
    if not isinstance(adapter, ArchitectureAdapter):
        raise TypeError(f"it offers {adapter!r}, which is not an instance of ArchitectureAdapter")
    if not isinstance(getattr(adapter, "name", None), str) or not adapter.name:
        raise TypeError(f"its adapter {type(adapter).__name__} has no name")
    if why := flaw(adapter.measures):
        raise TypeError(f"adapter {adapter.name}: {why}")


def example_models(manager: PluginManager | None = None) -> list[ExampleModel]:
    """Every example model that a plugin offers. A plugin that fails to offer its own is skipped, as one that fails."""
    manager = plugin_manager() if manager is None else manager
    found: list[ExampleModel] = []
    for implementation in manager.hook.koopmon_example_models.get_hookimpls():
        try:
            offers = list(implementation.function())  # type: ignore[call-overload]  # pluggy: object
            for offer in offers:
                if not isinstance(offer, ExampleModel):
                    raise TypeError(f"it offers {offer!r}, which is not an ExampleModel")
        except Exception as error:  # as above
            manager.skip(implementation.plugin_name, f"{type(error).__name__}: {error}".splitlines()[0])
            continue
        found += offers
    return found


@dataclass(frozen=True, slots=True)
class Selection:
    """The adapter for one model, its candidate stacks, best first (never none), and its flags.

    `families` are the adapters with something to say of the model's parts: `adapter`, then every other one that knows a
    family of its own in it. A hybrid has one adapter, and the names of the other families among its flags.
    """

    adapter: ArchitectureAdapter
    candidates: tuple[Stack, ...]
    flags: frozenset[str]
    families: tuple[ArchitectureAdapter, ...]


def select(
    model: nn.Module,
    adapter: str | ArchitectureAdapter | None = None,
    stack: str | None = None,
    manager: PluginManager | None = None,
) -> Selection:
    """Choose the adapter for `model` and its candidate stacks, without running the model.

    `adapter` names one, or is one; None lets all claim, and the highest specificity wins. `stack` is the path of a
    container in the model: the only candidate then, and taken as residual. Raises AdapterError for an unknown name and
    for two equal claims, DiscoveryError when no adapter claims the model or it holds no candidate or no such `stack`.
    """
    known = adapters(manager)
    claims = _claims(model, known)
    chosen = _winner(model, known, claims) if adapter is None else _named(adapter, known)
    candidates = tuple(chosen.stacks(model))
    if stack is not None:
        candidates = (_named_stack(model, candidates, stack),)
    if not candidates:
        raise DiscoveryError(f"adapter {chosen.name!r} finds no stack of blocks in {_seen(model)}")
    others = [known[name] for name, claim in claims.items() if claim >= FAMILY and name != chosen.name]
    flags = frozenset(chosen.flags(model)).union(other.name for other in others)
    return Selection(chosen, candidates, flags, (chosen, *others))


def _named(adapter: str | ArchitectureAdapter, known: dict[str, ArchitectureAdapter]) -> ArchitectureAdapter:
    if isinstance(adapter, ArchitectureAdapter):
        return adapter
    if adapter not in known:
        raise AdapterError(
            f"adapter = {adapter!r}: allowed are {', '.join(known) or 'none: no plugin could be loaded'}"
        )
    return known[adapter]


def claimed(model: nn.Module, known: dict[str, ArchitectureAdapter]) -> ArchitectureAdapter:
    """The adapter among `known` with the highest claim on `model`; raises as `select` for none and for a tie."""
    return _winner(model, known, _claims(model, known))


def _claims(model: nn.Module, known: dict[str, ArchitectureAdapter]) -> dict[str, int]:
    claims: dict[str, int] = {}
    for name, adapter in known.items():
        try:
            claims[name] = adapter.specificity(model)
        except Exception as error:  # one adapter's failure is not the others'
            _warn_once(name, f"its specificity() raised {type(error).__name__}: {error}")
    return claims


def _winner(model: nn.Module, known: dict[str, ArchitectureAdapter], claims: dict[str, int]) -> ArchitectureAdapter:
    highest = max(claims.values(), default=0)
    if highest <= 0:
        names = ", ".join(known) or "none could be loaded"
        raise DiscoveryError(f"no adapter ({names}) recognises {_seen(model)}")
    winners = [name for name, claim in claims.items() if claim == highest]
    if len(winners) > 1:
        raise AdapterError(
            f"adapters {' and '.join(map(repr, winners))} claim {type(model).__name__} "
            f"with equal specificity {highest}: "
            f"pass adapter={winners[0]!r} or adapter={winners[1]!r}"
        )
    return known[winners[0]]


def _named_stack(model: nn.Module, candidates: tuple[Stack, ...], name: str) -> Stack:
    for candidate in candidates:
        if canonical_name(candidate.name) == canonical_name(name):
            return replace(candidate, residual=True)
    if (found := container_stack(model, name)) is not None:
        return found
    allowed = dict.fromkeys([*(candidate.name for candidate in candidates), *survey(model)])
    raise DiscoveryError(
        f"stack = {name!r}: {type(model).__name__} has no such list of blocks; "
        f"it has {', '.join(allowed) or 'none at all'}"
    )


def _seen(model: nn.Module) -> str:
    """One line on what a model holds."""
    seen = [f"{name} ({content})" for name, content in survey(model).items()]
    if len(seen) > MAX_SEEN:
        seen = [*seen[:MAX_SEEN], f"and {len(seen) - MAX_SEEN} more"]
    found = "; ".join(seen) or "no list of modules"
    return f"{type(model).__name__}, in which was seen: {found}; pass adapter= and stack= to name them"
