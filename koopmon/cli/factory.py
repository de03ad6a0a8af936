"""Loads user factories, given as `module:function` or `file.py:function`, which return (model, batch)."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from koopmon.errors import KoopmonError, foreign_code

if TYPE_CHECKING:
    from torch import nn


_KINDS = {"factory": "function", "adapter": "object"}
"""Type of the named object in error messages, by its role."""


class FactoryError(KoopmonError):
    """The named object does not exist, or a factory does not return (model, batch)."""

    exit_status = 2


def load(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Call the factory `name`; return its model, and its batch as positional and keyword arguments of one forward pass.

    A batch is a tensor, a tuple or list of arguments, or a mapping of keyword arguments. Raises FactoryError.
    """
    return load_with_loss(name)[:3]


def load_with_loss(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], Callable[[nn.Module], Any] | None]:
    """Call the factory `name` as `load`, and return its loss too: the third object that it returns, else None."""
    words, sys.argv = sys.argv, [name.rpartition(":")[0]]  # a script may parse its command line
    try:
        model, batch, loss = call(name, named(name))
    finally:
        sys.argv = words
    if isinstance(batch, Mapping):
        return model, (), dict(batch), loss
    return model, tuple(batch) if isinstance(batch, (tuple, list)) else (batch,), {}, loss


def named(name: str, what: str = "factory") -> Any:
    """Return the object of `module:object` or `file.py:object`. Raises FactoryError, which uses `what` as its role."""
    place, colon, function = name.rpartition(":")
    if not colon or not place or not function:
        raise FactoryError(f"{what} {name!r}: expected module:{_KINDS[what]} or file.py:{_KINDS[what]}")
    with foreign_code(lambda why: FactoryError(f"{what} {name!r}: importing {place} {why}")):
        module = _file(Path(place)) if place.endswith(".py") else _module(place)
    made: Any = module
    for part in function.split("."):
        made = getattr(made, part, None)
    if made is None:
        raise FactoryError(f"{what} {name!r}: {place} has no {_KINDS[what]} {function}")
    return made


def call(name: str, factory: Any) -> tuple[nn.Module, Any, Callable[[nn.Module], Any] | None]:
    """Call the factory `name` and return its model, its batch, and its loss if it has one. Raises FactoryError."""
    from torch import nn

    if not callable(factory):
        raise FactoryError(f"factory {name!r}: expected a function, it is a {type(factory).__name__}")
    with foreign_code(lambda why: FactoryError(f"factory {name!r} {why}")):
        result = factory()
    if not isinstance(result, tuple) or len(result) not in (2, 3) or not isinstance(result[0], nn.Module):
        what = type(result).__name__
        if isinstance(result, tuple):
            what = f"({', '.join(type(item).__name__ for item in result)})"
        raise FactoryError(f"factory {name!r}: expected (model, batch), a torch.nn.Module first; it returned {what}")
    loss = result[2] if len(result) == 3 else None
    if loss is not None and not callable(loss):
        raise FactoryError(
            f"factory {name!r}: expected (model, batch, loss) with a function; it is a {type(loss).__name__}"
        )
    return result[0], result[1], loss


def _module(name: str) -> ModuleType:
    # Modules in the working directory are importable, as under `python -m`.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    return importlib.import_module(name)


def _file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FactoryError(f"{path}: no such file")
    loaded = sys.modules.get(path.stem)
    if loaded is not None and Path(getattr(loaded, "__file__", None) or "").resolve() == path.resolve():
        return loaded  # two names from one file must share their classes
    # Modules beside the file are importable, as under `python file.py`.
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise FactoryError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module
