"""Lookup of the dashboards by uid, and of their panels by title."""

from __future__ import annotations

from functools import cache

from koopmon.grafana import fleet_dashboard, monitor_dashboard, run_dashboard
from koopmon.grafana.panels import Json


def dashboards() -> dict[str, Json]:
    """Return dashboard JSON by uid, in the format of Grafana's API and provisioning; each call returns a fresh copy."""
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
    """Return the id of the panel `title` on the dashboard `uid`. Raises KeyError."""
    return _numbers()[uid, title]
