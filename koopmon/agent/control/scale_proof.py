"""Check at run time that an optimizer's updates follow a scale of its learning rate.

Some optimizers ignore the rate in their groups, use it one step late, or replace it in each step. A few small
parameters are copied, with their part of the optimizer's state, and a copy of the optimizer updates them several times:
with the user's rate, and with an eighth of it. Nothing of the training takes part: the copy holds no other parameter,
and an operation that writes to the training's tensors or communicates between ranks ends the check.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import isfinite
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from koopmon.agent.control.optimizer_set import OptimizerSet
from koopmon.agent.control.optimizer_twin import clone_of, local_part, make_twin, readable_rate
from koopmon.agent.control.scaled_view import RATE, close_view, number, scaled_view
from koopmon.errors import describe_error, raise_from_signal
from koopmon.process_state import ProcessState

logger = logging.getLogger("koopmon.agent")

SCALE = 0.125
NUM_STEPS = 4
"""Updates of each copy, after one with the user's rate."""
TOLERANCE = 1.5
"""Largest factor between the scale and the ratio of the movements."""
MAX_GROUPS = 8
MAX_ELEMENTS = 1 << 26
CLEAR = 64.0
"""Least ratio of a scaled movement to the rounding error of the weights."""


@dataclass(frozen=True, slots=True)
class ScaleProof:
    """The result of a check. `refusal` is the reason against a scale; empty if updates follow it.

    `sets_rate` is True if the step sets its rate from something other than the rate in the group. A check that is not
    `conclusive` came to no result: another one may.
    """

    refusal: str = ""
    sets_rate: bool = False
    conclusive: bool = True


class _NotProvenError(Exception):
    """The check came to no result; the message is the reason."""


def prove(optimizer: Optimizer) -> ScaleProof:
    """Return the result of the check. Raises nothing. Takes milliseconds, once per optimizer."""
    return _prove(optimizer, range(len(optimizer.param_groups)))


def prove_groups(optimizer: Optimizer, groups: Collection[int]) -> str:
    """Return the reason why a scale of these groups' rates does not change their updates alone; empty if it does."""
    return _prove(optimizer, groups).refusal


def _prove(optimizer: Optimizer, scaled: Collection[int]) -> ScaleProof:
    """Check the updates under a scale of the groups `scaled`."""
    name = type(optimizer).__name__
    if all(readable_rate(group.get(RATE)) is None for group in optimizer.param_groups):
        rate = next((found for group in optimizer.param_groups if (found := group.get(RATE)) is not None), None)
        why = "" if rate is None else f" that is a number, but a {type(rate).__name__}"
        return ScaleProof(f"{name} has no learning rate in its parameter groups{why}")
    kept = ProcessState()  # the step may draw random numbers
    try:
        with torch.inference_mode(False), _Isolation(_tensors(optimizer)):
            return _compare(optimizer, scaled)
    except Exception as error:
        raise_from_signal(error)
        logger.debug("koopmon: check of %s", name, exc_info=error)
        reason = str(error) if isinstance(error, _NotProvenError) else describe_error(error)
        refusal = f"it is not proven that the updates of {name} follow its learning rate: {reason}"
        return ScaleProof(refusal, conclusive=False)
    finally:
        kept.restore()


def _compare(optimizer: Optimizer, scaled: Collection[int]) -> ScaleProof:
    groups = list(enumerate(optimizer.param_groups))
    inside = _sample([group for each, group in groups if each in scaled])
    outside = _sample([group for each, group in groups if each not in scaled])
    sample, factors = inside + outside, [SCALE] * len(inside) + [1.0] * len(outside)
    if not inside:
        raise _NotProvenError("its groups have no small parameter to check it with")
    for from_zero in (False, True):
        moved, rates = _updates(optimizer, sample, from_zero)
        if _clear(moved, sample, from_zero):
            break
    else:
        raise _NotProvenError("it does not move the weights by a finite distance")
    refusal = f"{type(optimizer).__name__} changes its learning rate in each step in a way that cannot be restored"
    for sets_rate in (False, True):
        slower, slower_rates = _updates(optimizer, sample, from_zero, factors, sets_rate=sets_rate)
        if all(abs(a - b) <= 1e-5 * abs(b) for a, b in zip(slower_rates, rates, strict=True)):
            for factor, own, other in zip(factors, moved, slower, strict=True):
                # The first update may still use the rate from before. It must not move the weights further.
                ratios = [b / a if a else factor for a, b in zip(own, other, strict=True)]
                ratio = ratios[0] if ratios[0] > TOLERANCE else median(ratios[1:])
                if not factor / TOLERANCE <= ratio <= factor * TOLERANCE:
                    where = f" in {len(scaled)} of its groups" if outside else ""
                    far = f"at {SCALE:g} of its learning rate{where} it moves the weights {ratio:.3g}"
                    return ScaleProof(f"{type(optimizer).__name__} does not follow: {far} times as far")
            return ScaleProof(sets_rate=sets_rate)
    return ScaleProof(refusal)


def prove_around(wrapper: Optimizer) -> ScaleProof:
    """Return whether updates of `wrapper` follow a scale in the steps of the optimizers that it holds.

    It may move the weights itself, before or after their steps. There is no refusal if the check fails: the optimizers
    that it holds were checked by themselves.
    """
    kept, name = ProcessState(), type(wrapper).__name__
    try:
        with torch.inference_mode(False), _Isolation(_tensors(wrapper)):
            sample = _sample(wrapper.param_groups)
            if not sample or _num_elements(wrapper) > MAX_ELEMENTS:
                return ScaleProof()
            try:
                moved, slower = (_updates_around(wrapper, sample, scale, False) for scale in (1.0, SCALE))
            except Exception as error:
                raise_from_signal(error)
                moved, slower = (_updates_around(wrapper, sample, scale, True) for scale in (1.0, SCALE))
    except Exception as error:
        raise_from_signal(error)
        logger.debug("koopmon: check of %s", name, exc_info=error)
        return ScaleProof()
    finally:
        kept.restore()
    if not all(map(isfinite, chain(*moved, *slower))):
        return ScaleProof()
    if not _clear(moved, sample, from_zero=False):
        unclear = (
            f"it is not proven that the updates of {name} follow its learning rate: they are in the order of rounding"
        )
        return ScaleProof(unclear, conclusive=False)
    pairs = [[b / a for a, b in zip(own, other, strict=True) if a] for own, other in zip(moved, slower, strict=True)]
    ratio = max(median(each) for each in pairs if each)
    if ratio <= SCALE * TOLERANCE:
        return ScaleProof()
    far = f"at {SCALE:g} of its learning rate it moves the weights {ratio:.3g} times as far"
    return ScaleProof(f"{name} does not follow: {far}")


def _updates_around(wrapper: Optimizer, sample: list[Tensor], scale: float, with_closure: bool) -> list[list[float]]:
    """Return how far a copy of `wrapper` moves each sampled parameter, if `scale` is in force in the steps inside.

    It begins without states: some take back what another method did since the last step.
    """
    torch.manual_seed(0)
    clones, gradients = [clone_of(each, from_zero=False) for each in sample], [_gradient(each) for each in sample]
    twin = make_twin(wrapper, sample, clones, fresh=True)
    inside = list(OptimizerSet(twin))

    def closure() -> Tensor:
        """Return a loss. Each call in a step gives other gradients, as at other weights."""
        num_calls[0] += 1
        for each, gradient in zip(clones, gradients, strict=True):
            each.grad = gradient + 0.5 * gradient.flatten().roll(num_calls[0]).view_as(gradient)
        return torch.ones((), device="cpu")

    arguments, num_calls = [closure] if with_closure else [], [0]
    moved: list[list[float]] = [[] for _ in clones]
    for index in range(1 + NUM_STEPS):
        before = [each.detach().clone() for each in clones]
        for each, gradient in zip(clones, gradients, strict=True):
            each.grad = gradient.clone()
        for held in inside:
            held.__dict__["step"] = partial(_scaled_step, held, scale if index else 1.0)
        num_calls[0] = 0
        _step_of(twin)(twin, *arguments)
        if index:
            for distances, old, new in zip(moved, before, clones, strict=True):
                distances.append(float((new.detach() - old).double().norm()))
    return moved


def _scaled_step(optimizer: Optimizer, scale: float, *args: Any, **kwargs: Any) -> Any:
    view = scaled_view(optimizer, scale)
    try:
        return _step_of(optimizer)(view, *args, **kwargs)
    finally:
        close_view(view, optimizer)


def _step_of(optimizer: Optimizer) -> Any:
    """Return the step of the optimizer's class without hooks. One that torch has not hooked may have other wrappers."""
    step: Any = type(optimizer).step
    return step.__wrapped__ if hasattr(step, "hooked") else step


def _num_elements(optimizer: Optimizer) -> int:
    """Return the number of elements of the tensors that a copy of `optimizer` would copy beside its states."""
    own = {id(each) for group in optimizer.param_groups for each in group["params"]}
    values = [value for name, value in vars(optimizer).items() if name not in ("param_groups", "state")]
    held = tree_leaves([value for value in values if isinstance(value, (Tensor, list, tuple, dict))])
    return sum(each.numel() for each in held if isinstance(each, Tensor) and id(each) not in own)


def _sample(groups: list[dict[str, Any]]) -> list[Tensor]:
    """Return a few parameters of different groups: the smallest, and the smallest matrix."""
    active = [group for group in groups if any(each.requires_grad for each in group["params"])]
    groups = active or groups  # a loop may freeze one of several optimizers for a while
    chosen: dict[int, Tensor] = {}
    for group in _of_every_kind(groups):
        parameters = sorted(group["params"], key=Tensor.numel)
        trained = [each for each in parameters if each.requires_grad] or parameters
        trained = [each for each in trained if each.grad is not None] or trained
        trained = [each for each in trained if 0 < local_part(each).numel() <= MAX_ELEMENTS]
        for each in [*trained[:1], *[each for each in trained if each.dim() > 1][:1]]:
            chosen[id(each)] = each
    return list(chosen.values())


def _of_every_kind(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return evenly spaced groups, and one of each kind that is not among them.

    An optimizer may choose its rule by an option of the group, such as `use_muon`.
    """
    taken = groups[:: max(1, -(-len(groups) // MAX_GROUPS))]
    kinds = {_kind(each) for each in taken}
    others = {kind: each for each in reversed(groups) if (kind := _kind(each)) not in kinds}
    return taken + list(others.values())[:MAX_GROUPS]


def _kind(group: dict[str, Any]) -> frozenset[tuple[str, Any]]:
    """Return the options of a group, with the type alone of each that is no choice."""
    return frozenset(
        (key, value if isinstance(value, (bool, str)) else type(value))
        for key, value in group.items()
        if key not in ("params", RATE)
    )


def _updates(
    optimizer: Optimizer,
    sample: list[Tensor],
    from_zero: bool,
    factors: Sequence[float] = (),
    *,
    sets_rate: bool = False,
) -> tuple[list[list[float]], list[float]]:
    """Return how far a copy of `optimizer` moves each sampled parameter in each update, and its rates at the end.

    `factors` scale the rates of the groups of the sampled parameters.
    """
    torch.manual_seed(0)
    clones = [clone_of(each, from_zero) for each in sample]
    twin = make_twin(optimizer, sample, clones, fresh=from_zero)
    factor_of = dict(zip(map(id, clones), factors, strict=False))
    own = [factor_of.get(id(group["params"][0]), SCALE) / SCALE for group in twin.param_groups]
    gradients = [_gradient(each) for each in sample]
    step = _step_of(twin)
    arguments = list(inspect.signature(step).parameters.values())[1:]
    needed = [
        each.name
        for each in arguments
        if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    if needed:
        what = "a closure" if needed == ["closure"] else f"arguments ({', '.join(needed)})"
        raise _NotProvenError(f"its step needs {what}, and the check has none")
    moved: list[list[float]] = [[] for _ in clones]
    for index in range(1 + NUM_STEPS):
        before = [each.detach().clone() for each in clones]
        for each, gradient in zip(clones, gradients, strict=True):
            each.grad = gradient.clone()
        try:
            if index == 0 or not factors:
                step(twin)
            else:
                view = scaled_view(twin, SCALE, sets_rate=sets_rate, factors=own)
                step(view)
                close_view(view, twin)
        except AttributeError as error:
            if error.name in vars(optimizer):
                raise _NotProvenError(f"its step needs its {error.name}, which cannot be copied") from error
            raise
        if index:
            for distances, old, new in zip(moved, before, clones, strict=True):
                distances.append(float((new.detach() - old).double().norm()))
    return moved, [number(group.get(RATE)) or 0.0 for group in twin.param_groups]


def _clear(moved: list[list[float]], sample: list[Tensor], from_zero: bool) -> bool:
    """Return True if the movements are finite, at least one is not zero, and none is in the order of rounding."""
    for distances, each in zip(moved, sample, strict=True):
        size = 0.0 if from_zero else float(local_part(each.detach()).double().norm())
        rounding = CLEAR * torch.finfo(each.dtype).eps * size / SCALE
        if not all(distance < float("inf") and (distance > rounding or distance == 0.0) for distance in distances):
            return False
    return any(distance > 0.0 for distances in moved for distance in distances)


def _gradient(parameter: Tensor) -> Tensor:
    """Return a copy of the gradient of `parameter`, or some other one if it has none that is finite and not zero."""
    own = local_part(parameter.detach())
    gradient = None if parameter.grad is None else local_part(parameter.grad.detach())
    # Under sequence parallelism a sharded parameter may have a replicated gradient, of another size on this rank.
    if gradient is not None and gradient.shape == own.shape:
        dense = gradient if gradient.layout is torch.strided else gradient.to_dense()
        if 0.0 < float(dense.double().abs().sum()) < float("inf"):
            return gradient.clone()
    other = torch.full_like(own, 0.01)
    other.view(-1).mul_(torch.arange(1.0, 1.0 + other.numel(), device=other.device).sin().to(other.dtype))
    return other


def _tensors(optimizer: Optimizer) -> Iterator[Tensor]:
    """Yield the tensors of the training that the check must not change."""
    for group in optimizer.param_groups:
        for each in group["params"]:
            yield each
            if each.grad is not None:
                yield each.grad
    for entries in optimizer.state.values():
        if isinstance(entries, dict):
            yield from (each for each in entries.values() if isinstance(each, Tensor))


class _Isolation(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises for an operation that would reach beyond the check."""

    def __init__(self, protected: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._protected = {storage for each in protected for storage in _storages(each)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace in ("c10d", "_c10d_functional", "c10d_functional"):
            raise _NotProvenError("its step communicates between the ranks")
        if any(hasattr(kind, "to_local") for kind in types):
            return NotImplemented  # a DTensor, which calls the operations of its part
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[index] if index < len(args) else kwargs.get(argument.name)
                for each in value if isinstance(value, (list, tuple)) else (value,):
                    if isinstance(each, Tensor) and not self._protected.isdisjoint(_storages(each)):
                        raise _NotProvenError("its step writes to tensors that it holds outside of its groups")
        return func(*args, **kwargs)


def _storages(tensor: Tensor) -> Iterator[int]:
    try:
        address = local_part(tensor).untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return  # sparse, meta or fake
    if address:
        yield address
