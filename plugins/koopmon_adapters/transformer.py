"""Transformers: lists of blocks with attention, pre-, post- and un-normalised, sequential and parallel.

Candidates are found by structure, not by the class names of libraries. The chain verification decides among them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from koopmon import (
    ArchitectureAdapter,
    BlockList,
    ExampleModel,
    Observable,
    Point,
    Stack,
    block_lists,
    call_arguments,
    hookimpl,
    row_stacks,
)

QUERY_KEY_NAMES = ({"q", "k"}, {"query", "key"}, {"wq", "wk"}, {"toq", "tok"})
FUSED_NAMES = ("qkv", "querykeyvalue", "cattn", "inprojweight")
VALUE_NAMES = {"v", "value", "wv", "tov"}
"""Names of attention's projections, without underscores and `proj`, `linear`, `layer`, `lin` at the end."""
MAX_NODES = 48
"""Nodes of the graph that are visited: an output projection has about ten."""
MAX_FACTORS = 12
"""Nodes between the logits and their softmax."""
NUM_QUERIES = 64
"""Queries of each sequence and head that count where the logits are formed and then forgotten."""
SOFTMAX = ("SoftmaxBackward0", "SafeSoftmaxBackward0")
_PASSED = {
    f"{name}Backward0"
    for name in ("View", "UnsafeView", "Unsqueeze", "Squeeze", "Slice", "Clone", "ToCopy", "Add", "MaskedFill", "Where")
} | {"ReshapeAliasBackward0", "SqueezeBackward1", "SelectBackward0"}
"""Nodes that keep the logits of visible keys: casts, changes of shape, masks."""


class TransformerAdapter(ArchitectureAdapter):
    """Blocks with attention, from any library; with specificity 1 any other list of blocks.

    A chain without attention is also reported as a transformer. It carries the flag "no-attention", and the verifying
    forward must show that its blocks are residual.
    """

    name = "transformer"
    fixed_state = False
    measures: ClassVar[Mapping[str, str]] = {
        "max_attention_logit": "Largest log(sum(exp(attention logits))) of a query, up to log(keys) above its logits."
    }

    def specificity(self, model: nn.Module) -> int:
        stacks = self.stacks(model)
        if any(stack.residual for stack in stacks):
            return 10
        return 1 if stacks else 0

    def stacks(self, model: nn.Module) -> list[Stack]:
        lists = block_lists(model)
        found = _jointed_stacks(model)
        for stack in found:  # lists inside its rows are sublayers
            lists = [blocks for blocks in lists if not blocks.name.startswith(f"{stack.name}.")]
        any_rows = [stack for stack in row_stacks(model) if stack.name not in {each.name for each in found}]
        rows = [stack for stack in any_rows if all(map(_has_attention, _row_parts(model, stack)))]
        names = {point.name for stack in rows for point in stack.points}
        lists = [blocks for blocks in lists if blocks.name.partition("[")[0] not in names]
        found += rows
        found += [blocks.stack(residual=True) for blocks in _attentive(lists)]
        if not found:
            runs = [run for blocks in lists for run in (blocks.alike() if blocks.is_planar else [blocks])]
            found = [replace(stack, residual=False) for stack in any_rows]
            found += [run.stack(residual=False) for run in runs]
        found.reverse()  # of equal lengths the later one first, because the decoder follows the encoder
        return sorted(found, key=lambda stack: len(stack.points), reverse=True)

    def flags(self, model: nn.Module) -> frozenset[str]:
        stacks = self.stacks(model)
        flags = set()
        if not any(stack.residual for stack in stacks):
            flags.add("no-attention")
        if all(any(_is_within(stack, part) for stack in stacks) for part in ("encoder", "decoder")):
            flags.add("encoder-decoder")
        return frozenset(flags)

    def observables(self, stack: Stack) -> Sequence[Observable]:
        layers = {part: point.layer for point in reversed(stack.points) for part in _attentions(point.module)}
        return [Observable("max_attention_logit", layer, part, largest_logit) for part, layer in layers.items()]

    def block_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        if _is_joint(module):
            state = args[1] if len(args) > 1 else kwargs.get("residual")
            return state if isinstance(state, Tensor) else None
        return super().block_input(module, args, kwargs)

    def token_mask(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], stack: Stack | None = None
    ) -> Tensor | None:
        # Called on every snapshot: must not walk through the model.
        call = call_arguments(model, args, kwargs)
        named = {name: value for name, value in call.items() if isinstance(value, Tensor) and value.dim() == 2}
        keeps, ignores = ["attention_mask"], ["src_key_padding_mask", "key_padding_mask"]
        if stack is not None and _is_within(stack, "decoder") and _is_encoder_decoder(model, call):
            keeps, ignores = ["decoder_attention_mask"], ["tgt_key_padding_mask"]
        elif stack is not None and _is_joint(stack.points[0].entry):
            keeps.append("mask")  # in other models `mask` may have any meaning
        for name in keeps:
            if name in named:
                return named[name].ne(0)
        for name in ignores:  # torch's masks: True or minus infinity at the tokens to ignore
            if name in named:
                counts = named[name].eq(0)
                return counts if stack is None or _is_batch_first(stack) else counts.T
        return named["labels"].ne(-100) if "labels" in named else None


@hookimpl
def koopmon_architecture_adapters() -> list[ArchitectureAdapter]:
    return [TransformerAdapter()]


@hookimpl
def koopmon_example_models() -> list[ExampleModel]:
    builds = {"torch-encoder": _torch_encoder}
    if find_spec("transformers") is not None:
        builds["llama"] = _llama
    return [ExampleModel(name, TransformerAdapter.name, build) for name, build in builds.items()]


def _torch_encoder(seed: int) -> tuple[nn.Module, dict[str, Tensor]]:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    padding = torch.arange(16) >= torch.tensor([[16], [16], [12], [9]])
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    return model, {"src": torch.randn(4, 16, 16), "src_key_padding_mask": padding}


def _llama(seed: int) -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_dropout=0.1,
        use_cache=False,
    )
    tokens = torch.randint(50, (4, 12))
    mask = torch.arange(12) < torch.tensor([[12], [12], [12], [8]])
    model = LlamaForCausalLM(config)
    return model, {"input_ids": tokens, "attention_mask": mask.long(), "labels": tokens.masked_fill(~mask, -100)}


def _attentive(lists: list[BlockList]) -> list[BlockList]:
    """Return lists of transformer blocks; without any, the outermost lists whose blocks hold attention alone.

    A whole block holds attention and weights beside it. Lists inside a whole block are its sublayers, heads or experts.
    A list whose items hold lists of whole blocks is a list of stages. Both are excluded.
    """
    whole = [blocks for blocks in lists if any(_is_whole(block) for _, block in blocks.blocks)]
    if whole:
        return [blocks for blocks in whole if not any(blocks.contains(other) for other in whole)]
    partial = [blocks for blocks in lists if any(_has_attention(block) for _, block in blocks.blocks)]
    return [blocks for blocks in partial if not any(other.contains(blocks) for other in partial)]


def _row_parts(model: nn.Module, stack: Stack) -> list[nn.Module]:
    return [model.get_submodule(point.name) for point in stack.points]


def _bare(name: str) -> str:
    name = name.lower().replace("_", "")
    for ending in ("proj", "linear", "layer", "lin"):
        name = name.removesuffix(ending)
    return name


def _is_attention(module: nn.Module) -> bool:
    kind = type(module).__name__.lower()
    if isinstance(module, nn.MultiheadAttention) or "attention" in kind or "attn" in kind:
        return True
    # A scripted module has no dicts there.
    names = {_bare(name) for name in (*module._modules.keys(), *module._parameters.keys())}
    return any(pair <= names for pair in QUERY_KEY_NAMES) or any(map(_is_fused, names))


def _attentions(block: nn.Module) -> list[nn.Module]:
    """Return the innermost modules of a block with attention."""
    found = [module for module in block.modules() if _is_attention(module)]
    return [each for each in found if not any(other is not each and other in set(each.modules()) for other in found)]


def _is_fused(name: str) -> bool:
    return any(fused in name for fused in FUSED_NAMES)


def _has_attention(block: nn.Module) -> bool:
    return any(_is_attention(module) for module in block.modules())


def _is_whole(block: nn.Module) -> bool:
    """Return True if `block` holds attention and weights beside it.

    A block that computes attention itself needs at least three weights beside q, k and v.
    """
    inside: set[nn.Module] = set()
    for module in block.modules():
        if module is not block and module not in inside and _is_attention(module):
            inside.update(module.modules())
    if inside:
        return any(True for _ in _weights(block, inside))
    if not _is_attention(block):
        return False
    projections = VALUE_NAMES.union(*QUERY_KEY_NAMES)
    names = [_bare(name) for name in _weights(block, inside)]
    return sum(name not in projections and not _is_fused(name) for name in names) >= 3


def _weights(block: nn.Module, without: set[nn.Module]) -> Iterator[str]:
    """Yield the names of the weight matrices of a block.

    Linear layers count by type, because sharded weights may be flat.
    """
    for path, module in block.named_modules():
        if module in without:
            continue
        name = path.rpartition(".")[2]
        if isinstance(module, nn.Linear):
            yield name
            continue
        for parameter_name, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() > 1:
                yield name if parameter_name == "weight" else parameter_name


def _jointed_stacks(model: nn.Module) -> list[Stack]:
    """Return stacks of x-transformers' form: a list of [norms, sublayer, joint], of which only the parts are called.

    The joint adds the sublayer's output to the state, which is its argument `residual`. A block is a run of sublayers,
    attention and feed-forward. Its entry is its first joint, and its exit is its last joint or the norm after it.
    """
    stacks = []
    for path, module in model.named_modules():
        rows = getattr(module, "layers", None)
        if not isinstance(rows, nn.ModuleList) or not len(rows) or not all(_is_jointed_row(row) for row in rows):
            continue
        name = f"{path}.layers" if path else "layers"
        length = getattr(module, "len_default_block", 1)
        if not isinstance(length, int) or length < 1 or len(rows) % length:
            length = 1
        points = []
        for layer, first in enumerate(range(0, len(rows), length)):
            last = first + length - 1
            joint, norm = f"{name}.{last}.2", f"{name}.{last}.0.2"
            left = joint if _part(rows, last, 0, 2) is None else norm
            parts = tuple(rows[first : last + 1])
            points.append(Point(left, model.get_submodule(left), layer, _part(rows, first, 2), parts))
        stacks.append(Stack(name, tuple(points)))
    return stacks


def _is_jointed_row(row: nn.Module) -> bool:
    if not isinstance(row, nn.ModuleList) or len(row) != 3:
        return False
    norms, _, joint = row
    return isinstance(norms, nn.ModuleList) and len(norms) == 3 and _is_joint(joint)


def _part(module: nn.Module, *path: int) -> nn.Module | None:
    """Return the module at a path of list indices; None if a list holds None."""
    part: nn.Module | None = module
    for index in path:
        part = None if part is None else part._modules[str(index)]
    return part


def _is_joint(module: nn.Module) -> bool:
    """Return True for a module that performs the residual addition of one stream.

    Its forward takes (sublayer output, residual).
    """
    return hasattr(module, "prepare") and "residual" in inspect.signature(module.forward).parameters


def _is_within(stack: Stack, part: str) -> bool:
    return any(part in segment for segment in stack.name.lower().split("."))


def _is_batch_first(stack: Stack) -> bool:
    attention = (module for module in stack.points[0].module.modules() if isinstance(module, nn.MultiheadAttention))
    return all(module.batch_first for module in attention)


def _is_encoder_decoder(model: nn.Module, call: Mapping[str, Any]) -> bool:
    config = getattr(getattr(model, "module", model), "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) or "tgt" in call or "decoder_input_ids" in call


def largest_logit(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Tensor | None:
    """Read the largest log(sum(exp(logits))) over the queries of an attention module, from its backward graph.

    It lies between the largest logit and the same plus log(keys). Fused attention never forms the logits; positions,
    norms and groups of heads are the module's own. The graph of the output holds the queries and keys as they were
    multiplied, and fused kernels keep the log(sum(exp(logits))) of each query.

    Fused attention counts all queries, other code NUM_QUERIES of each sequence and head, and without biases that it
    adds to the logits. None where the graph has neither, as under activation checkpointing or in a compiled block.
    """
    parts = output if isinstance(output, (tuple, list)) else (output,)
    starts = [part.grad_fn for part in parts if isinstance(part, Tensor) and part.grad_fn is not None]
    for node in _nodes(starts[:1]):
        name = node.name()
        if name in SOFTMAX:
            return _formed(node)
        if "Attention" not in name:
            continue  # without a search for tensors that only fused kernels keep
        fused = _saved(node, "logsumexp", "log_sumexp")
        if fused is not None and (query := _saved(node, "query")) is not None and query.dim() == 4:
            return _largest(fused[..., : query.shape[-2]])  # some kernels pad the queries
    return None


def _nodes(starts: list[Any]) -> Iterator[Any]:
    """Yield the nodes of a graph, the nearest first."""
    found = dict.fromkeys(starts)
    waiting = list(starts)
    while waiting and len(found) < MAX_NODES:
        node = waiting.pop(0)
        yield node
        new = [each for each, _ in node.next_functions if each is not None and each not in found]
        found.update(dict.fromkeys(new))
        waiting += new


def _saved(node: Any, *names: str) -> Tensor | None:
    """Return the first of these saved tensors; None if a hook has packed it, as activation checkpointing does."""
    for name in names:
        kept = getattr(node, f"_raw_saved_{name}", None)
        if kept is not None and getattr(kept, "unpack_hook", kept) is None:
            value = getattr(node, f"_saved_{name}")
            plain = isinstance(value, Tensor) and not hasattr(value, "to_local") and not value.is_nested
            return value if plain else None
    return None


def _formed(softmax: Any) -> Tensor | None:
    """Compute the result from a softmax of products of queries and keys: of each query's likeliest key."""
    node, factor, shares = softmax, 1.0, _saved(softmax, "result")
    for _ in range(MAX_FACTORS):
        node = next((each for each, _ in node.next_functions if each is not None), None)
        if node is None or shares is None:
            return None
        name = node.name()
        if name in ("MulBackward0", "DivBackward0"):
            other = _saved(node, "other")
            if other is None or other.dim() or other.device.type != "cpu":
                return None
            factor = factor * other.item() if name == "MulBackward0" else factor / other.item()
        elif name in ("BmmBackward0", "BaddbmmBackward0"):
            queries, keys = _saved(node, "self", "batch1"), _saved(node, "mat2", "batch2")
            return None if queries is None or keys is None else _by_product(shares, queries, keys, factor)
        elif name not in _PASSED:
            return None
    return None


def _by_product(shares: Tensor, queries: Tensor, keys: Tensor, factor: float) -> Tensor | None:
    """`shares` is (..., T, S), `queries` (B, T, D), `keys` (B, D, S)."""
    shape = (len(queries), queries.shape[1], keys.shape[2])
    if (math.prod(shares.shape[:-2]), *shares.shape[-2:]) != shape:
        return None
    every = max(1, queries.shape[1] // NUM_QUERIES)
    share, likeliest = shares.reshape(shape)[:, ::every].max(-1)
    chosen = keys.transpose(1, 2).gather(1, likeliest.unsqueeze(-1).expand(-1, -1, keys.shape[1]))
    logits = (queries[:, ::every].float() * chosen.float()).sum(-1) * factor
    return _largest(logits - share.float().log())


def _largest(values: Tensor) -> Tensor:
    """Return the largest finite value. A query that sees no key has none."""
    return values.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf).amax()
