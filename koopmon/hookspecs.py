"""Hook specifications that plugins implement, including koopmon's own."""

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
    """Return small models of the families of this plugin's adapters, for `koopmon adapters check`."""
