"""koopmon detects training divergence early in the spectrum of the residual stream and lowers the learning rate."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from koopmon.agent.attach import Agent, attach
    from koopmon.api import ArchitectureAdapter, Discovery, ExampleModel, Observable, Point, Stack, call_arguments
    from koopmon.block_finder import BlockList, block_lists, lists_holding, normalised, parts_of, row_stacks
    from koopmon.config import Config
    from koopmon.discovery import discover
    from koopmon.errors import AdapterError, ConfigError, DiscoveryError, KoopmonError
    from koopmon.hookspecs import hookimpl
    from koopmon.profiling import profile
    from koopmon.spectral import LayerProfile, SpectralProfile

__version__ = "0.2.0"

_NAMES = {
    "koopmon.agent.attach": ("Agent", "attach"),
    "koopmon.api": (
        "ArchitectureAdapter",
        "Discovery",
        "ExampleModel",
        "Observable",
        "Point",
        "Stack",
        "call_arguments",
    ),
    "koopmon.block_finder": ("BlockList", "block_lists", "lists_holding", "normalised", "parts_of", "row_stacks"),
    "koopmon.config": ("Config",),
    "koopmon.discovery": ("discover",),
    "koopmon.errors": ("AdapterError", "ConfigError", "DiscoveryError", "KoopmonError"),
    "koopmon.hookspecs": ("hookimpl",),
    "koopmon.profiling": ("profile",),
    "koopmon.spectral": ("LayerProfile", "SpectralProfile"),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}
"""Module of each public name, imported on first access because `import koopmon` alone must not import torch."""

__all__ = [
    "AdapterError",
    "Agent",
    "ArchitectureAdapter",
    "BlockList",
    "Config",
    "ConfigError",
    "Discovery",
    "DiscoveryError",
    "ExampleModel",
    "KoopmonError",
    "LayerProfile",
    "Observable",
    "Point",
    "SpectralProfile",
    "Stack",
    "__version__",
    "attach",
    "block_lists",
    "call_arguments",
    "discover",
    "hookimpl",
    "lists_holding",
    "normalised",
    "parts_of",
    "profile",
    "row_stacks",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
