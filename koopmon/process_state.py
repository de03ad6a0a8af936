"""State of the process that affects a training's numbers: saved before a plugin's code runs, restored after it."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("koopmon.plugins")


class ProcessState:
    """Copies of the random states and of the global switches, made at construction.

    State that belongs to one thread, such as grad mode and autocast, is not included: plugins run in separate threads.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[str, Callable[[], Any], Callable[[Any], object], Any]] = []
        for name, get, put in _items():
            with contextlib.suppress(Exception):  # such as a working directory that was removed
                self._kept.append((name, get, put, get()))

    def restore(self) -> list[str]:
        """Restore the items that have changed since. Returns their names."""
        changed = []
        for name, get, put, value in self._kept:
            try:
                if not _same(get(), value):
                    put(value)
                    changed.append(name)
            except Exception as error:
                logger.warning("koopmon: a plugin changed %s, which cannot be put back: %s", name, error)
        return changed


def _items() -> Iterator[tuple[str, Callable[[], Any], Callable[[Any], object]]]:
    """Yield (name, function that reads it, function that writes it)."""
    yield "Python's random state", random.getstate, random.setstate
    if (numpy_random := sys.modules.get("numpy.random")) is not None:
        yield "NumPy's random state", numpy_random.get_state, numpy_random.set_state
    yield "torch's random state", torch.get_rng_state, torch.set_rng_state
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        yield "the GPUs' random state", torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all
    yield "the default dtype", torch.get_default_dtype, torch.set_default_dtype
    mode = torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode
    yield "the use of deterministic algorithms", *mode
    yield "anomaly detection", _anomaly, lambda kept: torch.set_anomaly_enabled(*kept)
    yield "float32 precision", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    for name in ("benchmark", "deterministic"):
        cudnn = torch.backends.cudnn
        yield f"cudnn.{name}", partial(getattr, cudnn, name), partial(setattr, cudnn, name)
    for module, kind in (("torch.nn.modules.module", "modules"), ("torch.optim.optimizer", "optimizers")):
        known = vars(sys.modules[module]).items()
        tables = [each for name, each in known if name.startswith("_global_") and isinstance(each, dict)]
        yield f"the hooks of all {kind}", partial(_entries, tables), partial(_put_entries, tables)
    yield "the recursion limit", sys.getrecursionlimit, sys.setrecursionlimit
    yield "the level of the log", lambda: logging.root.manager.disable, logging.disable
    yield "the working directory", os.getcwd, os.chdir
    paths = list(sys.path)
    # A plugin may add paths of its own.
    yield "sys.path", lambda: [path for path in paths if path in sys.path], partial(_put_paths, paths)
    # Other filters may be a library's, which would not add them a second time: keep those.
    yield "which warnings are errors", _fatal_warnings, _keep_fatal_warnings


def _anomaly() -> tuple[bool, bool]:
    return torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()


def _entries(tables: list[dict[Any, Any]]) -> list[list[tuple[Any, Any]]]:
    return [list(table.items()) for table in tables]


def _put_entries(tables: list[dict[Any, Any]], kept: list[list[tuple[Any, Any]]]) -> None:
    for table, entries in zip(tables, kept, strict=True):
        table.clear()
        table.update(entries)


def _put_paths(paths: list[str], _: list[str]) -> None:
    sys.path[:] = paths + [path for path in sys.path if path not in paths]


def _fatal_warnings() -> list[Any]:
    return [each for each in warnings.filters if each[0] == "error"]


def _keep_fatal_warnings(kept: list[Any]) -> None:
    warnings.filters[:] = [each for each in warnings.filters if each[0] != "error" or each in kept]  # type: ignore[index]


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, (tuple, list)):
        return len(left) == len(right) and all(map(_same, left, right))
    if hasattr(left, "tobytes"):  # a NumPy array
        return bool(left.tobytes() == right.tobytes())
    return bool(left == right)
