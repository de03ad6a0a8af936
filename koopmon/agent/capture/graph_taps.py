"""Taps on blocks that run inside a compiled graph.

The compiler traces the hooks of a block once, and their Python code never runs again. The methods of `BlockTap` below
leave operations on tensors in the graph: they copy sampled tokens of the states into buffers that exist once. Tensors
alone decide if a forward is copied, so a snapshot causes no graph break and no new compilation.

Shapes: N sampled tokens, D width; a state is (..., T, D). Each buffer is (N, D).

The traced code follows three rules. It reads no attribute that differs between blocks, because one graph may serve all
of them. It asks nothing about a size that a later batch may change. Each block reaches its buffers through its own
hooks, so that a second model of the same class never writes into those of the first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from koopmon.api import ArchitectureAdapter, Path, Stack
from koopmon.candidate_trace import MIN_SHARE_CALLED
from koopmon.chain_verifier import ChainVerifier
from koopmon.planes import is_plane
from koopmon.state_position import block_input, block_output, is_state
from koopmon.token_sampling import order_rows

logger = logging.getLogger("koopmon.agent")

MAX_SLOTS = 3
"""Tensors among a block's arguments that are copied, and again in its result."""
MIN_ROWS = 64
RECENT = (2, 13)
"""The oldest torch whose compiler is tried with these taps."""
_CHECKPOINT = "torch.utils.checkpoint.checkpoint"
_FUNCTIONAL = frozenset({"inductor", "aot_eager", "aot_eager_decomp_partition"})
"""Backends that move all writes to the end of the graph."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """One tensor at the entry or the exit of each block, `path` in its arguments or its result."""

    name: str
    enters: bool
    path: Path
    container: type | None
    """The type of the result that holds it; None if it is the result."""


def supported() -> bool:
    """Return True if the compiler of this torch is known to trace the taps."""
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= RECENT


class BlockTap:
    """The buffers of one block, as attributes with names that are equal in all blocks of the stack.

    The compiler traces `enter` and `leave`. For each slot there is a buffer of its name and, in `<name>_taken`, the
    number of tokens of the forward that it was copied from. The number is negative until then.
    """

    picks: Tensor
    """(N,) int64: the tokens to copy, modulo their number."""

    def __init__(self, taps: GraphTaps) -> None:
        self._taps = taps

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Copy the states among the call arguments."""
        if torch.is_grad_enabled():
            for index, value in enumerate(args):
                self._keep(True, index, None, value)
            for name, value in kwargs.items():
                self._keep(True, name, None, value)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Copy the states in the return value."""
        if torch.is_grad_enabled():
            if isinstance(output, Tensor):
                self._keep(False, None, None, output)
            elif isinstance(output, (tuple, list)):
                for index, value in enumerate(output):
                    self._keep(False, index, tuple, value)
            elif isinstance(output, dict):
                for name, value in output.items():
                    self._keep(False, name, dict, value)

    def _keep(self, enters: bool, key: Any, container: type | None, value: Any) -> None:
        from torch.fx.experimental.symbolic_shapes import guard_or_true, has_static_value

        if type(value) is not Tensor or not value.is_floating_point() or value.dim() < 2:
            return
        last = int(value.shape[-1]) if has_static_value(value.shape[-1]) else -1
        channels = int(value.shape[1]) if value.dim() > 2 and has_static_value(value.shape[1]) else -1
        is_plane = self._is_plane(enters, value.dim(), channels, last)
        if is_plane:
            value = value.movedim(1, -1)
        if not has_static_value(value.shape[-1]):
            return
        for size in value.shape[:-1]:
            if guard_or_true(size == 0):  # also True for a size that only the data decide
                return
        name = self._reserve(enters, key, container, int(value.shape[-1]), value.dtype, value.device)
        if name:
            state = value.detach() if is_plane else value.detach().flatten(0, -2)
            _copy(state, self.picks, getattr(self, name), getattr(self, name + "_taken"))

    def _reserve(self, *slot: Any) -> str:
        """Return the name of the buffer for a tensor; empty if it is not copied. Runs while the compiler traces."""
        try:
            return self._taps.reserve(*slot)
        except Exception as error:
            logger.debug("koopmon: taps in a graph", exc_info=error)
            return ""

    def _is_plane(self, *state: Any) -> bool:
        """Return True if the state at a border of a block has its width in dimension 1."""
        try:
            return self._taps.is_plane(*state)
        except Exception as error:
            logger.debug("koopmon: taps in a graph", exc_info=error)
            return False

    # What torch.compiler.assume_constant_result does. That function imports the compiler into every training.
    _reserve._dynamo_marked_constant = True  # type: ignore[attr-defined]
    _is_plane._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _copy(state: Tensor, picks: Tensor, buffer: Tensor, taken: Tensor) -> None:
    """Copy tokens of `state` into `buffer`, if it waits for them. Few operations, because all are compiled."""
    num_tokens = 1
    for size in state.shape[:-1]:
        num_tokens = num_tokens * size
    rows, index = picks % num_tokens, []
    for size in state.shape[-2:0:-1]:  # of a convolution, whose state is not flattened: that would copy it whole
        index.append(rows % size)
        rows = rows // size
    waits = taken < 0
    buffer.copy_(torch.where(waits, state[(rows, *reversed(index))], buffer))
    taken.add_(waits * (num_tokens + 1))


class GraphTaps:
    """The taps of one candidate stack inside compiled graphs. `num_rows` returns N at the first compilation."""

    def __init__(self, stack: Stack, num_rows: Callable[[], int]) -> None:
        self.stack = stack
        self.taps = [BlockTap(self) for _ in stack.points]
        self.traced = False
        """True if a graph holds the taps of at least one block."""
        self.closed = False
        """True if no more graph gets taps."""
        self._num_rows = num_rows
        self._slots: dict[str, _Slot] = {}
        self._picks: Tensor | None = None
        self._num_tokens = 0
        """Tokens of the last forward that was read."""
        parameters = [each for point in stack.points for each in point.parameters()]
        self._widths = {size for each in parameters if each.dim() > 1 for size in each.shape}
        """The sizes of the blocks' weights, among which the width is; empty if they are flattened."""

    def is_plane(self, enters: bool, num_dims: int, channels: int, last: int) -> bool:
        """Return True if the state that enters, or leaves, the blocks has its width in dimension 1."""
        point = self.stack.points[0]
        return is_plane(point.entry if enters else point.module, num_dims, channels, last)

    def reserve(
        self, enters: bool, key: Any, container: type | None, width: int, dtype: torch.dtype, device: torch.device
    ) -> str:
        """Make the buffers of all blocks for one tensor of each; return their name, or "" if it is not copied."""
        from torch._dynamo import mark_static_address

        path: Path = () if key is None else (key,)
        known = {slot.path for slot in self._slots.values() if slot.enters is enters}
        full = path not in known and len(known) >= MAX_SLOTS
        other = bool(self._widths) and width not in self._widths
        if self.closed or full or other or not isinstance(key, (int, str, type(None))) or not _at_top():
            return ""
        if self._picks is None:
            # Equal on all ranks, which compare their states.
            numbers, _ = order_rows(1 << 16, max(MIN_ROWS, self._num_rows()), seed=0)
            self._picks = numbers.to(device)
            mark_static_address(self._picks, guard=False)
            for tap in self.taps:
                tap.picks = self._picks
        if self._picks.device != device:
            return ""
        name = f"{'in' if enters else 'out'}_{'' if key is None else key}_{width}_{str(dtype).removeprefix('torch.')}"
        if name not in self._slots:
            for tap in self.taps:
                buffer = torch.zeros(len(self._picks), width, dtype=dtype, device=device)
                taken = torch.full((), -1, dtype=torch.int64, device=device)
                for each, value in ((name, buffer), (f"{name}_taken", taken)):
                    # CUDA graphs are not used for a graph that writes to other inputs.
                    mark_static_address(value, guard=False)
                    setattr(tap, each, value)
            self._slots[name] = _Slot(name, enters, path, container)
            self.traced = True
        return name

    def arm(self, choose: Callable[[int, int], Tensor] | None = None) -> None:
        """Copy the states of the next forward.

        choose(num_tokens, N) returns at most N tokens of as many as the forward before had; None keeps the choice.
        """
        if self._picks is not None and choose is not None and self._num_tokens:
            rows = choose(self._num_tokens, len(self._picks))
            self._picks.copy_(rows[torch.arange(len(self._picks), device="cpu") % len(rows)])
        for tap in self.taps:
            for name in self._slots:
                getattr(tap, f"{name}_taken").fill_(-1)

    def close(self) -> None:
        """Put no taps into further graphs. Those that hold them stay, because a change causes a new compilation."""
        self.closed = True

    def read(self) -> list[Copied] | None:
        """Return what the last forward has left, for each block; None if no forward came. Waits for the device."""
        if not self._slots or self._picks is None:
            return None
        names = [(tap, name) for tap in self.taps for name in self._slots]
        taken = iter(torch.stack([getattr(tap, f"{name}_taken") for tap, name in names]).tolist())
        picks = self._picks.cpu()
        copied = [Copied(self._slots, picks, tap, {name: next(taken) for name in self._slots}) for tap in self.taps]
        self._num_tokens = max((each.num_tokens for each in copied), default=0)
        return copied if any(each.called for each in copied) else None

    def observe(self, copied: list[Copied], verifier: ChainVerifier) -> None:
        """Show the states to `verifier`, as those of one forward with gradients."""
        verifier.compare_values(self.stack)
        with torch.enable_grad():
            for point, each in zip(self.stack.points, copied, strict=True):
                if each.called:
                    verifier.observe_input(self.stack, point.layer, *each.arguments())
                    verifier.observe_output(self.stack, point.layer, each.result())

    def states(self, copied: list[Copied], adapter: ArchitectureAdapter, kept: Stack) -> list[Tensor] | None:
        """Return the states (N, D) at every point of `kept`; None if they are incomplete.

        The state behind a skipped block is that before it.
        """
        called = [each for each in copied if each.called]
        if len(kept.points) != len(copied) or len(called) < MIN_SHARE_CALLED * len(copied):
            return None
        if kept.form != "chain":
            return self._parts(copied, adapter, kept) if len(called) == len(copied) else None
        entry = kept.points[copied.index(called[0])].entry
        states = [block_input(adapter, kept, entry, *called[0].arguments())]
        for point, each in zip(kept.points, copied, strict=True):
            states.append(block_output(adapter, kept, point.module, each.result()) if each.called else states[-1])
        return _alike(states)

    def _parts(self, copied: list[Copied], adapter: ArchitectureAdapter, kept: Stack) -> list[Tensor] | None:
        """Return the input of each block, in the form "pairs" with its output, or None."""
        states = []
        for point, each in zip(kept.points, copied, strict=True):
            states.append(block_input(adapter, kept, point.entry, *each.arguments()))
            if kept.form == "pairs":
                states.append(block_output(adapter, kept, point.module, each.result()))
        return _alike(states)


def _alike(states: list[Tensor | None]) -> list[Tensor] | None:
    found = [state for state in states if state is not None and is_state(state)]
    return found if len(found) == len(states) and len({state.shape for state in found}) == 1 else None


class Copied:
    """The copies of one block's states: for each slot the tokens of the forward they are from, negative if none."""

    def __init__(self, slots: Mapping[str, _Slot], picks: Tensor, tap: BlockTap, taken: dict[str, int]) -> None:
        self._taken = {slots[name]: num_tokens for name, num_tokens in taken.items() if num_tokens >= 0}
        self._picks = picks
        self._tap = tap

    @property
    def called(self) -> bool:
        """True if the block was called, and has returned."""
        return {slot.enters for slot in self._taken} == {True, False}

    @property
    def num_tokens(self) -> int:
        """The largest number of tokens of a tensor; 0 if none was copied."""
        return max(self._taken.values(), default=0)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the call arguments, with None for all that were not copied."""
        by_key = {slot.path[0]: self._rows(slot) for slot in self._taken if slot.enters}
        num_args = max((key + 1 for key in by_key if isinstance(key, int)), default=0)
        named = {key: value for key, value in by_key.items() if isinstance(key, str)}
        return tuple(by_key.get(index) for index in range(num_args)), named

    def result(self) -> Any:
        """Return the block's return value, with None for all that was not copied."""
        slots = [slot for slot in self._taken if not slot.enters]
        for slot in slots:
            if slot.container is None:
                return self._rows(slot)
        by_key = {slot.path[0]: self._rows(slot) for slot in slots}
        if slots[0].container is dict:
            return by_key
        return tuple(by_key.get(index) for index in range(1 + max(by_key)))

    def _rows(self, slot: _Slot) -> Tensor:
        """Return the copies of different tokens."""
        buffer: Tensor = getattr(self._tap, slot.name)
        _, first = np.unique((self._picks % self._taken[slot]).numpy(), return_index=True)
        return buffer if len(first) == len(buffer) else buffer[torch.from_numpy(np.sort(first)).to(buffer.device)]


def _at_top() -> bool:
    """Return True if the compiler traces the graph itself, or a checkpointed part of it.

    Branches of torch.cond, for one, and transforms of torch.func must not write to tensors from outside.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    graph = InstructionTranslator.current_tx().output
    tracer = graph.current_tracer
    while tracer.parent is not None:
        # Backends that run the graph as it is would find that the arguments of a checkpoint have changed.
        # DistributedDataParallel puts its own backend, which splits the graph, before the chosen one.
        splitter = getattr(graph.compiler_fn, "__self__", None)
        backend = getattr(splitter, "backend_compile_fn", graph.compiler_fn)
        name = getattr(backend, "compiler_name", "") or getattr(backend, "_compiler_name", "")
        functional = name in _FUNCTIONAL
        if getattr(tracer, "description", None) != _CHECKPOINT or not functional:
            return False
        tracer = tracer.parent
    return True
