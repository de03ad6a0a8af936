"""Lookup of the dashboards by uid, and of their panels by title. `python -m manual.write` generates their files."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

Json = dict[str, Any]

DIRECTORY = Path(__file__).parent / "dashboards"
UIDS = ("koopmon-fleet", "koopmon-run", "koopmon-monitor")


def dashboards() -> dict[str, Json]:
    """Return dashboard JSON by uid, in the format of Grafana's API and provisioning; each call returns a fresh copy."""
    return {uid: json.loads((DIRECTORY / f"{uid}.json").read_text(encoding="utf-8")) for uid in UIDS}


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
