"""The interface for plugin authors: the adapter's base class and the types in its signatures.

Shapes: B batch, T tokens, D width. A *stack* is an ordered list of residual blocks that carry one state h of shape
(..., T, D) from each to the next; its *points* are the blocks. n points give n transitions h_l -> h_{l+1} (eq. 1).
"""

from __future__ import annotations

import inspect
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from koopmon.planes import as_given, channels_last

STATE_ARGUMENTS = ("hidden_states", "x", "src", "tgt", "input")
"""Names of keyword arguments with the state of a block."""
MAX_SPECIFICITY = 100
"""Highest result of `specificity`."""


@dataclass(frozen=True, slots=True)
class Point:
    """One residual block, mapping h_layer to h_{layer+1}; `name` is its path in the model as given.

    The adapter reads h_{layer+1} from the output of `module` and h_layer from the call arguments of `entry`. `entry` is
    `module`, unless the block is a sequence of modules that the model calls in turn. `parts` then holds the modules of
    the whole block.
    """

    name: str
    module: nn.Module
    layer: int
    entry_module: nn.Module | None = None
    parts: tuple[nn.Module, ...] = ()

    @property
    def entry(self) -> nn.Module:
        return self.module if self.entry_module is None else self.entry_module

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of the block."""
        for module in dict.fromkeys((*self.parts, self.entry, self.module)):
            yield from module.parameters()


Path = tuple[Any, ...]
"""Keys that lead to a tensor in nested tuples, lists, mappings and dataclasses."""


StackForm = Literal["chain", "pairs", "entries"]
"""The transitions of a stack.

"chain": the output of each block is the input of the next one, and n points give n transitions. "pairs": the model
changes the state between its blocks; transition l is from the input of block l to its output. "entries": the model adds
the outputs to the state itself; transition l is from the input of block l to that of block l+1, and n points give n-1.
"""


@dataclass(frozen=True, slots=True)
class StatePosition:
    """Paths of the state among the call arguments of a block, and in its return value."""

    entered: Path
    left: Path


@dataclass(frozen=True, slots=True)
class Stack:
    """A candidate chain of blocks, found without running the model; `name` is the path of its container.

    `residual` is True if the structure of the blocks proves that they add to their input, h + f(h). If it is False, the
    verifying forward must prove it, because a plain chain of layers h -> f(h) has no residual stream. `position` is set
    if that forward has found the state where `block_input` and `block_output` of the adapter do not read it. A block
    that is called several times in a row has a point for each call. `form` is set by the verifying forward; a candidate
    of another form than "chain" is verified in that form alone.
    """

    name: str
    points: tuple[Point, ...]
    residual: bool = True
    position: StatePosition | None = None
    form: StackForm = "chain"

    @property
    def chained(self) -> bool:
        """True if the output of each block is the input of the next one."""
        return self.form == "chain"

    @property
    def num_layers(self) -> int:
        """L, the transitions of one forward."""
        return len(self.points) - 1 if self.form == "entries" else len(self.points)

    @property
    def num_states(self) -> int:
        """The states of one forward: 2L in pairs, else L+1."""
        return 2 * len(self.points) if self.form == "pairs" else self.num_layers + 1

    def entry_place(self, layer: int) -> int:
        """Return the index, among the states of a snapshot, of the one that enters block `layer`."""
        return 2 * layer if self.form == "pairs" else layer

    def place(self, state: int) -> tuple[bool, int]:
        """Return (True if it enters the block, the block's layer) of the state with this index in a snapshot."""
        if self.form == "chain":
            return state == 0, max(state - 1, 0)
        return (True, state) if self.form == "entries" else (state % 2 == 0, state // 2)


Reader = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any], Any], Tensor | None]
"""read(module, args, kwargs, output): a 0-d tensor on the module's device; None if there is no value."""


@dataclass(frozen=True, slots=True)
class Observable:
    """One measurement of a family, beside the spectrum of transition `layer`.

    koopmon calls `read` after each call of `module` in the forward pass of a snapshot only, without gradients and not
    in a recomputation. In a calm cadence some snapshots repeat the values of an earlier one. `read` must not
    synchronise with the device, draw random numbers or change any state. It should cost little relative to the module.
    Several readings of one name and layer are averaged. Of a name that begins with
    "max_" the largest value counts.
    """

    name: str
    layer: int
    module: nn.Module
    read: Reader


@dataclass(frozen=True, slots=True)
class Discovery:
    """Result of a search in a model.

    `verified` is True if a forward pass showed that each point's output is the next one's input; for a stack that is
    not chained, that each point's input is computed from the output before. `rejected` holds the reason for each stack
    that was found and not kept. `flags` are further facts about the model, such as "hybrid".
    """

    adapter: ArchitectureAdapter
    stack: Stack
    verified: bool = False
    rejected: Mapping[str, str] = field(default_factory=dict)
    flags: frozenset[str] = frozenset()

    @property
    def points(self) -> tuple[Point, ...]:
        return self.stack.points


@dataclass(frozen=True, slots=True)
class ExampleModel:
    """A small model of an adapter's family, which `koopmon adapters check` trains for a few steps.

    `adapter` is the name of the adapter that must be chosen for it. `build(seed)` returns (model, batch), the same for
    the same seed. koopmon takes parameters from seed 0 and microbatches from any seed. It seeds torch, numpy and random
    before the call.

    A batch is a tensor, a tuple or list of arguments, or a mapping of keyword arguments of one forward pass. It holds
    at least 32 tokens.

    `loss(model, batch)` calls the model and returns the 0-d loss of one training step. If it is None, koopmon uses the
    attribute or key `loss` of the output, else the mean square of its first float tensor.
    """

    name: str
    adapter: str
    build: Callable[[int], tuple[nn.Module, Any]]
    loss: Callable[[nn.Module, Any], Tensor] | None = None


WRAPPER_ATTRIBUTES = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names of the only child of data-parallel, compile, FSDP and checkpoint wrappers."""


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of torch around `module`.

    It reads the table of children: an attribute of the user's class may raise, or return the module itself.
    """
    while len(children := list(module._modules.items())) == 1:
        name, inner = children[0]
        if name not in WRAPPER_ATTRIBUTES or inner is None:
            break
        module = inner
    return module


def call_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the call arguments of `model` by the names of its forward's parameters. A single mapping is unpacked."""
    if len(args) == 1 and isinstance(args[0], Mapping):
        return {**args[0], **kwargs}
    model = unwrapped(model)
    names = _plain_names(model.forward)
    if names is not None and len(args) <= len(names):
        return {**dict(zip(names, args, strict=False)), **kwargs}
    try:
        positional = _signature(model.forward).bind_partial(*args).arguments
    except (TypeError, ValueError):  # the model itself raises for a wrong call
        positional = {}
    return {**positional, **kwargs}


_signatures: weakref.WeakKeyDictionary[Any, inspect.Signature] = weakref.WeakKeyDictionary()
"""Signatures of bound methods by their function: to read one takes longer than all else of a small snapshot."""


_names: weakref.WeakKeyDictionary[Any, tuple[str, ...]] = weakref.WeakKeyDictionary()
"""Names of the positional parameters of bound methods by their function, if these are all that a call can fill."""


def _plain_names(forward: Callable[..., Any]) -> tuple[str, ...] | None:
    """Return the names that positional arguments have, None if it takes a signature to know them.

    To bind arguments to a signature takes ten times as long.
    """
    function = getattr(forward, "__func__", None)
    names = None if function is None else _names.get(function)
    if names is None and function is not None:
        try:
            parameters = _signature(forward).parameters.values()
        except (TypeError, ValueError):
            return None
        kinds = [each.kind for each in parameters]
        if inspect.Parameter.VAR_POSITIONAL not in kinds:
            plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
            names = _names[function] = tuple(each.name for each in parameters if each.kind in plain)
    return names


def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    function = getattr(forward, "__func__", None)
    if function is None:
        return inspect.signature(forward)
    found = _signatures.get(function)
    if found is None:
        found = _signatures[function] = inspect.signature(forward)
    return found


class ArchitectureAdapter(ABC):
    """Adapter for one family of models: finds its residual stream, reads it and writes it.

    An adapter is stateless: one instance serves many models. No method may gather, synchronise or copy a tensor.
    """

    name: ClassVar[str]
    """Unique, lower case; the value of `adapter=` and of the metrics' label."""
    fixed_state: ClassVar[bool] = False
    """True if the state is only where `block_input` and `block_output` read it; set by overriding one of these.

    If it is False and these do not chain, the verifying forward may find the state elsewhere in the blocks' calls.
    """
    measures: ClassVar[Mapping[str, str]] = {}
    """Names that `observables` may yield, each with a line of help.

    At most 8 names, each of 1 to 40 characters of a-z, 0-9 and _.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        if "fixed_state" not in own and ("block_input" in own or "block_output" in own):
            cls.fixed_state = True

    @abstractmethod
    def specificity(self, model: nn.Module) -> int:
        """Return the fit of this adapter to `model`: an integer from 0 to MAX_SPECIFICITY. The highest claim wins.

        Among equal claims koopmon's own adapter wins, else the first by name, with a log line. The values are:

        - 0: no fit.
        - 1: some chain of blocks of an unknown family.
        - 10: a transformer, with attention in its blocks.
        - 15: a hybrid, whose parts are beside parts of another family that claims the model.
        - 20: a family of its own (experts, state spaces, splines), identified by its blocks.
        - 21 to 100: one kind of model within such a family.
        """

    @abstractmethod
    def stacks(self, model: nn.Module) -> list[Stack]:
        """Return candidate stacks, best first, found without running the model."""

    def flags(self, model: nn.Module) -> frozenset[str]:
        """Return facts about the model to report beside the family's name."""
        return frozenset()

    def block_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """Return the state h_l among the call arguments of a point's `entry`; None if it is absent.

        The state (B, C, *plane) of a convolution is returned as (B, *plane, C).
        """
        by_name = (kwargs[name] for name in STATE_ARGUMENTS if name in kwargs)
        for value in (*args, *by_name, *kwargs.values()):
            if isinstance(value, Tensor) and value.is_floating_point():
                return channels_last(module, value)
        return None

    def block_output(self, module: nn.Module, output: Any) -> Tensor | None:
        """Return the state h_{l+1} in the return value of a point's `module`; None if it is absent."""
        if isinstance(output, Tensor):
            return channels_last(module, output)
        if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
            return channels_last(module, output[0])
        return None

    def with_block_output(self, module: nn.Module, output: Any, state: Tensor) -> Any:
        """Return `output` with its state replaced. Every other part stays the same object.

        Raises TypeError unless the output is a tensor, a tuple, a list or a named tuple.
        """
        if isinstance(output, Tensor):
            return as_given(module, output, state)
        if type(output) in (tuple, list):
            return type(output)((as_given(module, output[0], state), *output[1:]))
        if isinstance(output, tuple) and hasattr(output, "_fields"):  # a named tuple
            return type(output)(as_given(module, output[0], state), *output[1:])
        raise TypeError(f"adapter {self.name}: cannot put a state back into {type(output).__name__}")

    def token_mask(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], stack: Stack | None = None
    ) -> Tensor | None:
        """Return a boolean tensor, True at tokens that count, from the root model's call arguments.

        Its shape is (B, T), or that of the state's leading dimensions. `stack` is the tapped stack. Returns None if the
        arguments hold no mask.
        """
        named = call_arguments(model, args, kwargs)
        mask = named.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return mask != 0
        labels = named.get("labels")
        if isinstance(labels, Tensor) and labels.dim() == 2:
            return labels != -100
        return None

    def observables(self, stack: Stack) -> Sequence[Observable]:
        """Return the family's measurements in `stack`, beside its spectra: names from `measures`, on some transitions.

        koopmon calls it for every family with parts in the model, including those whose adapter was not chosen.
        """
        return ()

    def shielded(self, stack: Stack) -> Sequence[nn.Module]:
        """Return the modules of `stack` whose parameters must get no gradient from KSS.

        One backward pass carries the gradients of the loss and of KSS together and cannot separate them. koopmon
        therefore refuses KSS if any module is shielded, unless the configuration allows it. koopmon calls this method
        for every family, as `observables`.
        """
        return ()

    def update_exponent(self, stack: Stack) -> float | None:
        """Return k of ||update|| ~ ||state||^k, if the family determines it; else None.

        k is 0 if normalisations bound the updates, and 1 without such a bound. For None, k is 0 if every block holds a
        normalisation; otherwise the first forward pass measures it.
        """
        return None

    def thresholds(self) -> Mapping[str, float]:
        """Return overrides of `[risk]` for this family, by field name."""
        return {}

    def kss_settings(self) -> Mapping[str, float]:
        """Return overrides of `[kss]` for this family, by field name."""
        return {}
