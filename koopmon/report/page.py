"""HTML page of a run report: one file without scripts or external resources, readable without its pictures."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from koopmon import __version__
from koopmon.report import tables
from koopmon.report.markup import Child, Markup, join, tag
from koopmon.report.narrative import headline, helped
from koopmon.report.pictures import Picture
from koopmon.report.style import STYLE

if TYPE_CHECKING:
    from koopmon.report.run_report import RunReport

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
STATES = {
    "running": "goes on",
    "unheard": "last heard of a while ago",
    "vanished": "fell silent",
    "ended": "ended",
}
NARROW = "(max-width: 40rem)"


def page(facts: RunReport, pictures: Mapping[str, Picture], without: str = "") -> str:
    """Return the whole document. `without` gives the reason if there are no pictures."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", **{"http-equiv": "Content-Security-Policy"}, content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{facts.run}: koopmon report"),
        tag("style", Markup(STYLE)),
    )
    sections = (
        _glance(facts),
        _timeline(facts, pictures, without),
        _episodes(facts),
        _actions(facts),
        _spectra(facts, pictures),
        _layers(facts, pictures),
        _decisions(facts),
        _launches(facts),
        _agent(facts),
        _again(facts),
    )
    body = tag("body", _header(facts), tag("main", *sections), _footer(facts))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _header(facts: RunReport) -> Markup:
    mark = "--bad" if facts.not_finite_step is not None else "--warn" if facts.episodes else "--good"
    return tag(
        "header",
        tag("p", "koopmon report", class_="kicker"),
        tag("h1", facts.run),
        tag("p", tag("span", STATES[facts.state], class_="state"), class_="note"),
        tag("p", headline(facts), class_="headline", style=f"--mark:var({mark})"),
    )


def _glance(facts: RunReport) -> Markup:
    summary, agent = facts.summary, facts.agent
    highest = "-" if summary.max_risk is None else f"{summary.max_risk:.2f} at step {summary.max_risk_step}"
    lowered = f"{summary.num_backoffs} ×, to {summary.min_lr_scale:.3g}" if summary.num_backoffs else "never"
    cost = "-" if agent.max_overhead_ratio is None else f"{100 * agent.max_overhead_ratio:.2g}% at most"
    told = {
        "Last step": tables.number(summary.last_step),
        "Snapshots": str(summary.num_snapshots),
        "Highest risk": highest,
        "Rate lowered": lowered,
        "KSS raised": f"{summary.num_kss} ×, to α {summary.max_kss_alpha:.3g}" if summary.num_kss else "never",
        "Launches": str(len(facts.launches)),
        "First to last word": _span(facts.last_seen - facts.first_seen),
        "Cost in step time": cost,
    }
    return _section("glance", "At a glance", _facts(told))


def _timeline(facts: RunReport, pictures: Mapping[str, Picture], without: str) -> Markup:
    if not facts.points:
        why = (
            "No training process has said hello to this monitor for this run."
            if not any(launch.hello for launch in facts.launches)
            else "The ranks said hello, and no snapshot of theirs was judged."
        )
        doctor = tag("p", tag("code", f"koopmon doctor --run {shlex.quote(facts.run)}"), " looks for why.")
        return _section("timeline", "Over time", tag("p", why), doctor)
    caption = (
        f"Dashed: the risks at which the policy acts ({facts.act_risk:.2f}) and acts hard ({facts.severe_risk:.2f}), by"
        " this report's configuration. Dotted: commands that all ranks applied, orange for the learning rate, green for"
        " KSS. Earlier launches are paler."
    )
    return _section(
        "timeline",
        "Over time",
        _figure(pictures.get("timeline"), caption),
        tag("p", without, class_="note") if without else None,
        tables.highlights(facts),
    )


def _episodes(facts: RunReport) -> Markup:
    if not facts.episodes:
        words = f"It never did: no snapshot had a risk of {facts.act_risk:.2f} or more."
        return _section("risk", "When the risk rose", tag("p", words if facts.points else "No risk is known."))
    span = f"From a risk of {facts.act_risk:.2f} until it is below {facts.release_risk:.2f} again."
    return _section("risk", "When the risk rose", tag("p", span, class_="note"), tables.episodes(facts))


def _actions(facts: RunReport) -> Markup:
    words = helped(facts) if facts.decisions else "Nothing was decided."
    return _section("done", "What was done, and whether it helped", tag("p", words), tables.effects(facts))


def _spectra(facts: RunReport, pictures: Mapping[str, Picture]) -> Markup:
    if not facts.spectra:
        return _section("spectra", "The spectra", tag("p", "No snapshot was profiled, so there are none."))
    caption = (
        "Each dot is an eigenvalue of the linear map that carries one layer's states to the next, coloured by depth. In"
        " the yellow band (0.90 to 1.05) states keep their size; outside the circle they grow with every layer."
    )
    return _section("spectra", "The spectra", _figure(pictures.get("spectra"), caption), tables.spectra(facts))


def _layers(facts: RunReport, pictures: Mapping[str, Picture]) -> Markup:
    if facts.heatmap is None:
        return Markup("")
    several = f", of launch {facts.heatmap.incarnation}" if len(facts.launches) > 1 else ""
    caption = f"Each row is a layer, each column a snapshot{several}."
    return _section("layers", "Layer by step", _figure(pictures.get("layers"), caption), tables.layers(facts.heatmap))


def _decisions(facts: RunReport) -> Markup:
    if not facts.decisions:
        return Markup("")
    note = "Times of day in UTC. A command is answered by rank 0 once all ranks have applied it at one step."
    return _section("decisions", "Every decision", tables.decisions(facts), tag("p", note, class_="note"))


def _launches(facts: RunReport) -> Markup:
    note = (
        "The monitor's configuration is not kept in a history; thresholds and KSS are those that the model's adapter"
        " asked for."
    )
    return _section("launches", "Launches, sizes and versions", tables.launches(facts), tag("p", note, class_="note"))


def _agent(facts: RunReport) -> Markup:
    agent = facts.agent
    told = {
        "Mean share of step time": _known(agent.mean_overhead_ratio, lambda ratio: f"{100 * ratio:.2g}%"),
        "Median step": _known(agent.median_step_seconds, lambda seconds: f"{seconds:.3g} s"),
        "Time to profile, in the monitor": _known(agent.mean_profile_seconds, lambda seconds: f"{seconds:.2g} s"),
        "Snapshots without every rank": str(agent.num_incomplete),
        "Snapshots not finite": str(agent.num_not_finite),
        "Snapshots not informative": str(agent.num_not_informative),
    }
    note = f"From {agent.num_heartbeats} recorded heartbeats. Snapshots that were dropped are counted in the metric "
    return _section(
        "agent",
        "What watching cost, and what was lost",
        _facts(told),
        tag("p", note, tag("code", "koopmon_snapshots_dropped_total"), ", not in a history.", class_="note"),
    )


def _again(facts: RunReport) -> Markup:
    run, store = shlex.quote(facts.run), shlex.quote(facts.store)
    lines = (
        f"koopmon report {run} --store {store} --json",
        f"koopmon replay {run} --store {store} --policy lr",
        f"koopmon replay {run} --store {store} --policy careful.toml",
    )
    return _section(
        "again",
        "To look further",
        tag("pre", *(Markup(f"{join(line)}\n") for line in lines), tabindex="0"),
        tag("p", "A replay judges the recorded snapshots again under another policy.", class_="note"),
    )


def _footer(facts: RunReport) -> Markup:
    at = tables.moment(facts.written)
    return tag("footer", f"Written {at} by koopmon {__version__} from {facts.store}.")


def _section(name: str, title: str, *children: Child) -> Markup:
    return tag("section", tag("h2", title, id=name), *children, aria_labelledby=name)


def _facts(told: Mapping[str, str]) -> Markup:
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in told.items()), class_="facts")


def _figure(picture: Picture | None, caption: str) -> Markup | None:
    if picture is None:
        return None
    image = tag("img", src=picture.wide, alt=picture.alternative)
    narrow = tag("source", media=NARROW, srcset=picture.narrow)
    return tag("figure", tag("picture", narrow, image), tag("figcaption", caption))


def _known(value: float | None, words: Callable[[float], str]) -> str:
    return "-" if value is None else words(value)


def _span(seconds: float) -> str:
    for size, unit in ((86_400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{max(seconds, 0.0):.3g} s"
