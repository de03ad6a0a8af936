"""The optimizers of one training, held weakly: one that is dropped leaves by itself."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from koopmon.agent.control.rate_shares import Shares, factors
from koopmon.agent.control.scaled_view import RATE, number

RATE_SIZED = ("adam", "lion", "rmsprop")
"""Parts of the names of optimizers that divide the gradient by its own size, or take its sign."""


class OptimizerSet:
    """The live optimizers of one training, in the order in which they were added.

    A wrapper, such as those of accelerate, of sharpness-aware minimisation or ZeroRedundancyOptimizer, is replaced by
    the optimizers that it holds: their steps update the parameters, and the wrapper may copy its rate to them.
    """

    def __init__(self, optimizers: Optimizer | Iterable[Optimizer] = ()) -> None:
        self._references: list[tuple[weakref.ref[Optimizer], weakref.ref[Optimizer]]] = []
        """Each member, with the outermost wrapper around it or itself."""
        self._shares: Shares = {}
        self._strength = 0.0
        self._shares_of: weakref.WeakKeyDictionary[Optimizer, Shares] = weakref.WeakKeyDictionary()
        """Share of each bounded group, by its index in the optimizer."""
        self._share_of: dict[int, float] = {}
        """Share of the group of each parameter, by its id: an optimizer that comes later may hold some of them."""
        for each in [optimizers] if isinstance(optimizers, Optimizer) else optimizers:
            self.add(each)

    def __iter__(self) -> Iterator[Optimizer]:
        return (each for reference, _ in self._references if (each := reference()) is not None)

    def add(self, optimizer: Optimizer) -> list[Optimizer]:
        """Add an optimizer, and forget those that no longer exist. Returns the new members."""
        found: dict[Optimizer, None] = {}
        _find_inner(optimizer, found, (optimizer,))
        known = set(self)
        new = [each for each in found if each not in known]
        # A wrapper may have been added in its own constructor, before it held the others.
        gone = (None,) if optimizer in found else (None, optimizer)
        outer = weakref.ref(optimizer)
        wrapped = found.keys() - {optimizer}
        kept = [(one, outer if one() in wrapped else other) for one, other in self._references if one() not in gone]
        self._references = kept + [(weakref.ref(each), outer) for each in new]
        return new

    def wrapper_of(self, member: Optimizer) -> Optimizer | None:
        """Return the outermost wrapper around `member`; None if it has none."""
        outer = next((other() for one, other in self._references if one() is member), None)
        return None if outer is member else outer

    @property
    def parameters(self) -> set[int]:
        """The ids of all parameters that the members or their wrappers hold now."""
        live = [each for pair in self._references if pair[0]() is not None for each in pair]
        return {each for one in live if (optimizer := one()) is not None for each in parameter_ids(optimizer)}

    def updated_by(self, member: Optimizer) -> list[Tensor]:
        """Return the parameters that a member updates, and those of the outermost wrapper around it.

        The inner optimizer of ZeroRedundancyOptimizer holds this rank's share of them only.
        """
        wrappers = [pair[1]() for pair in self._references if pair[0]() is member]
        found: list[Tensor] = []
        for each in dict.fromkeys((member, *wrappers)):
            for group in () if each is None else each.param_groups:
                found += group["params"]
        return found

    def largest_rate(self) -> float | Tensor | None:
        """Return the largest rate of all groups as the schedule set it, within the bounds on them.

        A rate on a device is returned as a tensor, unread.
        """
        if self._shares and (rates := self.rates()):
            return max(rates)
        largest: float | None = None
        for reference, _ in self._references:
            each = reference()
            for group in () if each is None else each.param_groups:
                rate = group.get(RATE)
                if isinstance(rate, Tensor) and rate.device.type != "cpu":
                    return rate
                value = rate if type(rate) is float else number(rate)
                if value is not None and (largest is None or value > largest):
                    largest = value
        return largest

    def bound(self, shares: Shares, strength: float = 1.0) -> bool:
        """Bound the rates of these groups. `strength` 0 is no bound. Returns True if the shares changed."""
        self._strength = min(max(0.0, strength), 1.0)
        if shares == self._shares:
            return False
        self._shares, self._shares_of, self._share_of = dict(shares), weakref.WeakKeyDictionary(), {}
        first = 0
        for member in self:
            groups = member.param_groups
            own = {each: shares[first + each] for each in range(len(groups)) if first + each in shares}
            self._shares_of[member] = own
            for each, share in own.items():
                self._share_of |= dict.fromkeys(map(id, groups[each]["params"]), share)
            first += len(groups)
        return True

    def rates(self) -> tuple[float, ...]:
        """Return the rate of each group of each member, within its bound. Empty if one is no number in host memory."""
        return tuple(rate * factor for rate, factor in zip(self._scheduled(), self._factors(), strict=True))

    def factors(self, member: Optimizer) -> list[float]:
        """Return the factor in (0, 1] on the rate of each group of `member`; empty without a bound."""
        if not self._shares:
            return []
        owners = [each for each in self for _ in each.param_groups]
        return [factor for owner, factor in zip(owners, self._factors(), strict=False) if owner is member]

    def _scheduled(self) -> list[float]:
        found = [group.get(RATE) for each in self for group in each.param_groups]
        if any(isinstance(rate, Tensor) and rate.device.type != "cpu" for rate in found):
            return []
        values = [number(rate) for rate in found]
        return [] if None in values else [value for value in values if value is not None]

    def _factors(self) -> list[float]:
        shares: dict[int, float] = {}
        first = 0
        for member in self if self._shares else ():
            shares |= {first + each: share for each, share in self._shares_in(member).items()}
            first += len(member.param_groups)
        return [factor**self._strength for factor in factors(shares, self._scheduled())]

    def _shares_in(self, member: Optimizer) -> Shares:
        if member not in self._shares_of:
            found = ((each, map(id, group["params"])) for each, group in enumerate(member.param_groups))
            known = ((each, [self._share_of[one] for one in ids if one in self._share_of]) for each, ids in found)
            self._shares_of[member] = {each: min(shares) for each, shares in known if shares}
        return self._shares_of[member]

    def rate_sized_steps(self) -> bool:
        """Return True if each step moves each weight by about the learning rate, regardless of the gradient's size.

        Adam and its variants do. The class names decide, because most of these classes are third-party (AdamW8bit,
        FusedAdam, Lion, ...).
        """
        return all(
            any(kin in kind.__name__.lower() for kind in type(each).__mro__ for kin in RATE_SIZED) for each in self
        )


def parameter_ids(optimizer: Optimizer) -> set[int]:
    """Return the ids of all parameters of `optimizer`."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def held_by(optimizer: Optimizer) -> list[Optimizer]:
    """Return the optimizers in the attributes of `optimizer`, also in lists and dicts."""
    held: list[Any] = []
    for value in vars(optimizer).values():
        held += value if isinstance(value, (list, tuple)) else value.values() if type(value) is dict else [value]
    return [each for each in held if isinstance(each, Optimizer)]


def _find_inner(optimizer: Optimizer, found: dict[Optimizer, None], path: tuple[Optimizer, ...]) -> None:
    """Add the optimizers that update the parameters of `optimizer` to `found`. The wrappers around it are in `path`."""
    inner = [each for each in held_by(optimizer) if each not in path]
    own = parameter_ids(optimizer) if inner else set()
    covered: set[int] = set()
    for each in inner:
        if shared := parameter_ids(each) & own:
            covered |= shared
            _find_inner(each, found, (*path, each))
    # The inner optimizer of ZeroRedundancyOptimizer holds this rank's share of the parameters only.
    if not covered or (covered < own and not hasattr(optimizer, "consolidate_state_dict")):
        found[optimizer] = None
