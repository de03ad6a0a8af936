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

__all__ = ["GuardedAdapter", "check_adapter", "original", "source"]

MAX_NAME = 64
"""Characters of an adapter's name; PROTOCOL.md has the same bound."""
MAX_SETTINGS = 32
"""Thresholds that an adapter may set; PROTOCOL.md has the same bound."""
T = TypeVar("T")


class GuardedAdapter(ArchitectureAdapter):
    """Calls another adapter, `original`, and checks its results.

    A failure of an optional method, such as `thresholds`, is logged once and replaced by a default. A failure of any
    other method raises PluginError.
    """

    def __init__(self, adapter: ArchitectureAdapter, calls: PluginCalls) -> None:
        self.name = adapter.name  # type: ignore[misc]
        self.measures = dict(adapter.measures)  # type: ignore[misc]
        self.original = adapter
        self.calls = calls

    def specificity(self, model: nn.Module) -> int:
        return self._limited("specificity", lambda: _checked_claim(self.original.specificity(model)))

    def stacks(self, model: nn.Module) -> list[Stack]:
        return self._limited("stacks", lambda: _checked_stacks(self.original.stacks(model), model))

    def flags(self, model: nn.Module) -> frozenset[str]:
        return self._optional("flags", lambda: frozenset(_each(self.original.flags(model), str)), frozenset())

    def observables(self, stack: Stack) -> Sequence[Observable]:
        none: list[Observable] = []
        found = self._optional("observables", lambda: _each(self.original.observables(stack), Observable), none)
        return [replace(each, read=self._reader(each)) for each in found]

    def _reader(self, observable: Observable) -> Callable[..., Tensor | None]:
        def read(*args: Any) -> Tensor | None:
            try:
                what = f"observable {observable.name!r}"
                return self._contained(what, lambda: _checked_reading(observable.read(*args)))
            except PluginError as error:  # the readings of other families continue
                say_once(f"{error}; its readings are left out")
                return None

        return read

    def shielded(self, stack: Stack) -> Sequence[nn.Module]:
        return self._limited("shielded", lambda: _each(self.original.shielded(stack), nn.Module))

    def update_exponent(self, stack: Stack) -> float | None:
        def ask() -> float | None:
            found = self.original.update_exponent(stack)
            return None if found is None else _number(found)

        return self._optional("update_exponent", ask, None)

    def thresholds(self) -> Mapping[str, float]:
        return self._optional("thresholds", lambda: _checked_settings(self.original.thresholds()), {})

    def kss_settings(self) -> Mapping[str, float]:
        return self._optional("kss_settings", lambda: _checked_settings(self.original.kss_settings()), {})

    def block_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        return self._tensor("block_input", self.original.block_input, module, args, kwargs)

    def block_output(self, module: nn.Module, output: Any) -> Tensor | None:
        return self._tensor("block_output", self.original.block_output, module, output)

    def with_block_output(self, module: nn.Module, output: Any, state: Tensor) -> Any:
        return self._contained("with_block_output()", self.original.with_block_output, module, output, state)

    def token_mask(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], stack: Stack | None = None
    ) -> Tensor | None:
        return self._tensor("token_mask", self.original.token_mask, model, args, kwargs, stack)

    def _limited(self, method: str, call: Callable[[], T]) -> T:
        return self.calls.limited(f"{method}() of its adapter {self.name!r}", call)

    def _optional(self, method: str, call: Callable[[], T], default: T) -> T:
        try:
            return self._limited(method, call)
        except PluginError as error:
            say_once(f"{error}; it is left out")
            return default

    def _contained(self, what: str, call: Callable[..., T], *args: Any) -> T:
        return self.calls.contained(f"{what} of its adapter {self.name!r}", call, *args)

    def _tensor(self, method: str, call: Callable[..., Tensor | None], *args: Any) -> Tensor | None:
        found = self._contained(f"{method}()", call, *args)
        if found is None or isinstance(found, Tensor):
            return found
        gives = f"{method}() of its adapter {self.name!r} gives a {type(found).__name__}, expected a tensor or None"
        raise PluginError(self.calls.label, gives)


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
