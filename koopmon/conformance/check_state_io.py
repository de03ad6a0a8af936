"""Checks of an adapter's reads and writes of the state in the calls of blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from koopmon.api import Stack
from koopmon.conformance.harness import MIN_TOKENS, Bench, at_points, described, parts, same_bits, seeded
from koopmon.conformance.result import demand
from koopmon.conformance.training import Training
from koopmon.token_sampling import align_mask


def shapes(bench: Bench) -> str:
    """Input and output of every block are states of one shape (..., T, D), and the token mask fits them."""
    model = bench.build()
    stack = bench.likely_stack(model)
    seen: list[tuple[str, Tensor]] = []
    masks: list[Any] = []

    def root(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        masks.append(bench.adapter.token_mask(module, args, kwargs, stack))

    def check(where: str, state: Any) -> None:
        demand(isinstance(state, Tensor), f"{where} gives {described(state)}, expected the state, a tensor")
        sound = state.is_floating_point() and state.dim() >= 2
        demand(sound, f"{where} gives {described(state)}, expected a state of shape (..., T, D)")
        seen.append((where, state))
        first, other = seen[0]
        demand(state.shape == other.shape, f"{where} gives {described(state)}, and {first} {described(other)}")

    def enter(layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        check(f"block_input at {stack.points[layer].name}", bench.adapter.block_input(module, args, kwargs))

    def leave(layer: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        check(f"block_output at {stack.points[layer].name}", bench.adapter.block_output(module, output))

    model.register_forward_pre_hook(root, with_kwargs=True)
    _one_forward(bench, model, stack, enter, leave)
    demand(seen, f"no block of stack {stack.name!r} is called in a forward pass")
    mask, (_, state) = masks[0], seen[0]
    leading = state.shape[:-1]
    tokens = leading.numel()
    demand(tokens >= MIN_TOKENS, f"the example's batch has {tokens} tokens, expected at least {MIN_TOKENS}")
    counted = "all tokens count"
    if mask is not None:
        boolean = isinstance(mask, Tensor) and mask.dtype == torch.bool
        demand(boolean, f"token_mask gives {described(mask)}, expected a boolean tensor")
        fits = align_mask(mask, leading) is not None
        demand(fits, f"token_mask gives {described(mask)}, which fits no state of shape {tuple(state.shape)}")
        demand(mask.any(), "token_mask counts no token at all")
        counted = f"{int(mask.sum())} of {tokens} tokens count"
    return f"{len(stack.points)} blocks carry {described(state)}, {counted}"


def reading(bench: Bench) -> str:
    """block_input and block_output return the block's own tensor: not copied, detached or changed in place."""
    adapter, model = bench.adapter, bench.build()
    stack = bench.likely_stack(model)

    def enter(layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        where, call = f"block_input at {stack.points[layer].name}", (args, kwargs)
        _own(where, *_asked_twice(where, call, lambda: adapter.block_input(module, args, kwargs)), call)

    def leave(layer: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        where = f"block_output at {stack.points[layer].name}"
        _own(where, *_asked_twice(where, output, lambda: adapter.block_output(module, output)), output)

    def root(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = (args, kwargs)
        masks = _asked_twice("token_mask", call, lambda: adapter.token_mask(module, args, kwargs, stack))
        demand(same_bits(*masks), "token_mask gives two different answers for one call")

    model.register_forward_pre_hook(root, with_kwargs=True)
    _one_forward(bench, model, stack, enter, leave)
    return "each state is the block's own tensor, in the graph and unchanged"


def round_trip(bench: Bench) -> str:
    """with_block_output replaces only the state; a replacement by the same state changes nothing."""
    adapter, plain, replaced = bench.adapter, Training(bench), Training(bench)
    stack = bench.likely_stack(replaced.model)
    kinds: dict[str, None] = {}

    def leave(layer: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        name = stack.points[layer].name
        state = adapter.block_output(module, output)
        demand(isinstance(state, Tensor), f"block_output at {name} gives {described(state)}, expected a tensor")
        assert state is not None
        marker = state.detach() + 1.0
        changed = adapter.with_block_output(module, output, marker)
        where = f"with_block_output at {name}"
        demand(type(changed) is type(output), f"{where} makes {described(changed)} of {described(output)}")
        kept = adapter.block_output(module, output)
        demand(kept is not None and same_bits(kept, state), f"{where} changes the output that it was given")
        back = adapter.block_output(module, changed)
        arrived = back is not None and same_bits(back, marker)
        demand(arrived, f"{where} does not put the state where block_output at {name} reads it")
        before, after = parts(output), parts(changed)
        demand(before.keys() == after.keys(), f"{where} gives parts {list(after)} for {list(before)}")
        for path, part in before.items():
            mine = isinstance(part, Tensor) and _shares(part, state)
            demand(mine or after[path] is part, f"{where} replaces part {path} of the output, which is not the state")
        kinds[type(output).__name__] = None
        return adapter.with_block_output(module, output, state.clone())

    plain.backward()
    with at_points(stack, leave=leave):
        replaced.backward()
    copied, (expected,), (found,) = "with every state replaced by its copy", plain.losses, replaced.losses
    same = same_bits(found, expected)
    demand(same, f"{copied}, the loss is {found.item()!r}, and {expected.item()!r} without")
    for (name, mine), theirs in zip(replaced.model.named_parameters(), plain.model.parameters(), strict=True):
        left, right = (torch.zeros_like(each) if each.grad is None else each.grad for each in (mine, theirs))
        same = torch.allclose(left, right, rtol=1e-4, atol=1e-6, equal_nan=True)
        demand(same, f"{copied}, the gradient of {name} is another")
    return f"{', '.join(kinds)}: only the state is replaced"


def _one_forward(bench: Bench, model: nn.Module, stack: Stack, enter: Any, leave: Callable[..., Any]) -> None:
    """Run one training forward with hooks before and after every block."""
    with at_points(stack, enter, leave), seeded(1):
        bench.loss(model, bench.batch(0))


def _asked_twice(where: str, call: Any, ask: Callable[[], Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """Return two answers, after a check that the first one left the tensors of `call` unchanged."""
    tensors = _tensors(call)
    before = [(tensor._version, tensor.detach().clone()) for tensor in tensors]
    answer = ask()
    for tensor, (version, values) in zip(tensors, before, strict=True):
        kept = tensor._version == version and same_bits(tensor.detach(), values)
        demand(kept, f"{where} writes into {described(tensor)} that it was given")
    return answer, ask()


def _own(where: str, state: Tensor | None, again: Tensor | None, call: Any) -> None:
    """Check that `state` is a tensor of `call` or a view of one, and attached to its graph."""
    demand(isinstance(state, Tensor), f"{where} gives {described(state)}, expected a tensor")
    assert state is not None
    origins = [tensor for tensor in _tensors(call) if _shares(tensor, state)]
    demand(origins, f"{where} gives a copy, expected the block's own tensor or a view of it")
    if any(tensor.requires_grad for tensor in origins):
        demand(state.requires_grad, f"{where} cuts the state off from the graph: it is detached")
    demand(again is not None and same_bits(state.detach(), again.detach()), f"{where} gives two different answers")


def _tensors(call: Any) -> list[Tensor]:
    """Return the tensors in a call or an output, including those in attributes of custom objects."""
    found = []
    for part in parts(call).values():
        if isinstance(part, Tensor):
            found.append(part)
        elif hasattr(part, "__dict__") and not isinstance(part, (nn.Module, type)):
            found += [each for each in parts(dict(vars(part))).values() if isinstance(each, Tensor)]
    return found


def _shares(left: Tensor, right: Tensor) -> bool:
    """Return True if two tensors share the same memory."""
    return left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
