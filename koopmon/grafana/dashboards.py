"""The dashboards by their uid, and their panels by title."""

from __future__ import annotations

from functools import cache

from koopmon.grafana import fleet_dashboard, monitor_dashboard, run_dashboard
from koopmon.grafana.panels import Json


def dashboards() -> dict[str, Json]:
    """Dashboard JSON by uid, as Grafana's API and its provisioning take it; a fresh copy at each call."""
    made = (fleet_dashboard.make(), run_dashboard.make(), monitor_dashboard.make())
    return {each["uid"]: each for each in made}


@cache
def _numbers() -> dict[tuple[str, str], int]:
    return {
        (uid, panel["title"]): panel["id"]
        for uid, each in dashboards().items()
        for panel in each["panels"]
        if panel["type"] != "row"
    }


def panel_id(uid: str, title: str) -> int:
    """Number of the panel called `title` on the dashboard `uid`. Raises KeyError."""
    return _numbers()[uid, title]
