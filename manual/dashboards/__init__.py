"""Grafana's dashboards as Python. The package has the JSON that `python -m manual.write` makes of it."""

from __future__ import annotations

from manual.dashboards import fleet, monitor, run
from manual.dashboards.panels import Json


def make() -> list[Json]:
    """Return the JSON of each dashboard, in the format of Grafana's API and provisioning."""
    return [fleet.make(), run.make(), monitor.make()]
