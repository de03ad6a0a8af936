"""Hook specifications: the doors through which plugins enter, ours included."""

from __future__ import annotations

import pluggy

from koopmon.api import ArchitectureAdapter, ExampleModel

PROJECT = "koopmon"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def koopmon_architecture_adapters() -> list[ArchitectureAdapter]:  # type: ignore[empty-body]
    """Return the architecture adapters that this plugin offers."""


@hookspec
def koopmon_example_models() -> list[ExampleModel]:  # type: ignore[empty-body]
    """Return small models of the families that this plugin's adapters know, for `koopmon adapters check`."""
