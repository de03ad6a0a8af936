"""Lists of blocks in a model, found without running it. Every adapter starts from them.

A *block* is a module that could map a state to the next one: it has children and parameters, or several weights of its
own. Leaves of `torch.nn` (a Linear, a LayerNorm) are no blocks. A list is a run of blocks in a ModuleList, Sequential
or ModuleDict, or in numbered attributes (h0, h1, ...) of any module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import nn

from koopmon.api import WRAPPER_ATTRIBUTES, Point, Stack, unwrapped

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
PLANAR = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
QUERY_OR_KEY = re.compile(r"(?:.*_)?(?:q|k|qk|query|key)(?:_.*)?")
"""Names of normalisations of queries and keys. These bound attention's weights, and not the updates."""
NUMBERED = re.compile(r"(?P<prefix>.*?)_?(?P<number>\d+)")


@dataclass(frozen=True, slots=True)
class BlockList:
    """Neighbouring blocks. `name` is the container's path, with [first:end] if it holds several such runs."""

    name: str
    blocks: tuple[tuple[str, nn.Module], ...]
    """(path in the model as given, module) of each block."""

    def contains(self, other: BlockList) -> bool:
        """Return True if `other` lies inside one of these blocks."""
        first = other.blocks[0][1]
        return any(
            block is not first and any(module is first for module in block.modules()) for _, block in self.blocks
        )

    @property
    def is_planar(self) -> bool:
        """True if a block convolves over a plane: such lists often hold blocks of several widths."""
        return any(isinstance(module, PLANAR) for _, block in self.blocks for module in block.modules())

    def alike(self) -> list[BlockList]:
        """Return the runs of at least two neighbours whose parameters have equal names and shapes."""
        runs: list[BlockList] = []
        first = 0
        for _, group in groupby(self.blocks, key=lambda item: _shapes(item[1])):
            run = tuple(group)
            name = self.name if len(run) == len(self.blocks) else f"{self.name}[{first}:{first + len(run)}]"
            if len(run) > 1:
                runs.append(BlockList(name, run))
            first += len(run)
        return runs

    def stack(self, *, residual: bool) -> Stack:
        """Return these blocks as a candidate stack."""
        points = tuple(Point(name, block, layer) for layer, (name, block) in enumerate(self.blocks))
        return Stack(self.name, points, residual)


def canonical_name(name: str) -> str:
    """Return a module's path without the segments of wrappers: one name then fits a model and its wrapped form."""
    return ".".join(part for part in name.split(".") if part not in WRAPPER_ATTRIBUTES)


def block_lists(model: nn.Module) -> list[BlockList]:
    """Return every list of blocks in `model`, outer lists before inner ones. A repeated block is listed once."""
    found: list[BlockList] = []
    for path, module in model.named_modules():
        for name, items in _sequences(path, module):
            runs = [list(run) for is_run, run in groupby(items, key=lambda item: _is_block(item[1])) if is_run]
            for run in runs:
                blocks: dict[int, tuple[str, nn.Module]] = {}
                for block_name, block in run:
                    blocks.setdefault(id(block), (block_name, block))
                first = items.index(run[0])
                label = name if len(runs) == 1 else f"{name}[{first}:{first + len(run)}]"
                found.append(BlockList(label, tuple(blocks.values())))
    return found + _plain_lists(model, found)


def _plain_lists(model: nn.Module, found: Sequence[BlockList]) -> list[BlockList]:
    """Return the blocks that a module of `model` holds in a Python list or tuple, without those of `found`."""
    known = [{id(block) for _, block in blocks.blocks} for blocks in found]
    lists = []
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if not isinstance(value, (list, tuple)) or not all(isinstance(item, nn.Module) for item in value):
                continue
            where = f"{path}.{name}" if path else name
            blocks = {id(item): (f"{where}.{index}", item) for index, item in enumerate(value) if _is_block(item)}
            if len(blocks) > 1 and not any(blocks.keys() <= others for others in known):
                lists.append(BlockList(where, tuple(blocks.values())))
    return lists


def row_stacks(model: nn.Module) -> list[Stack]:
    """Return lists of rows as candidate stacks: each row is a ModuleList or ModuleDict of parts that the model calls.

    The parts of all rows have the same names. A row begins at its first part and ends at its last one.
    """
    found = []
    for path, module in model.named_modules():
        for name, rows in _sequences(path, module):
            parts = [dict(row._modules.items()) for _, row in rows]  # a scripted module has no dict there
            alike = all(isinstance(row, (nn.ModuleList, nn.ModuleDict)) for _, row in rows) and all(
                len(each) > 1 and each.keys() == parts[0].keys() for each in parts
            )
            if not alike or len(rows) < 2:
                continue
            points = []
            for layer, (row_name, row) in enumerate(rows):
                called = [part for part in parts[layer].values() if _is_called(part)]
                if len(called) > 1 and called[0] is not None and called[-1] is not None:
                    points.append(Point(row_name, called[-1], layer, called[0], (row,)))
            if len(points) == len(rows):
                found.append(Stack(name, tuple(points)))
    return found


def first_layer_stacks(stacks: Sequence[Stack]) -> list[Stack]:
    """Return for each stack that of the first layers of its blocks, whose inputs are the states.

    It is for blocks that the model calls by other methods than `forward`, as `block.attend(x)`. The first layer is the
    first normalisation among the children of a block, else its first child.
    """
    found = []
    for stack in stacks:
        children = [dict(point.module.named_children()) for point in stack.points]
        blocks = BlockList(stack.name, tuple((point.name, point.module) for point in stack.points))
        if len(children) < 2 or blocks.is_planar or any(point.entry is not point.module for point in stack.points):
            continue
        leaves = {name: child for name, child in children[0].items() if next(child.children(), None) is None}
        norms = (name for name, child in leaves.items() if "norm" in type(child).__name__.lower())
        first = next(norms, next(iter(children[0]), None))
        if first is not None and all(first in each and _is_called(each[first]) for each in children):
            points = tuple(
                Point(f"{point.name}.{first}", each[first], point.layer)
                for point, each in zip(stack.points, children, strict=True)
            )
            found.append(Stack(f"{stack.name}.*.{first}", points, residual=False, form="entries"))
    return found


def _is_called(part: nn.Module | None) -> bool:
    return part is not None and not isinstance(part, (nn.ModuleList, nn.ModuleDict))


def parts_of(block: nn.Module, is_part: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """Return the outermost modules in `block`, itself included, for which `is_part` is True, in registration order."""
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in block.modules():
        if module not in inside and is_part(module):
            found.append(module)
            inside.update(module.modules())
    return found


def normalised(stack: Stack) -> bool:
    """Return True if every block of `stack` holds a normalisation, known by its class name (LayerNorm, RMSNorm, ...).

    Normalisations of queries and keys do not count, nor do torch's reparametrisations, which normalise weights. A block
    that normalises by a function call counts as one without normalisation.
    """
    return all(any(_normalisations(module) for module in {point.entry, point.module}) for point in stack.points)


def _normalisations(block: nn.Module) -> list[nn.Module]:
    return [
        module
        for path, module in block.named_modules()
        if "norm" in type(module).__name__.lower()
        and not type(module).__module__.startswith("torch.nn.utils")
        and not QUERY_OR_KEY.fullmatch(path.rpartition(".")[2])
    ]


def lists_holding(model: nn.Module, is_part: Callable[[nn.Module], bool]) -> list[BlockList]:
    """Return the lists in which some blocks hold a part for which `is_part` is True.

    The longest list is first; of equal ones the later one. A whole block holds a part and weight matrices beside it.
    Lists inside a whole block are its sublayers, heads or experts. A list whose items hold lists of whole blocks is a
    list of stages. Both are excluded. If no block is whole, the result is the outermost lists in which some blocks
    hold, or are, a part.
    """
    parts = {blocks.name: [parts_of(block, is_part) for _, block in blocks.blocks] for blocks in block_lists(model)}
    inside = {module for rows in parts.values() for row in rows for part in row for module in part.modules()}
    inside -= {part for rows in parts.values() for row in rows for part in row}
    lists = [
        blocks
        for blocks in block_lists(model)
        if any(parts[blocks.name]) and not any(block in inside for _, block in blocks.blocks)
    ]
    whole = [
        blocks
        for blocks in lists
        if any(_has_more(block, row) for (_, block), row in zip(blocks.blocks, parts[blocks.name], strict=True))
    ]
    if whole:
        kept = [blocks for blocks in whole if not any(blocks.contains(other) for other in whole)]
    else:
        kept = [blocks for blocks in lists if not any(other.contains(blocks) for other in lists)]
    kept.reverse()
    return sorted(kept, key=lambda blocks: len(blocks.blocks), reverse=True)


def container_stack(model: nn.Module, name: str) -> Stack | None:
    """Return all items of the container `name`, of any kind; None if there is no such container."""
    wanted = canonical_name(name)
    for path, module in model.named_modules():
        for sequence, items in _sequences(path, module):
            if canonical_name(sequence) == wanted and items:
                points = tuple(Point(item_name, item, layer) for layer, (item_name, item) in enumerate(items))
                return Stack(sequence, points)
    return None


def survey(model: nn.Module) -> dict[str, str]:
    """Return the contents of each container, by the container's name.

    If the structure shows that a container is no stack, its entry includes the reason.
    """
    seen: dict[str, str] = {}
    for path, module in model.named_modules():
        for name, items in _sequences(path, module):
            kinds = ", ".join(dict.fromkeys(class_name(item) for _, item in items))
            blocks = BlockList(name, tuple(item for item in items if _is_block(item[1])))
            flaw = "" if blocks.blocks else ": single layers, no blocks"
            if blocks.is_planar and not blocks.alike():
                flaw = ": convolve a plane, and no two neighbours are alike"
            seen[name or "the model itself"] = f"{len(items)} x {kinds}{flaw}"
    return seen


def _sequences(path: str, module: nn.Module) -> Iterator[tuple[str, Sequence[tuple[str, nn.Module]]]]:
    """Yield the ordered children of a container, or the numbered children of another module, each as (path, module)."""

    def join(name: str) -> str:
        return f"{path}.{name}" if path else name

    children = [(name, child) for name, child in module._modules.items() if child is not None]
    if isinstance(module, CONTAINERS):
        if children:
            yield path, [(join(name), child) for name, child in children]
        return
    numbered: dict[str, list[tuple[int, str, nn.Module]]] = {}
    for name, child in children:
        if match := NUMBERED.fullmatch(name):
            numbered.setdefault(match["prefix"], []).append((int(match["number"]), name, child))
    for prefix, items in numbered.items():
        if len(items) > 1:
            items.sort(key=lambda item: item[0])
            yield join(f"{prefix}*"), [(join(name), child) for _, name, child in items]


def _shapes(block: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, tuple(each.shape)) for name, each in block.named_parameters())


def _has_more(block: nn.Module, parts: Sequence[nn.Module]) -> bool:
    """Return True if `block` holds `parts`, and weight matrices outside of them."""
    inside = {module for part in parts for module in part.modules()}
    beside = (
        parameter for module in block.modules() if module not in inside for parameter in module._parameters.values()
    )
    return bool(parts) and any(parameter is not None and parameter.dim() > 1 for parameter in beside)


def _is_block(module: nn.Module) -> bool:
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return False  # never called itself
    if any(True for _ in module.children()):
        return any(True for _ in module.parameters())
    weights = [parameter for parameter in module.parameters() if parameter.dim() > 1]
    return len(weights) > 1 and not type(module).__module__.startswith("torch.nn.")


def class_name(module: nn.Module) -> str:
    """Return the name of the user's class, inside any wrappers."""
    return type(unwrapped(module)).__name__
