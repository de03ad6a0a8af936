"""The data of the pages as JSON. docs/live-page.md documents the format: fields may be added but not removed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from koopmon.monitor.http.policy_preview import preview
from koopmon.views.run_view import RunView
from koopmon.views.spectra import layers_to_dict

VERSION = 1


def runs(views: Sequence[RunView], now: float) -> dict[str, Any]:
    """Summaries of all runs. `now` is Unix seconds."""
    return {"version": VERSION, "time": now, "runs": [summary(view) for view in views]}


def summary(view: RunView) -> dict[str, Any]:
    """Summary of one run."""
    latest, last = view.latest, view.last_decision
    return {
        "run": view.name,
        "incarnation": view.incarnation,
        "revision": view.revision,
        "state": view.state,
        "adapter": view.adapter,
        "step": view.step,
        "risk": None if latest is None else latest.risk,
        "forecast": None if latest is None else latest.forecast,
        "lr_scale": view.lr_scale,
        "kss_alpha": view.kss_alpha,
        "last_heard": view.last_heard or None,
        "last_decision": None if last is None else {"step": last.step, "phase": last.phase, "reason": last.reason},
    }


def run(view: RunView, now: float) -> dict[str, Any]:
    """All data of one run. Numbers that are not finite are null."""
    told = preview(view)
    return {
        "version": VERSION,
        "time": now,
        **summary(view),
        "model": {"num_layers": view.num_layers, "width": view.width},
        "acts": view.acts,
        "sends": view.sends,
        "health": msgspec.to_builtins(view.health) | {"snapshots_received": view.num_received},
        "points": [point.to_dict() for point in view.points],
        "logged": [
            {"step": point.step, "values": {name: each.value for name, each in point.readings.items()}}
            for point in view.logged
        ],
        "layers": layers_to_dict(view.columns),
        "spectrum": None if view.spectrum is None else view.spectrum.to_dict(),
        "decisions": [decision.to_dict() for decision in view.decisions],
        "outlook": {
            "phase": told.phase,
            "meaning": told.meaning,
            "lines": [{"if": condition, "then": answer} for condition, answer in told.lines],
        },
    }
