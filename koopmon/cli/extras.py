"""Modules of the extra `monitor`. Every command but `koopmon run --monitor ENDPOINT` needs them."""

from __future__ import annotations

from importlib.util import find_spec

MODULES = (
    "typer",
    "rich",
    "prometheus_client",
    "starlette",
    "uvicorn",
    "jinja2",
    "markupsafe",
    "yaml",
    "torch",
)


def missing_for_monitor() -> str:
    """Return the first module of the extra `monitor` that is not installed; empty if all are."""
    return next((name for name in MODULES if find_spec(name) is None), "")
