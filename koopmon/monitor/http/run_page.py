"""The page of one run."""

from __future__ import annotations

from koopmon.config import PolicyConfig
from koopmon.monitor.http import page
from koopmon.monitor.http.policy_preview import preview
from koopmon.monitor.http.runs_page import level
from koopmon.views import eigenvalue_plot, heatmap, svg_charts
from koopmon.views.html import Child, Markup, join, tag
from koopmon.views.run_view import QUANTITIES, SCALARS, CommandView, DecisionView, RunView
from koopmon.views.svg_charts import decimal, number

ROWS = 30
"""Maximum number of rows of the risk table."""


def render(root: str, view: RunView, now: float, config: PolicyConfig, *, quantity: str) -> str:
    """Return the document. `quantity`, one of QUANTITIES, selects the heatmap; `now` is Unix seconds."""
    main = join(
        tag("h1", view.name, class_="name"),
        tag("section", _summary(view, now, config), id="summary", data_live=True, aria_label="Now", class_="summary"),
        tag(
            "div",
            page.card("risk", "Risk", *_risk(view, config), kind="wide"),
            page.card("next", "What the policy would do next", _outlook(view)),
            page.card("depth", "Layers over steps", *_heatmap(view, quantity), kind="wide"),
            page.card("eigenvalues", "Eigenvalues", *_eigenvalues(view)),
            page.card("training", "Training", *_training(view), kind="wide"),
            page.card("agents", "Agents", *_agents(view)),
            page.card("decisions", "Decisions", _decisions(view), kind="full"),
            class_="grid",
        ),
    )
    crumbs = tag("ol", tag("li", tag("a", "Runs", href=root or "./")), tag("li", view.name, aria_current="page"))
    title = f"risk {decimal(_risk_of(view))} · {view.name} · koopmon"
    address = page.run_address("", view.name).removeprefix("runs/")
    return page.page(root, title, main, events=f"api/v1/events?run={address}", crumbs=crumbs)


def _risk_of(view: RunView) -> float | None:
    return None if view.latest is None else view.latest.risk


def _summary(view: RunView, now: float, config: PolicyConfig) -> Markup:
    latest, risk = view.latest, _risk_of(view)
    sizes = ((view.num_layers, "layers"), (view.width, "wide"))
    return page.facts(
        [
            ("State", page.state(view.state)),
            ("Risk", tag("span", decimal(risk), class_=level(risk, config))),
            ("Forecast", decimal(None if latest is None else latest.forecast)),
            ("Step", f"{view.step:,}"),
            ("Rate scale", number(view.lr_scale)),
            ("KSS alpha", number(view.kss_alpha)),
            ("Adapter", view.adapter or "–"),
            ("Model", ", ".join(f"{count} {word}" for count, word in sizes if count) or "–"),
            ("Seen", page.moment(view.last_heard, now)),
        ]
    )


def _risk(view: RunView, config: PolicyConfig) -> tuple[Child, ...]:
    policy = config if view.standing is None else view.standing.policy
    levels = (("severe", policy.severe_risk), ("act", policy.act_risk), ("calm below", policy.release_risk))
    kinds = (("risk", "risk"), ("forecast", "forecast, which only warns"), ("command", "command, filled when in force"))
    key = tag("ul", *(tag("li", tag("span", class_=f"key {kind}"), words) for kind, words in kinds), class_="keys")
    rows: list[tuple[Child, ...]] = [
        (
            f"{point.step:,}",
            decimal(point.risk),
            decimal(point.forecast),
            *(number(getattr(point.training, name), 4) for name in SCALARS),
        )
        for point in view.points[: -ROWS - 1 : -1]
    ]
    heads = ("Step", "Risk", "Forecast", *SCALARS.values())
    behind = page.table("risk-table", f"The last {len(rows)} snapshots, the newest first", heads, rows)
    return (
        key,
        svg_charts.risk_chart(view.points, view.decisions, levels),
        page.details("risk-values", "Values", behind),
    )


def _outlook(view: RunView) -> Markup:
    told = preview(view)
    lines = [tag("div", tag("dt", condition), tag("dd", answer)) for condition, answer in told.lines]
    phase = tag("p", tag("strong", told.phase.replace("_", " "), class_="phase"), f". {told.meaning}")
    return join(phase, tag("dl", *lines, class_="conditions"))


def _eigenvalues(view: RunView) -> tuple[Child, ...]:
    spectrum = view.spectrum
    if spectrum is None:
        return (tag("p", "No profile yet.", class_="quiet"),)
    column, rows = view.columns[-1] if view.columns else None, list[tuple[Child, ...]]()
    if column is not None and len(column.values["spectral_radius"]) == len(spectrum.labels):
        rows = [
            (label, *(number(column.values[name][row]) for name in QUANTITIES))
            for row, label in enumerate(spectrum.labels)
        ]
    text = f"Step {spectrum.step:,}. In the ring, modulus 0.90 to 1.05, a layer keeps; beyond it, it expands."
    doubt = None if spectrum.informative else tag("p", f"Not informative: {spectrum.reason}", class_="warning")
    heads = ("Layer", *(name.capitalize() for name in QUANTITIES.values()))
    table = page.table("layer-table", f"Every layer at step {spectrum.step}", heads, rows)
    shown = tag("div", eigenvalue_plot.circle(spectrum), eigenvalue_plot.depth_legend(spectrum.labels), class_="plane")
    words = tag("p", text, class_="quiet")
    return doubt, shown, words, page.details("layer-values", "Values by layer", table) if rows else None


def _heatmap(view: RunView, quantity: str) -> tuple[Child, ...]:
    options = [tag("option", words, value=name, selected=name == quantity) for name, words in QUANTITIES.items()]
    form = tag(
        "form",
        tag("label", "Show ", tag("select", *options, name="show", id="show")),
        tag("button", "Show", type="submit", id="show-button"),
        method="get",
        class_="choice",
    )
    if not view.columns:
        return form, tag("p", "No profile yet.", class_="quiet")
    url, width, height = heatmap.picture(view.columns, quantity)
    low, high = heatmap.scale_of(view.columns, quantity)
    first, last = view.columns[0].step, view.columns[-1].step
    newest = view.columns[-1].values[quantity]
    labels = view.spectrum.labels if view.spectrum is not None else ("0", str(height - 1))
    said = (
        f"{QUANTITIES[quantity].capitalize()} of {height} layers in {width} snapshots, step {first} to {last}."
        f" At the last one: mean {number(sum(newest) / len(newest))}, highest {number(max(newest))}."
    )
    image = tag("img", src=url, alt=said, class_="heat")
    frame = (tag("span", f"layer {labels[-1]}"), image, tag("span", f"layer {labels[0]}", class_="bottom"))
    ends = tag("div", tag("span", f"step {first:,}"), tag("span", f"step {last:,}"), class_="ends")
    caption = tag(
        "figcaption",
        tag("span", f"{low:g}"),
        tag("img", src=heatmap.legend(), alt="from dark to bright, to", class_="ramp"),
        tag("span", f"{high:.3g}" + (" or more" if high == heatmap.MAX_RADIUS else "")),
        tag("span", "one column for each snapshot", class_="note"),
    )
    return form, tag("figure", tag("div", *frame, class_="heat-frame"), ends, caption)


def _training(view: RunView) -> tuple[Child, ...]:
    loss = svg_charts.small_chart(view.points, lambda point: point.training.loss, "Loss", "loss")
    scale = svg_charts.small_chart(
        view.points, lambda point: point.training.lr_scale, "Learning-rate scale", "scale", unit_scale=True
    )
    return loss, scale


def _agents(view: RunView) -> tuple[Child, ...]:
    health = view.health
    dropped = {reason: count for reason, count in health.dropped.items() if count}
    down = tag("span", "down: no command can be applied", class_="warning")
    overhead = None if health.overhead_ratio is None else f"{100 * health.overhead_ratio:.2f}%"
    pairs: list[tuple[str, Child]] = [
        ("Ranks that speak", f"{health.num_ranks} of {health.world_size}" if health.world_size else "–"),
        ("Host", view.hostname or "–"),
        ("Acts", "yes" if view.acts else "no, watch-only"),
        ("Control", "ready" if health.control_ready else down),
        ("Share of step time", overhead or "–"),
        ("Slowest step", "–" if health.step_seconds is None else f"{number(health.step_seconds)} s"),
        ("Snapshots", f"{view.num_received:,}"),
        ("Taps missing", f"{health.taps_missing:,}"),
        ("Dropped", f"{sum(dropped.values()):,}"),
    ]
    rows = [(reason.replace("_", " "), f"{count:,}") for reason, count in sorted(dropped.items())]
    table = page.table("drop-table", "Dropped snapshots by reason", ("Reason", "Snapshots"), rows) if rows else None
    return page.facts(pairs), table


def _decisions(view: RunView) -> Markup:
    if not view.decisions:
        return tag("p", "None yet.", class_="quiet")
    rows = [tag("li", _decision(decided), class_="decision") for decided in reversed(view.decisions)]
    inner = tag("ol", *rows, class_="decisions")
    return tag("div", inner, class_="scroll", id="log", role="region", aria_label="Log of decisions", tabindex=0)


def _decision(decided: DecisionView) -> Markup:
    orders = tag("ul", *(tag("li", *_order(order)) for order in decided.orders)) if decided.orders else None
    about = f" · {decided.phase.replace('_', ' ')} · risk {decimal(decided.risk)}"
    head = tag("p", tag("strong", f"step {decided.step:,}"), tag("span", about, class_="quiet"))
    return join(head, tag("p", decided.reason), orders)


def _order(order: CommandView) -> tuple[Child, ...]:
    at = "" if order.step is None else f" at step {order.step:,}"
    outcome = tag("span", f"{order.outcome.replace('_', ' ')}{at}", class_=f"outcome {order.outcome}")
    return f"{svg_charts.order_words(order)} ", outcome, f" {order.detail}" if order.detail else None
