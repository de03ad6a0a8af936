"""The models whose parameters an optimizer updates, found among the live objects."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import TYPE_CHECKING

from koopmon.errors import raise_from_signal

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class RootNotFoundError(LookupError):
    """No single module owns the parameters of an optimizer. The message lists the modules found."""


def kind_of(model: nn.Module) -> str:
    """Return the class of `model`, inside any wrappers."""
    from koopmon.block_finder import class_name

    return class_name(model)


def parameters_of(optimizer: Optimizer) -> frozenset[int]:
    return frozenset(_in_order(optimizer))


def root_module(optimizer: Optimizer, *, most: bool = False) -> nn.Module:
    """Return the outermost live module that owns every parameter of `optimizer`.

    With `most` it may own the larger part of the weights, as beside a loss with weights of its own.

    Several unrelated wrappers may own them (a second view of one model). The result is then the outermost module that
    all of these share. Copies, such as an exponential moving average, own other parameters and never count.

    Raises RootNotFoundError when there is none.
    """
    parameters = parameters_of(optimizer)
    modules = _live_modules()
    owners = [module for module in modules if owns(module, parameters)]
    if not owners and most:
        owners = _owners_of_most(modules, optimizer)
    roots = _outermost(owners)
    if len(roots) > 1:
        shared = set.intersection(*({id(inner) for inner in root.modules()} for root in roots))
        roots = _outermost([module for module in owners if id(module) in shared])
    if len(roots) == 1:
        return roots[0]
    if roots:
        raise RootNotFoundError(
            f"{len(roots)} models own the optimizer's parameters; call koopmon.attach(model, optimizer)"
        )
    raise RootNotFoundError(
        "no one model owns all of the optimizer's parameters; call koopmon.attach(model, optimizer)"
    )


def models_of(optimizer: Optimizer) -> list[nn.Module]:
    """Return the models that own parameters of an optimizer, in its order, if no module owns all: those with blocks.

    An encoder and a decoder are examples. They may share some parameters. Two views of one model are left out.
    """
    from koopmon.block_finder import block_lists

    order = {parameter: place for place, parameter in enumerate(_in_order(optimizer))}
    modules = _live_modules()
    owned = {id(module): order.keys() & _ids(module) for module in modules}
    outermost = _outermost([module for module in modules if owned[id(module)]])
    models = []
    for module in outermost:
        own = owned[id(module)].difference(*(owned[id(each)] for each in outermost if each is not module))
        if 2 * len(own) > len(owned[id(module)]) and any(len(each.blocks) > 1 for each in block_lists(module)):
            models.append(module)
    return sorted(models, key=lambda module: min(order[each] for each in owned[id(module)]))


def join(models: Sequence[nn.Module]) -> nn.Module:
    """Return a module that holds `models` under the names of their classes. It is never called."""
    from torch import nn

    names: dict[str, nn.Module] = {}
    for model in models:
        name = kind_of(model)
        names[name if name not in names else f"{name}{len(names) + 1}"] = model
    root: nn.Module = type("+".join(names), (nn.Module,), {})()
    for name, model in names.items():
        root.add_module(name, model)
    return root


def _live_modules() -> list[nn.Module]:
    from torch import nn

    # isinstance() reads `__class__`, which makes a lazy proxy load its object. type() does not.
    return [thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module) and "_modules" in vars(thing)]


def _in_order(optimizer: Optimizer) -> list[int]:
    return [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]


def _ids(module: nn.Module) -> frozenset[int]:
    try:
        return frozenset(map(id, module.parameters()))
    except BaseException as error:  # another part of the process may be building this module
        raise_from_signal(error)
        return frozenset()


def describe_model(optimizer: Optimizer) -> str:
    """Return the class of the model that `optimizer` updates, with that of the optimizer."""
    try:
        model = type(root_module(optimizer)).__name__
    except RootNotFoundError:
        model = "the model"
    return f"{model} under {type(optimizer).__name__}"


def goes_on_elsewhere(model: nn.Module, optimizer: Optimizer) -> bool:
    """Return True if parts of `model`, which has trained, train on in a model that does not hold it."""
    try:
        return not contains(root_module(optimizer), model)
    except RootNotFoundError:
        return False


def owns(module: nn.Module, parameters: frozenset[int]) -> bool:
    return parameters <= _ids(module)


def _owners_of_most(modules: Sequence[nn.Module], optimizer: Optimizer) -> list[nn.Module]:
    """Return the modules that own the most weights of `optimizer`, if these are more than half of them."""
    sizes = {id(each): each.numel() for group in optimizer.param_groups for each in group["params"]}
    owned = [sum(sizes.get(each, 0) for each in _ids(module)) for module in modules]
    largest = max(owned, default=0)
    return [
        each for each, size in zip(modules, owned, strict=True) if 2 * size > sum(sizes.values()) and size == largest
    ]


def contains(root: nn.Module, model: nn.Module | None) -> bool:
    return any(module is model for module in root.modules())


def _outermost(modules: list[nn.Module]) -> list[nn.Module]:
    inner = {id(child) for module in modules for child in module.modules() if child is not module}
    return [module for module in modules if id(module) not in inner]
