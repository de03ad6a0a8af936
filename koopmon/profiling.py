"""Spectrum of a model's residual stream from one forward pass: states at every depth, and their profile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from koopmon.api import ArchitectureAdapter, Discovery, Observable, Point, Stack
from koopmon.chain_verifier import known_exponent
from koopmon.discovery import probe, verify, with_fallback
from koopmon.observables import Readings, declared, tabulate
from koopmon.plugins import Selection, select
from koopmon.spectral import SpectralProfile, profile_states
from koopmon.state_position import block_input, block_output
from koopmon.token_sampling import align_mask, choose_rows, take_rows
from koopmon.walk import Walk


def profile(
    model: nn.Module,
    *batch: Any,
    adapter: str | ArchitectureAdapter | None = None,
    stack: str | None = None,
    num_samples: int = 2048,
    svd_rank: int | None = None,
    seed: int = 0,
    **batch_kwargs: Any,
) -> SpectralProfile:
    """Profile the L transitions of `model`'s residual stream on one batch, `model(*batch, **batch_kwargs)`.

    Two equal forward passes run in eval and no_grad: one finds the stream, and one reads it. A model that mixes between
    its blocks needs a third one with gradients. Each module's mode and the
    random state are restored. The same N tokens, at most `num_samples`, are taken at every depth. `seed` chooses them
    among the tokens that the model's own mask counts.
    `svd_rank` None fits the full D x D operator of each layer (it needs N >= D), R its leading R directions. Too few
    tokens, or layers that do not yet change the state, give a profile that is not `informative` and holds the reason.

    Raises ValueError if a state holds NaN or infinite values, naming the block that it enters or leaves; AdapterError
    and DiscoveryError as `koopmon.discover`.
    """
    captured = capture_states(
        model, *batch, adapter=adapter, stack=stack, num_samples=num_samples, seed=seed, **batch_kwargs
    )
    return profile_states(captured.states, svd_rank=svd_rank, seed=seed, paired=captured.paired)


@dataclass(frozen=True, slots=True, eq=False)
class CapturedStates:
    """h_0 ... h_L of one stack at the same N tokens; of a stack in pairs, the input and the output of each block."""

    discovery: Discovery
    states: tuple[Tensor, ...]
    """L+1 tensors of shape (N, D), or 2L, of one dtype and on one device."""
    num_tokens: int
    """Tokens of the batch, of which N were taken."""
    masked: bool
    """True if a mask of the model's call chose the tokens; False if all of them counted."""
    observables: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    """Measurements of the model's family, by name: L values each, None for a missing one."""
    measures: Mapping[str, str] = field(default_factory=dict)
    """A line of help for each of these names."""
    known_exponent: float | None = None
    """The update exponent, if it is known without the states."""

    @property
    def paired(self) -> bool:
        """True if the states are the input and the output of each block, and no chain."""
        return self.discovery.stack.form == "pairs"


def capture_states(
    model: nn.Module,
    *batch: Any,
    adapter: str | ArchitectureAdapter | None = None,
    stack: str | None = None,
    num_samples: int = 2048,
    seed: int = 0,
    **batch_kwargs: Any,
) -> CapturedStates:
    """Capture the states for `profile`: those of the verified stack on one forward pass.

    Arguments and errors as `profile`.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples = {num_samples}: allowed are integers from 1")

    look = partial(_capture, model, batch, batch_kwargs, num_samples, seed)
    return with_fallback(model, select(model, adapter, stack), look)


def _capture(
    model: nn.Module,
    batch: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    num_samples: int,
    seed: int,
    selection: Selection,
) -> CapturedStates:
    kept: list[Tensor] = []
    rows, num_tokens, masked = torch.empty(0, device="cpu"), 0, False

    def take(state: Tensor) -> None:
        nonlocal rows, num_tokens, masked
        if not kept:
            mask = align_mask(selection.adapter.token_mask(model, batch, kwargs, discovery.stack), state.shape[:-1])
            num_tokens, masked = state.shape[:-1].numel(), mask is not None
            rows = choose_rows(num_tokens, num_samples, seed=seed, mask=mask)
        kept.append(take_rows(state.detach(), rows.to(state.device)))

    discovery = verify(model, selection, batch, kwargs)
    with probe(model) as call, walking(selection.adapter, discovery.stack, take), _reading(selection) as readings:
        call(*batch, **kwargs)
    for place, state in enumerate(kept):
        if not torch.isfinite(state).all():
            enters, layer = discovery.stack.place(place)
            where = f"{'enters' if enters else 'leaves'} {discovery.points[layer].name}"
            raise ValueError(f"the state that {where} holds NaN or infinite values")
    gathered = readings[discovery.stack.name].gather()
    observables: Mapping[str, Sequence[float | None]] = {}
    if gathered is not None:
        observables = tabulate(gathered.keys, gathered.values.tolist(), discovery.stack.num_layers)
    measures = {name: text for family in reversed(selection.families) for name, text in family.measures.items()}
    explained = {name: measures[name] for name in observables}
    exponent = known_exponent(selection.adapter, discovery.stack)
    return CapturedStates(discovery, _alike(kept), num_tokens, masked, observables, explained, exponent)


@contextmanager
def walking(adapter: ArchitectureAdapter, stack: Stack, take: Callable[[Tensor], None]) -> Iterator[None]:
    """Call take(state) with each state of the first traversal of `stack`, h_0 first, inside the context."""
    walk = Walk(stack)

    def enter(point: Point, module: nn.Module, args: Any, kwargs: Any) -> None:
        layer = walk.following(point)
        if layer is not None:
            walk.enter(layer)
            if (layer == 0 or not stack.chained) and (
                state := block_input(adapter, stack, module, args, kwargs)
            ) is not None:
                take(state)

    def leave(point: Point, module: nn.Module, args: Any, output: Any) -> None:
        leaves = walk.leave(point) is not None and stack.form != "entries"
        if leaves and (state := block_output(adapter, stack, module, output)) is not None:
            take(state)

    with ExitStack() as hooks:
        for point in {id(point.module): point for point in stack.points}.values():
            hooks.enter_context(point.entry.register_forward_pre_hook(partial(enter, point), with_kwargs=True))
            hooks.enter_context(point.module.register_forward_hook(partial(leave, point)))
        yield


@contextmanager
def _reading(selection: Selection) -> Iterator[Mapping[str, Readings]]:
    """Take the families' readings in every candidate stack, by its name, inside the context."""
    readings = {stack.name: Readings() for stack in selection.candidates}
    with ExitStack() as hooks:
        for stack in selection.candidates:
            for observable in declared(selection.families, stack):
                hook = partial(_take, readings[stack.name], observable)
                hooks.enter_context(observable.module.register_forward_hook(hook, with_kwargs=True))
        yield readings


def _take(
    readings: Readings, observable: Observable, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
) -> None:
    readings.take(observable, args, kwargs, output)


def _alike(states: list[Tensor]) -> tuple[Tensor, ...]:
    """Return states on the first one's device, in the widest of their types.

    Blocks may lie on several devices.
    """
    dtype = states[0].dtype
    for state in states:
        dtype = torch.promote_types(dtype, state.dtype)
    return tuple(state.to(states[0].device, dtype) for state in states)
