"""Tables of the report page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from koopmon.report.markup import Child, Markup, tag
from koopmon.report.pictures import TITLES
from koopmon.views.run_view import SCALARS
from koopmon.views.spectra import WORDS

if TYPE_CHECKING:
    from koopmon.report.run_report import Launch, RunReport
    from koopmon.views.action_effects import RecordedCommand, RecordedDecision
    from koopmon.views.spectra import Heatmap

MAX_ROWS = 300
"""Maximum number of rows of one table on the page; `--json` contains all rows."""
MAX_LAYERS = 64
TONES = {"helped": "good", "did not help": "bad", "not enough": "warn"}
WORDY = frozenset({"reason", "why", "why, at first", "the detector's words", "adapter's wishes"})
SHORT = frozenset({"when", "phase", "command", "what", "verdict", "snapshot", "steps"})


def number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.{digits}g}"


def moment(seconds: float) -> str:
    """Format a Unix time in UTC."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, OSError, ValueError):
        return "-"


def highlights(facts: RunReport) -> Markup:
    """Table of the first snapshot, the one with the highest risk, and the last."""
    points = facts.points
    worst = max(points, key=lambda point: point.risk)
    chosen = {"first": points[0], "highest risk": worst, "last": points[-1]}
    scalars = [f"#{name.lower()}" for name in SCALARS.values()]
    return _table(
        "The timeline in numbers",
        ("snapshot", "#step", "#risk", "#forecast", *scalars, "the detector's words"),
        (
            (
                name,
                str(point.step),
                f"{point.risk:.2f}",
                "-" if point.forecast is None else f"{point.forecast:.2f}",
                *(number(getattr(point.training, name)) for name in SCALARS),
                point.reason,
            )
            for name, point in chosen.items()
        ),
    )


def episodes(facts: RunReport) -> Markup:
    """Table of the periods of high risk."""
    several = len(facts.launches) > 1
    return _table(
        "When the risk rose",
        (*(("launch",) if several else ()), "#from step", "#to step", "#highest", "#at step", "why, at first"),
        (
            (
                *((each.incarnation,) if several else ()),
                str(each.first_step),
                "-" if each.last_step is None else str(each.last_step),
                f"{each.peak:.2f}",
                str(each.peak_step),
                each.reason,
            )
            for each in facts.episodes
        ),
    )


def effects(facts: RunReport) -> Markup | None:
    """Table of the applied brakes with risk and loss before and after; None without any."""
    braked = [action for action in facts.actions if action.effect is not None]
    if not braked:
        return None
    return _table(
        "Whether it helped",
        ("#step", "verdict", "what", "#risk, and after", "#loss, and after", "#snapshots, and after", "why"),
        (_effect(action) for action in braked),
    )


def _effect(action: RecordedCommand) -> Sequence[Child]:
    effect = action.effect
    assert effect is not None, "only actions with an effect are listed"
    after = "-" if effect.risk_after is None else f"{effect.risk_after:.2f}"
    return (
        number(action.step),
        tag("span", effect.verdict, class_=TONES.get(effect.verdict)),
        action.what,
        f"{effect.risk_before:.2f} → {after}",
        f"{number(effect.loss_before)} → {number(effect.loss_after)}",
        f"{effect.num_before}, {effect.num_after}",
        effect.why,
    )


def decisions(facts: RunReport) -> Markup:
    """Table of all decisions with one row per command."""
    return _table(
        "Every decision",
        ("#step", "when", "phase", "#risk", "command", "outcome", "#in force at", "#delay, steps", "reason"),
        (row for decision in facts.decisions for row in _decision(decision)),
    )


def _decision(decision: RecordedDecision) -> Iterable[Sequence[Child]]:
    first = (str(decision.step), moment(decision.time)[11:19], decision.phase, f"{decision.risk:.2f}")
    if not decision.actions:
        yield (*first, "none", "-", "-", "-", decision.reason)
    for action in decision.actions:
        outcome = "not sent" if action.outcome == "dry_run" else action.outcome
        yield (
            *first,
            action.what,
            f"{outcome}: {action.detail}" if action.detail else outcome,
            number(action.step if action.outcome == "applied" else None),
            number(action.delay_steps),
            action.reason,
        )


def spectra(facts: RunReport) -> Markup:
    """Table of the pictured spectra: means of the masses over layers, and the largest spectral radius."""
    return _table(
        "The spectra in numbers",
        ("snapshot", "#step", "#risk", "#near-unit mass", "#expansive mass", "#largest radius", "#tokens"),
        (
            (
                TITLES[each.name],
                str(each.step),
                "-" if each.risk is None else f"{each.risk:.2f}",
                f"{each.near_unit_mass:.2f}",
                f"{each.expansive_mass:.2f}",
                number(each.spectral_radius),
                str(each.num_samples),
            )
            for each in facts.spectra
        ),
    )


def layers(heatmap: Heatmap) -> Markup:
    """Table of all layers at the first and the last column of the heatmaps."""
    names = tuple(heatmap.values)
    shown = range(min(len(heatmap.values[names[0]]), MAX_LAYERS))
    steps = f"step {heatmap.steps[0]} → {heatmap.steps[-1]}"

    def ends(name: str, layer: int) -> str:
        row = heatmap.values[name][layer]
        return f"{number(row[0], 2)} → {number(row[-1], 2)}"

    table = _table(
        f"Layers, {steps}",
        ("#layer", *(f"#{WORDS[name]}" for name in names)),
        ((str(layer), *(ends(name, layer) for name in names)) for layer in shown),
    )
    return tag("details", tag("summary", f"The layers in numbers, {steps}"), table)


def launches(facts: RunReport) -> Markup:
    """Table of the incarnations with the hello of rank 0."""
    columns = ("launch", "began", "ended", "steps", "#snapshots", "model", "ranks", "acts", "versions")
    return _table("Launches", (*columns, "adapter's wishes"), (_launch(each) for each in facts.launches))


def _launch(launch: Launch) -> Sequence[Child]:
    hello = launch.hello or {}
    ended = "-" if launch.ended is None else f"{moment(launch.ended)}: {launch.end_reason or 'no reason given'}"
    model = f"{hello['adapter']}, {hello['num_layers']} layers, width {hello['width']}" if hello else "never said hello"
    ranks = f"{hello['world_size']}, {hello['num_senders']} send; {hello['hostname']}" if hello else "-"
    versions = f"koopmon {hello['koopmon_version']}, torch {hello['torch_version']}" if hello else "-"
    wishes = [f"{name} = {value:g}" for name, value in hello.get("thresholds", {}).items()]
    wishes += [f"kss.{name} = {value:g}" for name, value in (hello.get("kss") or {}).items()]
    return (
        tag("code", launch.incarnation),
        moment(launch.started),
        ended,
        "-" if launch.first_step is None else f"{launch.first_step} to {launch.last_step}",
        str(launch.num_snapshots),
        model,
        ranks,
        "-" if not hello else "yes" if hello["acts"] else "no, watch-only",
        versions,
        ", ".join(wishes) or "none",
    )


def _kind(title: str) -> str | None:
    return "n" if title.startswith("#") else "why" if title in WORDY else "short" if title in SHORT else None


def _table(name: str, columns: Sequence[str], rows: Iterable[Sequence[Child]]) -> Markup:
    """Table in a region with its own scroll bar; columns whose names begin with # hold numbers."""
    given = list(rows)
    kinds = [_kind(title) for title in columns]
    head = [tag("th", title.lstrip("#"), scope="col", class_=kind) for title, kind in zip(columns, kinds, strict=True)]
    body = [
        tag("tr", *(tag("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True)))
        for row in given[:MAX_ROWS]
    ]
    more = f"{len(given) - MAX_ROWS} more rows are in the data of --json." if len(given) > MAX_ROWS else ""
    table = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *body))
    scrolling = tag("div", table, class_="scroll", tabindex="0", role="region", aria_label=f"Table: {name}")
    return Markup(scrolling + (tag("p", more, class_="note") if more else ""))
