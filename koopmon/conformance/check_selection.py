"""Checks of an adapter's static methods: claims, candidates and settings."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn

from koopmon import config as configuration
from koopmon.api import MAX_SPECIFICITY, ArchitectureAdapter, Stack
from koopmon.config import KssConfig, RiskConfig
from koopmon.conformance.harness import Bench, described, same_bits
from koopmon.conformance.result import demand
from koopmon.errors import AdapterError, ConfigError, raise_from_signal
from koopmon.plugins import claims_on, example_models
from koopmon.spectral import LARGEST_EXPONENT


def example(bench: Bench) -> str:
    """The example model is valid: the same for the same seed, with a finite loss and a gradient."""
    demand(not bench.flaw, bench.flaw)
    return f"{type(bench.build()).__name__}, the same twice for the same seed"


def claim(bench: Bench) -> str:
    """specificity() is an integer in bounds, repeatable, and the highest for this model."""
    adapter, model = bench.adapter, bench.build()
    before = _attributes(adapter)
    found = adapter.specificity(model)
    demand(type(found) is int, f"specificity() gives {found!r}, expected an int")
    within = 1 <= found <= MAX_SPECIFICITY
    demand(within, f"specificity() gives {found} for a model of its own family, allowed are 1 to {MAX_SPECIFICITY}")
    same = {"again": model, "for another build": bench.build()}
    with contextlib.suppress(Exception):  # some models cannot be copied
        same["for a deepcopy"] = copy.deepcopy(model)
    for when, other in same.items():
        now = adapter.specificity(other)
        demand(now == found, f"specificity() gives {found}, and {now} {when} of the same model")
    adapter.stacks(model)
    adapter.flags(model)
    changed = _changed(before, _attributes(adapter))
    demand(not changed, f"the adapter keeps {', '.join(changed)} of one model for the next: it must be stateless")
    others = {name: other for name, other in bench.known.items() if other is not adapter}
    for name, claim in claims_on(model, others).items():
        demand(claim < found, f"adapter {name!r} claims this model with {claim}, this one with {found}: raise it above")
    return f"specificity {found}, chosen among {', '.join(bench.known)}"


def restraint(bench: Bench) -> str:
    """The adapter does not win models of other families, and does not claim models without a chain of blocks."""
    adapter = bench.adapter
    for what, stranger in _strangers().items():
        found = adapter.specificity(stranger)
        demand(found == 0, f"specificity() gives {found} for {what}, which has no list of blocks: expected 0")
    seen = []
    for offer in example_models():
        owner = bench.known.get(offer.adapter)
        if owner is None or owner is adapter or offer.adapter == adapter.name:
            continue
        try:
            model = Bench(owner, offer).build()
            theirs = owner.specificity(model)
        except (Exception, SystemExit, KeyboardInterrupt) as error:  # an error of another adapter
            raise_from_signal(error)
            continue
        found = adapter.specificity(model)
        rival = f"{offer.name!r}, a model of adapter {owner.name!r}, which claims {theirs}"
        demand(found < theirs, f"specificity() gives {found} for {rival}")
        seen.append(offer.name)
    return f"claims none of {', '.join([*_strangers(), *seen])}"


def untouched(bench: Bench) -> str:
    """The adapter's methods change neither the model nor the random state."""
    adapter, model = bench.adapter, bench.build()
    calls = {
        "specificity()": lambda: adapter.specificity(model),
        "stacks()": lambda: adapter.stacks(model),
        "flags()": lambda: adapter.flags(model),
        "observables()": lambda: [adapter.observables(stack) for stack in adapter.stacks(model)],
        "shielded()": lambda: [adapter.shielded(stack) for stack in adapter.stacks(model)],
        "update_exponent()": lambda: [adapter.update_exponent(stack) for stack in adapter.stacks(model)],
        "thresholds()": adapter.thresholds,
        "kss_settings()": adapter.kss_settings,
    }
    for name, ask in calls.items():
        before, values = _state(model), {key: value.clone() for key, value in _tensors(model).items()}
        random_state = torch.get_rng_state()
        ask()
        changed = _changed(before, _state(model))
        demand(not changed, f"{name} changes the model: {', '.join(changed[:4])}")
        now = _tensors(model)
        changed = [key for key in values if not same_bits(values[key], now[key])]
        demand(not changed, f"{name} changes the values of {', '.join(changed[:4])}")
        demand(torch.equal(random_state, torch.get_rng_state()), f"{name} draws from the global random generator")
    return "the model and the random state are as they were"


def candidates(adapter: ArchitectureAdapter, model: nn.Module) -> list[Stack]:
    """Return the adapter's candidate stacks after checks of their order and names. Raises ConformanceError."""
    stacks: Any = adapter.stacks(model)
    demand(isinstance(stacks, list) and stacks, f"stacks() gives {_short(stacks)}, expected a list of candidate stacks")
    modules, inside = dict(model.named_modules(remove_duplicate=False)), set(model.modules())
    for stack in stacks:
        demand(isinstance(stack, Stack), f"stacks() gives {_short(stack)} in its list, expected a Stack")
        demand(stack.points, f"stack {stack.name!r} has no points")
        layers = [point.layer for point in stack.points]
        in_order = layers == list(range(len(layers)))
        demand(in_order, f"stack {stack.name!r} numbers its layers {layers}, expected 0 and up in order")
        for point in stack.points:
            resolved = modules.get(point.name)
            named = "no module" if resolved is None else "another module than its own"
            where = f"point {point.name!r} of stack {stack.name!r}"
            demand(resolved is point.module, f"{where} names {named} in the model")
            demand(point.entry in inside, f"the entry of point {point.name!r} is no module of the model")
        distinct = len({point.module for point in stack.points})
        demand(distinct == len(layers), f"stack {stack.name!r} has {len(layers)} points on {distinct} modules")
    flags: Any = adapter.flags(model)
    sound = isinstance(flags, frozenset) and all(isinstance(flag, str) for flag in flags)
    demand(sound, f"flags() gives {flags!r}, expected a frozenset of strings")
    return list(stacks)


def discovery(bench: Bench) -> str:
    """The adapter finds a stack with valid names, and a forward pass verifies a chain with one point per block."""
    model = bench.build()
    first, second = candidates(bench.adapter, model), candidates(bench.adapter, model)
    demand(first == second, "stacks() gives two different answers for one model")
    name, why = bench.chain
    demand(name is not None, why)
    stack = bench.stack(model)
    return f"{len(stack.points)} blocks in {stack.name or 'the model itself'}, verified by a forward pass"


def settings(bench: Bench) -> str:
    """thresholds() and kss_settings() hold known fields with values in bounds; update_exponent() is valid."""
    check_settings(bench.adapter)
    for stack in bench.adapter.stacks(bench.build()):
        known: Any = bench.adapter.update_exponent(stack)
        sound = known is None or (isinstance(known, (int, float)) and -LARGEST_EXPONENT <= known <= LARGEST_EXPONENT)
        demand(sound, f"update_exponent() gives {known!r}, expected None or a number within +-{LARGEST_EXPONENT:g}")
    given = {**bench.adapter.thresholds(), **bench.adapter.kss_settings()}
    return f"sets {', '.join(given)}" if given else "none of its own"


def check_settings(adapter: ArchitectureAdapter) -> None:
    """Check the defaults of `adapter`. Raises AdapterError with the field, the value and the allowed values."""
    for method, table, section in (("thresholds", "risk", RiskConfig), ("kss_settings", "kss", KssConfig)):
        values: Any = getattr(adapter, method)()
        source = f"adapter {adapter.name!r}, {method}()"
        if not isinstance(values, Mapping):
            raise AdapterError(f"{source}: gives {described(values)}, expected a mapping of fields of [{table}]")
        allowed = section.__struct_fields__
        for name, value in values.items():
            if name not in allowed:
                raise AdapterError(f"{source}: {table}.{name} = {value!r}: allowed fields are {', '.join(allowed)}")
        try:
            configuration.from_mapping({table: dict(values)}, source=source)
        except ConfigError as error:
            raise AdapterError(str(error)) from None


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [name for name in before | after if before.get(name) != after.get(name)]


def _attributes(adapter: ArchitectureAdapter) -> dict[str, Any]:
    """Return identities and lengths of an adapter's attributes, a snapshot that needs no comparison of models."""
    return {
        name: (id(value), len(value) if isinstance(value, Sized) else None) for name, value in vars(adapter).items()
    }


def _state(model: nn.Module) -> dict[str, Any]:
    """Return the state of the modules of `model` that inspection must not change."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = {key: len(value) for key, value in vars(module).items() if key.endswith("hooks")}
        held = {key: id(value) for key, value in vars(module).items() if key == "training" or not key.startswith("_")}
        own = (id(module), module.training, list(module._modules), sorted(hooks.items()), held)
        found[name or type(module).__name__] = own
    for name, tensor in _tensors(model).items():
        found[name] = (id(tensor), tensor._version, tensor.requires_grad)
    return found


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _strangers() -> dict[str, nn.Module]:
    """Return models without a residual stream of tokens."""
    planes = [nn.Sequential(nn.Conv2d(n, n + 1, 3), nn.BatchNorm2d(n + 1), nn.ReLU()) for n in range(3, 6)]
    return {
        "a linear layer": nn.Linear(4, 4),
        "an LSTM": nn.LSTM(4, 4, num_layers=2),
        "a convolutional network": nn.Sequential(*planes),
    }


def _short(value: Any) -> str:
    return repr(value) if value is None or value == [] else described(value)
