"""Plugins: loading through the entry-point group `koopmon.adapters`, and the choice of the adapter for a model.

koopmon's own adapters come before all others. A third-party adapter with an equal claim, or with the same name, never
replaces one of them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pluggy
from torch import nn

from koopmon.api import ArchitectureAdapter, ExampleModel, Stack
from koopmon.block_finder import canonical_name, container_stack, first_layer_stacks, survey
from koopmon.errors import AdapterError, DiscoveryError, PluginError, one_line
from koopmon.guarded_adapter import GuardedAdapter, check_adapter, original, source
from koopmon.plugin_calls import WrongResultError, describe_failure, say_once
from koopmon.plugin_loading import PluginManager, is_own, plugin_manager

__all__ = [
    "PluginManager",
    "Selection",
    "adapters",
    "claims_on",
    "example_models",
    "fall_back",
    "original",
    "plugin_manager",
    "select",
    "source",
]

MAX_SEEN = 16
"""Containers that an error lists."""
FAMILY = 11
"""Least claim of a family of its own, known by its parts; see `ArchitectureAdapter.specificity`."""


def adapters(manager: PluginManager | None = None) -> dict[str, ArchitectureAdapter]:
    """Return every architecture adapter by its name, in the order of the names; third-party ones as a GuardedAdapter.

    Of two adapters of one name koopmon's own is taken, else that of the first plugin by name. The other is left out
    with a log line. Raises AdapterError if a plugin registered by hand misspells a hook.
    """
    manager = plugin_manager() if manager is None else manager
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise AdapterError(f"plugin {manager.get_name(error.plugin)}: {error}") from None
    taken: dict[str, tuple[str, ArchitectureAdapter]] = {}
    for plugin, offers in manager.offered("koopmon_architecture_adapters", check_adapter):
        manager.offers[plugin] = []
        own = is_own(manager.get_plugin(plugin))
        for offer in offers:
            adapter = offer if own else GuardedAdapter(offer, manager.calls(plugin))
            if adapter.name in taken:
                holder = manager.calls(taken[adapter.name][0]).label
                manager.leave_out(plugin, adapter.name, f"its name is taken by {holder}")
                continue
            taken[adapter.name] = plugin, adapter
            manager.offers[plugin].append(adapter)
    return {name: taken[name][1] for name in sorted(taken)}


def example_models(manager: PluginManager | None = None) -> list[ExampleModel]:
    """Return every example model that a plugin offers. A plugin that fails is skipped."""
    manager = plugin_manager() if manager is None else manager
    return [each for _, found in manager.offered("koopmon_example_models", _check_example) for each in found]


def _check_example(offer: object) -> None:
    if not isinstance(offer, ExampleModel):
        raise WrongResultError(f"gives {one_line(repr(offer), 100)}, which is not an ExampleModel")


@dataclass(frozen=True, slots=True)
class Selection:
    """The adapter for one model, its candidate stacks, best first (never none), and its flags.

    `families` are the adapters with parts in the model: `adapter`, then every other one that recognises its own family
    in it. A hybrid has one adapter, and the names of the other families among its flags. `fallback` is the selection by
    koopmon's own adapters, if `adapter` is a third-party one that claimed the model.
    """

    adapter: ArchitectureAdapter
    candidates: tuple[Stack, ...]
    flags: frozenset[str]
    families: tuple[ArchitectureAdapter, ...]
    fallback: Selection | None = None


def select(
    model: nn.Module,
    adapter: str | ArchitectureAdapter | None = None,
    stack: str | None = None,
    manager: PluginManager | None = None,
) -> Selection:
    """Choose the adapter for `model` and its candidate stacks, without running the model.

    `adapter` is the name of an adapter, or an adapter; with None all adapters claim. The highest specificity wins; of
    equal ones koopmon's own, else the first by name, with a log line. If a third-party adapter fails, the next one
    replaces it. `stack` is the path of a container in the model: it is then the only candidate, and is taken as
    residual.

    Raises AdapterError for an unknown name and PluginError if the named adapter fails. Raises DiscoveryError if no
    adapter claims the model, or if the model holds no candidate or no such `stack`.
    """
    known = adapters(manager)
    claims = claims_on(model, known)
    if adapter is not None:
        return _selection(model, _named(adapter, known), stack, known, claims)
    ranked = _ranked(model, known, claims)
    while True:
        chosen = known[ranked[0]]
        try:
            selection = _selection(model, chosen, stack, known, claims)
            break
        except AdapterError as error:
            if not isinstance(chosen, GuardedAdapter) or len(ranked) == 1:
                raise
            say_once(_replacement(chosen, known[ranked[1]], model, error))
            del claims[ranked.pop(0)]
    _say_choice(model, known, claims, ranked)
    own = next((known[name] for name in ranked if not isinstance(known[name], GuardedAdapter)), None)
    if isinstance(chosen, GuardedAdapter) and own is not None:
        del claims[chosen.name]
        with contextlib.suppress(AdapterError):
            selection = replace(selection, fallback=_selection(model, own, stack, known, claims))
    return selection


def fall_back(selection: Selection, model: nn.Module, reason: object) -> Selection | None:
    """Return the replacement of a third-party adapter that failed on `model`, with a log line; None without one."""
    if selection.fallback is not None:
        say_once(_replacement(selection.adapter, selection.fallback.adapter, model, reason))
    return selection.fallback


def _replacement(failed: ArchitectureAdapter, following: ArchitectureAdapter, model: nn.Module, reason: object) -> str:
    why = one_line(reason.reason if isinstance(reason, PluginError) else reason)
    return f"{source(following)} is used for {type(model).__name__}, as {source(failed)} failed: {why}"


def _selection(
    model: nn.Module,
    chosen: ArchitectureAdapter,
    stack: str | None,
    known: Mapping[str, ArchitectureAdapter],
    claims: Mapping[str, int],
) -> Selection:
    candidates = tuple(chosen.stacks(model))
    if stack is not None:
        candidates = (_named_stack(model, candidates, stack),)
    elif not chosen.fixed_state:
        candidates += tuple(first_layer_stacks(candidates))
    if not candidates:
        raise DiscoveryError(f"adapter {chosen.name!r} finds no stack of blocks in {_seen(model)}")
    others = [known[name] for name, claim in claims.items() if claim >= FAMILY and name != chosen.name]
    others.sort(key=lambda each: isinstance(each, GuardedAdapter))  # the first with an observable is read
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


def claims_on(model: nn.Module, known: Mapping[str, ArchitectureAdapter]) -> dict[str, int]:
    """Return the specificity of each adapter, by name. An adapter that fails is left out with a log line."""
    claims: dict[str, int] = {}
    for name, adapter in known.items():
        try:
            claims[name] = adapter.specificity(model)
        except PluginError as error:
            say_once(f"{error}; the adapter is left out")
        except Exception as error:  # the failure of one adapter must not affect the others
            say_once(f"adapter {name!r} is left out: specificity() {describe_failure(error)}")
    return claims


def _ranked(model: nn.Module, known: Mapping[str, ArchitectureAdapter], claims: Mapping[str, int]) -> list[str]:
    """Return the names of the adapters that claim `model`, best first. Raises DiscoveryError if none does."""
    ranked = [name for name, claim in claims.items() if claim > 0]
    if not ranked:
        names = ", ".join(known) or "none could be loaded"
        raise DiscoveryError(f"no adapter ({names}) recognises {_seen(model)}")
    return sorted(ranked, key=lambda name: (-claims[name], isinstance(known[name], GuardedAdapter), name))


def _say_choice(
    model: nn.Module, known: Mapping[str, ArchitectureAdapter], claims: Mapping[str, int], ranked: list[str]
) -> None:
    """Log choices that a user may not expect: equal claims, and a third-party adapter in place of koopmon's own."""
    chosen, kind = known[ranked[0]], type(model).__name__
    for name in ranked[1:]:
        if claims[name] == claims[chosen.name]:
            say_once(
                f"{source(chosen)} is used for {kind}; {source(known[name])} claims it with equal specificity "
                f"{claims[name]}: [model] adapter = {name!r} takes that one"
            )
    if isinstance(chosen, GuardedAdapter):
        instead = [name for name in ranked if not isinstance(known[name], GuardedAdapter)]
        of = f", in place of koopmon's own {instead[0]!r} with {claims[instead[0]]}" if instead else ""
        level = logging.WARNING if instead else logging.INFO
        say_once(f"{source(chosen)} is used for {kind} with specificity {claims[chosen.name]}{of}", level=level)


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
    """Return one line that lists the contents of a model."""
    seen = [f"{name} ({content})" for name, content in survey(model).items()]
    if len(seen) > MAX_SEEN:
        seen = [*seen[:MAX_SEEN], f"and {len(seen) - MAX_SEEN} more"]
    found = "; ".join(seen) or "no list of modules"
    remedy = "name them by adapter and stack in [model] of the configuration, or as adapter= and stack="
    return f"{type(model).__name__}, in which was seen: {found}; {remedy}"
