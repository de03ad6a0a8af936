"""Wrapper around the adapter of a third-party plugin; `koopmon.plugin_calls` makes its calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, nn

from koopmon.api import MAX_SPECIFICITY, ArchitectureAdapter, Observable, Point, Stack
from koopmon.errors import PluginError, one_line
from koopmon.observables import flaw
from koopmon.plugin_calls import PluginCalls, WrongResultError, bounded_list, say_once

MAX_NAME = 64
"""Characters of an adapter's name; PROTOCOL.md has the same bound."""
MAX_SETTINGS = 32
"""Thresholds that an adapter may set; PROTOCOL.md has the same bound."""
T = TypeVar("T")


def _before_training(method: str, check: Callable[..., Any], **default: Any) -> Any:
    """Return a method that calls the plugin's one in a thread with a time limit, and checks its result.

    `check(result, *args)` returns the checked result or raises WrongResultError. With a `default`, the method is
    optional: a failure is logged once, and gives the default.
    """

    def call(self: GuardedAdapter, *args: Any) -> Any:
        what = f"{method}() of its adapter {self.name!r}"
        try:
            return self.calls.limited(what, lambda: check(getattr(self.original, method)(*args), *args))
        except PluginError as error:
            if not default:
                raise
            say_once(f"{error}; it is left out")
            return default["default"]

    return call


def _in_forward(method: str, check: Callable[[Any], Any] = lambda result: result) -> Any:
    """Return a method that calls the plugin's one in this thread, inside a forward pass, and checks its result."""

    def call(self: GuardedAdapter, *args: Any) -> Any:
        what = f"{method}() of its adapter {self.name!r}"
        return self.calls.contained(what, lambda: check(getattr(self.original, method)(*args)))

    return call


class GuardedAdapter(ArchitectureAdapter):
    """Calls another adapter, `original`, and checks its results. A failure of a required method raises PluginError."""

    def __init__(self, adapter: ArchitectureAdapter, calls: PluginCalls) -> None:
        self.name = adapter.name  # type: ignore[misc]
        self.measures = dict(adapter.measures)  # type: ignore[misc]
        self.original = adapter
        self.calls = calls

    specificity = _before_training("specificity", lambda claim, _: _checked_claim(claim))
    stacks = _before_training("stacks", lambda found, model: _checked_stacks(found, model))
    shielded = _before_training("shielded", lambda found, _: _each(found, nn.Module))
    flags = _before_training("flags", lambda found, _: frozenset(_each(found, str)), default=frozenset())
    update_exponent = _before_training(
        "update_exponent", lambda found, _: None if found is None else _number(found), default=None
    )
    thresholds = _before_training("thresholds", lambda found: _checked_settings(found), default={})
    kss_settings = _before_training("kss_settings", lambda found: _checked_settings(found), default={})
    block_input = _in_forward("block_input", lambda found: _checked_tensor(found))
    block_output = _in_forward("block_output", lambda found: _checked_tensor(found))
    token_mask = _in_forward("token_mask", lambda found: _checked_tensor(found))
    with_block_output = _in_forward("with_block_output")
    _observables = _before_training("observables", lambda found, _: _each(found, Observable), default=())

    def observables(self, stack: Stack) -> Sequence[Observable]:
        return [replace(each, read=self._reader(each)) for each in self._observables(stack)]

    def _reader(self, observable: Observable) -> Callable[..., Tensor | None]:
        what = f"observable {observable.name!r} of its adapter {self.name!r}"

        def read(*args: Any) -> Tensor | None:
            try:
                return self.calls.contained(what, lambda: _checked_reading(observable.read(*args)))
            except PluginError as error:  # the readings of other families continue
                say_once(f"{error}; its readings are left out")
                return None

        return read


def original(adapter: ArchitectureAdapter) -> ArchitectureAdapter:
    """Return the adapter that the plugin made."""
    return adapter.original if isinstance(adapter, GuardedAdapter) else adapter


def source(adapter: ArchitectureAdapter) -> str:
    """Return a description of an adapter, with its plugin and distribution unless it is koopmon's own."""
    return f"adapter {adapter.name!r}" + (f" of {adapter.calls.label}" if isinstance(adapter, GuardedAdapter) else "")


def check_adapter(adapter: object) -> None:
    """Raise WrongResultError if `adapter` is not valid as a plugin's adapter."""
    if not isinstance(adapter, ArchitectureAdapter):
        raise WrongResultError(f"gives {_shown(adapter)}, which is not an instance of ArchitectureAdapter")
    name = getattr(adapter, "name", None)
    if type(name) is not str or not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise WrongResultError(
            f"gives a {type(adapter).__name__} whose name is {_shown(name)}, allowed are 1 to {MAX_NAME} characters"
        )
    if why := flaw(adapter.measures):
        raise WrongResultError(f"gives adapter {name!r}, which cannot be used: {why}")


def _checked_claim(claim: object) -> int:
    if type(claim) is not int or not 0 <= claim <= MAX_SPECIFICITY:
        raise WrongResultError(f"gives {_shown(claim)}, allowed are integers from 0 to {MAX_SPECIFICITY}")
    return claim


def _checked_stacks(stacks: object, model: nn.Module) -> list[Stack]:
    found, modules = _each(stacks, Stack), set(model.modules())
    for stack in found:
        points = _each(stack.points, Point)
        if not points or [point.layer for point in points] != list(range(len(points))):
            raise WrongResultError(f"gives stack {_shown(stack.name)}, whose points are not layers 0, 1, 2 and so on")
        if not modules.issuperset(each for point in points for each in (point.module, point.entry)):
            raise WrongResultError(f"gives stack {_shown(stack.name)}, with a point that is no module of the model")
    if len({stack.name for stack in found}) < len(found):
        raise WrongResultError("gives two stacks of one name")
    return found


def _checked_tensor(value: object) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value
    raise WrongResultError(f"gives a {type(value).__name__}, expected a tensor or None")


def _checked_reading(value: Any) -> Tensor | None:
    if value is not None and (not isinstance(value, Tensor) or value.dim()):
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else _shown(value)
        raise WrongResultError(f"gives {found}, expected a 0-d tensor or None")
    return value


def _checked_settings(settings: object) -> dict[str, float]:
    if not isinstance(settings, Mapping):
        raise WrongResultError(f"gives {_shown(settings)}, expected a mapping of names to numbers")
    found = {str(name): _number(value) for name, value in bounded_list(settings.items())}
    if len(found) > MAX_SETTINGS or any(len(name) > MAX_NAME for name in found):
        raise WrongResultError(f"gives {len(found)} settings, allowed are {MAX_SETTINGS} of {MAX_NAME} characters")
    return found


def _number(value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise WrongResultError(f"gives {_shown(value)} where a finite number is expected")
    return value


def _each(values: Any, kind: type[T]) -> list[T]:
    """Return the items of a plugin's result, which may be a generator. All must be of type `kind`."""
    found = bounded_list(values)
    for each in found:
        if not isinstance(each, kind):
            raise WrongResultError(f"gives {_shown(each)}, expected a {kind.__name__}")
    return found


def _shown(value: object) -> str:
    return one_line(repr(value), 100)
