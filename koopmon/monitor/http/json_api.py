"""The data of the pages as JSON. docs/live-page.md documents the format: fields may be added but not removed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from koopmon.monitor.http.policy_preview import preview
from koopmon.views.run_view import Column, DecisionView, RunView, plain

VERSION = 1


def runs(views: Sequence[RunView], now: float) -> dict[str, Any]:
    """Summaries of all runs. `now` is Unix seconds."""
    return {"version": VERSION, "time": now, "runs": [summary(view) for view in views]}


def summary(view: RunView) -> dict[str, Any]:
    """Summary of one run."""
    latest, last = view.latest, view.decisions[-1] if view.decisions else None
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
        "points": [plain(point) for point in view.points],
        "layers": _layers(view.columns),
        "spectrum": _spectrum(view),
        "decisions": [_decision(decided) for decided in view.decisions],
        "outlook": {
            "phase": told.phase,
            "meaning": told.meaning,
            "lines": [{"if": condition, "then": answer} for condition, answer in told.lines],
        },
    }


def _layers(columns: Sequence[Column]) -> dict[str, Any]:
    names = columns[-1].values if columns else ()
    return {
        "steps": [column.step for column in columns],
        **{name: [column.values[name].tolist() for column in columns] for name in names},
    }


def _spectrum(view: RunView) -> dict[str, Any] | None:
    spectrum = view.spectrum
    if spectrum is None:
        return None
    return {
        "step": spectrum.step,
        "layers": spectrum.labels,
        "eigenvalues": [list(zip(flat[::2], flat[1::2], strict=True)) for flat in spectrum.eigenvalues],
        "informative": spectrum.informative,
        "reason": spectrum.reason,
    }


def _decision(decided: DecisionView) -> dict[str, Any]:
    return {
        "step": decided.step,
        "time": decided.time,
        "phase": decided.phase,
        "reason": decided.reason,
        "risk": decided.risk,
        "commands": [
            {
                "id": order.command.id,
                "kind": order.command.kind,
                "lr_scale": order.command.lr_scale,
                "kss_alpha": None if order.command.kss is None else order.command.kss.alpha,
                "outcome": order.outcome,
                "step": order.step,
                "detail": order.detail,
            }
            for order in decided.orders
        ],
    }
