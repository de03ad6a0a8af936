"""A copy of an optimizer that holds copies of a few parameters and nothing else of the training."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from koopmon.agent.control.optimizer_set import held_by
from koopmon.agent.control.scaled_view import RATE, TABLES, StepHooks, number
from koopmon.errors import raise_from_signal

NOMINAL_RATE = 1e-3
"""Rate of the copies if the user's own is 0, as at the start of a warm-up."""


def clone_of(parameter: Tensor, from_zero: bool) -> Tensor:
    """Return a parameter with the attributes of `parameter` and its values, or zeros: this rank's part of them."""
    data = local_part(parameter.detach())
    clone = nn.Parameter(torch.zeros_like(data) if from_zero else data.clone())
    clone.__dict__.update(vars(parameter))  # marks by which some optimizers choose their rule
    return clone


def make_twin(
    optimizer: Optimizer,
    sample: list[Tensor],
    clones: list[Tensor],
    *,
    fresh: bool,
    memo: dict[int, Any] | None = None,
) -> Optimizer:
    """Return a copy of `optimizer` that holds `clones` instead of `sample`, and no other parameter.

    `memo` has what is copied already, by its id: that of a wrapper shares its groups with those that it holds.
    """
    by_id: dict[int, Any] = dict(zip(map(id, sample), clones, strict=True))
    twin = object.__new__(type(optimizer))
    # Every other parameter becomes one without memory: an operation on it raises or has no effect.
    others = {
        id(each): torch.empty_like(each, device="meta")
        for group in optimizer.param_groups
        for each in group["params"]
        if id(each) not in by_id
    }
    memo = {} if memo is None else memo
    memo |= {**others, **by_id, id(optimizer): twin}
    for each in held_by(optimizer):
        if id(each) not in memo:
            make_twin(each, sample, clones, fresh=fresh, memo=memo)
    for name, value in vars(optimizer).items():
        if name in TABLES:
            twin.__dict__[name] = StepHooks(name, {}, twin, lambda hook: lambda *_: None)
        elif name.startswith("_optimizer_"):
            twin.__dict__[name] = OrderedDict()  # hooks
        elif name not in ("param_groups", "state", "step"):  # schedulers replace `step` in the instance
            try:
                twin.__dict__[name] = copy.deepcopy(value, memo)
            except Exception as error:  # a lock or a process group, which the step may not need
                raise_from_signal(error)
    if isinstance(overflow := twin.__dict__.get("found_inf"), Tensor):
        overflow.zero_()  # a fused step has no effect where GradScaler has found an overflow
    groups = []
    for group in optimizer.param_groups:
        if id(group) not in memo:
            memo[id(group)] = _group_of_twin(group, by_id, memo)
        if memo[id(group)]["params"]:
            groups.append(memo[id(group)])
    state: defaultdict[Any, Any] = defaultdict(dict)
    for key, value in optimizer.state.items():
        if not isinstance(key, Tensor) or (id(key) in by_id and not fresh):
            entries = state[by_id.get(id(key), key)] = copy.deepcopy(value, memo)
            for name, each in list(entries.items()) if isinstance(entries, dict) else ():
                entries[name] = local_part(each) if isinstance(each, Tensor) else each
    for name, made in (("param_groups", groups), ("state", state)):
        if not isinstance(getattr(type(twin), name, None), property):  # one reads those of the optimizers inside
            setattr(twin, name, made)
    return twin


def _group_of_twin(group: dict[str, Any], by_id: dict[int, Any], memo: dict[int, Any]) -> dict[str, Any]:
    """Return a copy of `group` with the parameters that `by_id` replaces."""
    kept = [index for index, each in enumerate(group["params"]) if id(each) in by_id]
    options = {key: _entries_of(value, group, kept) for key, value in group.items() if key != "params"}
    copied = copy.deepcopy(options, memo) if kept else {}
    if RATE in copied and readable_rate(copied[RATE]) == 0.0:
        rate = copied[RATE]
        copied[RATE] = torch.full_like(rate, NOMINAL_RATE) if isinstance(rate, Tensor) else NOMINAL_RATE
    return {"params": [by_id[id(group["params"][index])] for index in kept], **copied}


def _entries_of(value: Any, group: dict[str, Any], kept: list[int]) -> Any:
    """Return the entries for the parameters `kept` if `value` is a list with a tensor for each parameter of `group`."""
    if type(value) is not list:
        return value
    shapes = [each.shape for each in group["params"]]
    return [value[index] for index in kept] if [getattr(each, "shape", None) for each in value] == shapes else value


def readable_rate(rate: Any) -> float | None:
    """Return a learning rate as a number; None if it is none."""
    return number(rate.detach() if isinstance(rate, Tensor) else rate)


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor. Without sharded tensors, few optimizers communicate."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local
