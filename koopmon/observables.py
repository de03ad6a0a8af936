"""Observables: a family's measurements beside the spectra, read without a wait for the device.

Shapes: a reading is a 0-d tensor on the model's device; L transitions.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from koopmon.api import ArchitectureAdapter, Observable, Stack
from koopmon.no_gradients import without_gradients
from koopmon.numbers import LARGEST

logger = logging.getLogger(__name__)

MAX_NAMES = 8
"""Observables of one model; PROTOCOL.md has the same bound."""
NAME = re.compile(r"[a-z0-9_]{1,40}")


def flaw(measures: Mapping[str, str]) -> str:
    """Return the reason why `measures` is not valid for an adapter; empty if it is valid."""
    if len(measures) > MAX_NAMES:
        return f"it measures {len(measures)} observables, at most {MAX_NAMES} are allowed"
    wrong = [name for name in measures if not NAME.fullmatch(name)]
    return f"its observable {wrong[0]!r} is not called 1 to 40 characters of a-z, 0-9 and _" if wrong else ""


def declared(families: Iterable[ArchitectureAdapter], stack: Stack) -> tuple[Observable, ...]:
    """Return the observables of `families` in `stack`, at most MAX_NAMES names.

    Of two families with one name, the first counts.

    A family is left out, with a log line, if it fails or reads a name that is not in its `measures`.
    """
    found: list[Observable] = []
    owners: dict[str, ArchitectureAdapter] = {}
    for family in families:
        try:
            offered = list(family.observables(stack))
            unlisted = {each.name for each in offered} - set(family.measures)
            if unlisted:
                raise ValueError(f"{sorted(unlisted)[0]!r} is not among its measures")
        except Exception as error:  # a third-party family may raise anything
            logger.warning("adapter %s: its observables are left out: %s: %s", family.name, type(error).__name__, error)
            continue
        for each in offered:
            room = each.name in owners or len(owners) < MAX_NAMES
            if room and owners.setdefault(each.name, family) is family and each.layer < len(stack.points):
                found.append(each)
    return tuple(found)


def shielded(families: Iterable[ArchitectureAdapter], stacks: Iterable[Stack]) -> list[nn.Module]:
    """Return the modules that `families` shield from KSS in any of `stacks`.

    All stacks count, because the gradient of KSS flows upstream, from one stack into another. If a family fails, the
    stack's first block represents the modules that it might have named.
    """
    found: dict[nn.Module, None] = {}
    for stack in stacks:
        for family in families:
            try:
                found.update(dict.fromkeys(family.shielded(stack)))
            except Exception as error:  # as above; an unknown answer counts as shielded
                logger.warning("adapter %s: shielded() raised %s: %s", family.name, type(error).__name__, error)
                found[stack.points[0].module] = None
    return list(found)


@dataclass(frozen=True, slots=True)
class Gathered:
    """Readings in transfer to the host: `values`, float32, of shape (len(keys),), one for each (name, layer)."""

    keys: tuple[tuple[str, int], ...]
    values: Tensor


class Readings:
    """The readings of one forward pass.

    Several of one name and layer are averaged. Of a name "max_..." the largest value counts.
    """

    def __init__(self) -> None:
        self._taken: dict[tuple[str, int], list[Tensor]] = {}

    @without_gradients
    def take(self, observable: Observable, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Read `observable` from a call of its module. Raises TypeError unless the value is a 0-d tensor or None."""
        value = observable.read(observable.module, args, kwargs, output)
        if value is None:
            return
        if not isinstance(value, Tensor) or value.dim():
            found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise TypeError(f"observable {observable.name} reads {found}, not a 0-d tensor")
        self._taken.setdefault((observable.name, observable.layer), []).append(value.detach().float())

    @without_gradients
    def gather(self, device: torch.device | None = None) -> Gathered | None:
        """Return all readings as one tensor on `device` (default: the first reading's); None if there are none."""
        if not self._taken:
            return None
        place = device or next(iter(self._taken.values()))[0].device
        reduced = [_reduced(name, values) for (name, _), values in self._taken.items()]
        return Gathered(tuple(self._taken), torch.stack([value.to(place, non_blocking=True) for value in reduced]))


def _reduced(name: str, values: list[Tensor]) -> Tensor:
    if len(values) == 1:
        return values[0]
    return torch.stack(values).amax() if name.startswith(LARGEST) else torch.stack(values).mean()


def tabulate(
    keys: Sequence[tuple[str, int]], values: Sequence[float], num_layers: int
) -> dict[str, list[float | None]]:
    """Return host values by name, L of each: None for a missing or non-finite value."""
    table: dict[str, list[float | None]] = {}
    for (name, layer), value in zip(keys, values, strict=True):
        row = table.setdefault(name, [None] * num_layers)
        if layer < num_layers and math.isfinite(value):
            row[layer] = value
    return table
