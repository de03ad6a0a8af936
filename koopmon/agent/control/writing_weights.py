"""Finds the weights with which a block writes into the residual stream, in the autograd graph of a training forward.

A block maps x to y = x + F(x). Its writing weights are those in which F is linear: the output matrices of its branches
and their biases. The graph from y back to x proves them on real states. y is a sum in which x appears once and with the
factor 1. Each other term is a linear map of the output of a linear layer. Nothing else in the block uses the weights
of that layer. A name, or a comparison of outputs at changed weights, would not prove it: behind the first branch of a
sequential block, a smaller write changes the input of the next branch.

The search reads the graph that the training builds anyway. It evaluates no block again, so that no random state, no
buffer and no hook of the user's is touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from koopmon.agent.circuit_breaker import is_foreign
from koopmon.agent.control.optimizer_set import OptimizerSet
from koopmon.api import Stack

Node = Any
"""A node of the autograd graph."""

MAX_NODES = 50_000
"""Nodes of a block's graph before the search gives up. A transformer block has about a hundred."""
COPY_DISTANCE = 0.1
"""Relative distance within which a tensor of an optimizer's state counts as its own copy of the weight."""

# Names of nodes, without the number at their end.
_KEEPING = (
    "AliasBackward",
    "CloneBackward",
    "ReshapeAliasBackward",
    "ToCopyBackward",
    "UnsafeViewBackward",
    "ViewBackward",
)
"""Operations that change no value."""
_RESHAPING = (
    *_KEEPING,
    "ExpandBackward",
    "PermuteBackward",
    "SelectBackward",
    "SqueezeBackward",
    "TBackward",
    "TransposeBackward",
    "UnsqueezeBackward",
)
"""Operations that may lie between a weight and the layer that uses it."""
_LINEAR = (
    *_RESHAPING,
    "CatBackward",
    "ConstantPadNdBackward",
    "GatherBackward",
    "IndexAddBackward",
    "IndexBackward",
    "IndexPutBackward",
    "IndexSelectBackward",
    "MaskedFillBackward",
    "MeanBackward",
    "NativeDropoutBackward",
    "NegBackward",
    "ScatterAddBackward",
    "SliceBackward",
    "SplitBackward",
    "SplitWithSizesBackward",
    "StackBackward",
    "SumBackward",
    "WhereBackward",
)
"""Operations that are linear in all of their inputs with a gradient together."""
_LAYERS: Mapping[str, tuple[tuple[int, ...], int | None]] = {
    "AddmmBackward": ((1, 2), 0),
    "BaddbmmBackward": ((1, 2), 0),
    "BmmBackward": ((0, 1), None),
    "ConvolutionBackward": ((1,), 2),
    "GroupedMmBackward": ((0, 1), None),
    "LinearBackward": ((1,), 2),
    "MmBackward": ((0, 1), None),
}
"""Linear layers: the inputs one of which is the weight, and the input that is added to the product."""


class NotProvenError(Exception):
    """The graph of a block does not prove its writing weights; the message is the reason."""


class Edge(NamedTuple):
    """Output number `number` of a node of the graph."""

    node: Node
    number: int


def edge_of(state: Tensor) -> Edge | None:
    """Return where the graph of `state` begins; None if it has no gradient."""
    if not state.requires_grad:
        return None
    edge = torch.autograd.graph.get_gradient_edge(state)
    return Edge(edge.node, edge.output_nr)


def writing_weights(output: Edge, entry: Edge) -> list[Tensor]:
    """Return the parameters with which a block writes, in the order of its graph.

    Args:
        output: the state behind the block.
        entry: the state before it.

    Raises NotProvenError.
    """
    graph = _BlockGraph(output, entry)
    try:
        return graph.find()
    except RecursionError:
        raise NotProvenError("its graph is too deep") from None


class _Terms(NamedTuple):
    """The terms of the sum that a node computes."""

    num_entries: int = 0
    """Number of terms that are the state before the block."""
    weights: tuple[Tensor, ...] = ()
    """The parameters in which the other terms are linear."""


class _BlockGraph:
    def __init__(self, output: Edge, entry: Edge) -> None:
        self._output, self._entry = output, entry
        self._num_uses: dict[Node, int] = {output.node: 0}
        """Uses of each node in the block. Python's object of a node stays the same as long as it is held."""
        self._linear_uses: dict[Node, set[tuple[Node, int]]] = {}
        """Uses in which the output is linear: each the node that uses it, and the place among that node's inputs."""
        self._written: list[Node] = []
        """Nodes that hold what is written. All of their uses must be linear."""
        self._known: dict[tuple[Edge, bool], _Terms] = {}
        self._count_uses()

    def _count_uses(self) -> None:
        waiting = [self._output.node]
        while waiting:
            for child, number in waiting.pop().next_functions:
                if child is None or (child, number) == self._entry:
                    continue
                if child not in self._num_uses:
                    waiting.append(child)
                self._num_uses[child] = self._num_uses.get(child, 0) + 1
            if len(self._num_uses) > MAX_NODES:
                raise NotProvenError(f"its graph has more than {MAX_NODES} nodes")

    def find(self) -> list[Tensor]:
        found = self._terms(self._output, scaled=False)
        if found.num_entries != 1:
            raise NotProvenError("its output is not the sum of its input and what it writes")
        if not found.weights:
            raise NotProvenError("no linear layer writes into its output")
        if any(self._num_uses[node] > len(self._linear_uses[node]) for node in self._written):
            raise NotProvenError("it uses what it writes, or a weight of that, in another place too")
        return list({id(each): each for each in found.weights}.values())

    def _terms(self, edge: Edge, *, scaled: bool) -> _Terms:
        """Return the terms below `edge`. If `scaled`, an operation behind it changes values: no term may be the entry.

        Raises NotProvenError for a term that is not linear in a parameter.
        """
        if edge == self._entry:
            if scaled:
                raise NotProvenError("its input is scaled or normalised on the way to its output")
            return _Terms(1)
        key = edge, scaled
        if key not in self._known:
            self._known[key] = found = self._expand(edge, scaled)
            if found.weights and not found.num_entries:  # with the entry it is the stream, which the block may read
                self._written.append(edge.node)
        return self._known[key]

    def _expand(self, edge: Edge, scaled: bool) -> _Terms:
        node = edge.node
        kind = node.name().rstrip("0123456789")
        inputs = range(len(node.next_functions))
        if hasattr(node, "variable"):  # a parameter that is added as it is, such as a bias
            return _Terms(0, (node.variable,))
        if kind in ("AddBackward", "SubBackward"):
            factor = -1 if kind == "SubBackward" else getattr(node, "_saved_alpha", 1)
            return self._sum(self._below(node, each, scaled or (each == 1 and factor != 1)) for each in inputs)
        if kind == "BackwardHookFunctionBackward":  # of a full backward hook: passes each input on
            return self._below(node, edge.number, scaled)
        if kind in _KEEPING:
            return self._sum(self._below(node, each, scaled) for each in inputs)
        if kind in _LINEAR:
            return self._sum(self._below(node, each, True) for each in inputs)
        if kind in ("MulBackward", "DivBackward"):
            return self._product(node, inputs if kind == "MulBackward" else inputs[:1])
        if kind in _LAYERS:
            return self._layer(node, kind, scaled)
        what = "a normalisation" if "Norm" in kind else kind
        raise NotProvenError(f"{what} lies between its linear layers and its output")

    def _below(self, node: Node, place: int, scaled: bool) -> _Terms:
        """Return the terms of one input of `node`, in which its output is linear. A constant has none."""
        child, number = node.next_functions[place]
        if child is None:
            return _Terms()
        self._linear_uses.setdefault(child, set()).add((node, place))
        return self._terms(Edge(child, number), scaled=scaled)

    @staticmethod
    def _sum(terms: Iterable[_Terms]) -> _Terms:
        known = list(terms)
        return _Terms(sum(each.num_entries for each in known), tuple(one for each in known for one in each.weights))

    def _product(self, node: Node, places: Sequence[int]) -> _Terms:
        """Return the terms of the one factor that is linear in parameters of layers. The others are constant in them.

        A factor that is a parameter itself, as in a layer scale, counts as constant.
        """
        found: list[_Terms] = []
        reasons = [NotProvenError("a product without a linear layer is written")]
        for place in places:
            if node.next_functions[place][0] is None or self._parameter(node, place) is not None:
                continue
            uses = {each: set(found) for each, found in self._linear_uses.items()}
            known, num_written = dict(self._known), len(self._written)
            try:
                found.append(self._below(node, place, True))
            except NotProvenError as error:
                reasons.append(error)
                self._linear_uses, self._known = uses, known
                del self._written[num_written:]
        if len(found) > 1:
            raise NotProvenError("a product of several trained factors is written")
        if not found:
            raise reasons[:2][-1]
        return found[0]

    def _layer(self, node: Node, kind: str, scaled: bool) -> _Terms:
        places, added = _LAYERS[kind]
        weights = [(place, nodes) for place in places if (nodes := self._parameter(node, place)) is not None]
        if len(weights) != 1:
            raise NotProvenError("a layer writes whose weight is frozen, or is no parameter itself")
        place, nodes = weights[0]
        user = node
        for each in nodes:
            self._linear_uses.setdefault(each, set()).add((user, place))
            self._written.append(each)
            user, place = each, 0
        own = _Terms(0, (nodes[-1].variable,))
        if added is None:
            return own
        factor = getattr(node, "_saved_beta", 1)
        return self._sum((own, self._below(node, added, scaled or factor != 1)))

    def _parameter(self, node: Node, place: int) -> list[Node] | None:
        """Return the nodes from an input of `node` to a parameter that it is, in another shape; None if it is none."""
        nodes: list[Node] = []
        child = node.next_functions[place][0]
        while child is not None:
            nodes.append(child)
            if hasattr(child, "variable"):
                return nodes
            if child.name().rstrip("0123456789") not in _RESHAPING or len(child.next_functions) != 1:
                return None
            child = child.next_functions[0][0]
        return None


class WritingWeightsSearch:
    """Finds the writing weights of every block of `stack`, in the forwards of some steps.

    It is an injection that changes nothing. A block may not use all of its writing weights in each forward, as an
    expert without tokens. The search goes on until each block has used those that other blocks of its class have used.
    """

    def __init__(self, stack: Stack) -> None:
        self.refusal = ""
        """The reason why the writing weights of a block are not proven."""
        self.weights: dict[int, dict[int, Tensor]] = {}
        """The writing weights of each layer, by id."""
        self._points = {point.layer: point for point in stack.points}
        self._entries: dict[int, Edge | None] = {}

    def enter(self, layer: int, state: Tensor, mask: Tensor | None) -> None:
        """Note the edge of `state`, which enters block `layer`."""
        if torch.is_grad_enabled() and not is_foreign():
            self._entries[layer] = edge_of(state)

    def leave(self, layer: int, state: Tensor) -> None:
        """Read the graph of `state`, the output of block `layer`."""
        if layer not in self._entries or self.refusal:
            return
        entry, output = self._entries.pop(layer), edge_of(state)
        try:
            if entry is None or output is None:
                raise NotProvenError("its input or its output has no gradient")
            found = writing_weights(output, entry)
        except NotProvenError as error:
            self.refusal = f"block {layer}: {error}"
            return
        self.weights.setdefault(layer, {}).update((id(each), each) for each in found)

    @property
    def missing(self) -> str:
        """A writing weight that no forward has used yet; empty if there is none."""
        used: dict[type, set[str]] = {}
        names: dict[int, dict[int, str]] = {}
        for layer, point in self._points.items():
            names[layer] = {id(each): name for name, each in point.module.named_parameters() if each.requires_grad}
            found = self.weights.get(layer)
            if not found:
                return f"block {layer} has written nothing"
            roles = used.setdefault(type(point.module), set())
            roles.update(_role(names[layer][each]) for each in found if each in names[layer])
        for layer, point in self._points.items():
            for each, name in names[layer].items():
                if each not in self.weights[layer] and _role(name) in used[type(point.module)]:
                    return f"block {layer} has not used {name}"
        return ""


def _role(name: str) -> str:
    """Return the name of a parameter without the numbers of experts and the like."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", f".{name}")


def why_not_to_scale(weights: Iterable[Iterable[Tensor]], model: nn.Module, optimizers: OptimizerSet) -> str:
    """Return the reason why the writing weights of the layers cannot be scaled in place; empty if they can."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    updated = optimizers.parameters
    known: set[int] = set()
    for each in (one for layer in weights for one in layer):
        own = names.get(id(each))
        if own is None:
            return "a writing weight is no parameter of the model"
        if id(each) in known:
            return f"{own[0]} writes in several blocks"
        known.add(id(each))
        if len(own) > 1:
            return f"{own[0]} and {own[1]} are one parameter"
        if type(each) is not nn.Parameter or each.dtype not in _DTYPES:
            return f"{own[0]} is a {type(each).__name__} of {each.dtype}"
        if id(each) not in updated:
            return f"the optimizer does not update {own[0]}, but perhaps a copy of it"
        if _has_copy(each, optimizers):
            return f"the optimizer keeps a copy of {own[0]}"
    return ""


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _has_copy(weight: Tensor, optimizers: OptimizerSet) -> bool:
    """Return True if the state of an optimizer has a tensor that is about equal to `weight`."""
    for optimizer in optimizers:
        state = optimizer.state.get(weight)
        for each in state.values() if isinstance(state, Mapping) else ():
            if isinstance(each, Tensor) and each.is_floating_point() and each.shape == weight.shape:
                own = weight.detach().double()
                if own.any() and bool((each.detach().double() - own).norm() <= COPY_DISTANCE * own.norm()):
                    return True
    return False
