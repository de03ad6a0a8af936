"""Positions of lines, marks and labels in the charts."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import pytest

from koopmon import views
from koopmon.config import PolicyConfig
from koopmon.risk.band import BandReading
from koopmon.views.run_view import SCALARS, CommandView, DecisionView, LoggedPoint, Scalar
from koopmon.views.spectra import Spectrum
from koopmon.views.svg_charts import (
    EDGE,
    MAX_HINTS,
    MAX_MARKS,
    MAX_POINTS,
    RISK_HEIGHT,
    SMALL_HEIGHT,
    StepAxis,
    eigenvalue_plot,
    logged_charts,
    plotted_modulus,
    risk_chart,
    scalar_chart,
    sparkline,
)
from tests.factories import INCARNATION, command, plain_profile, point

SCALAR = {scalar.name: scalar for scalar in SCALARS}
POLICY = PolicyConfig(severe_risk=0.8, act_risk=0.4, release_risk=0.2)


def read(chart: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<div>{chart}</div>")


def line(element: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in element.attrib["points"].split())]


def decided(step: int, outcome: str, ack: int | None) -> DecisionView:
    found = CommandView(command=command(step), outcome=outcome, step=ack)
    return DecisionView(
        incarnation=INCARNATION, step=step, time=0.0, phase="acting", reason="", risk=0.9, commands=(found,)
    )


def test_the_risk_goes_from_the_bottom_to_the_top_and_from_left_to_right() -> None:
    drawn = read(risk_chart([point(10, risk=0.0), point(20, risk=1.0)], [], POLICY))
    (risk,) = [each for each in drawn.iter("polyline") if each.attrib["class"] == "line risk"]
    assert line(risk) == [(0.0, RISK_HEIGHT - 2), (1000.0, 2.0)]
    assert [each.text for each in drawn.iter("text")] == [
        "1",
        "severe 0.8",
        "act 0.4",
        "calm 0.2",
        "0",
        "step 10",
        "step 15",
        "step 20",
    ]


def test_commands_are_marked_where_they_came_into_force_and_hollow_where_not() -> None:
    points = [point(0), point(100)]
    decisions = [decided(10, "applied", 20), decided(50, "refused", None), decided(500, "applied", 501)]
    drawn = read(risk_chart(points, decisions, POLICY))
    marks = [each for each in drawn.iter("g") if each.attrib.get("class", "").startswith("command")]
    assert [each.attrib["class"] for each in marks] == ["command applied", "command not-applied"]
    assert [each.find("line").attrib["x1"] for each in marks] == ["20.00%", "50.00%"]  # type: ignore[union-attr]
    assert marks[0].find("title").text == "step 20: learning rate × 0.5, applied"  # type: ignore[union-attr]
    many = [decided(step % 100, "applied", step % 100) for step in range(MAX_MARKS + 50)]
    drawn = read(risk_chart(points, many, POLICY))
    assert len([each for each in drawn.iter("g") if each.attrib.get("class", "").startswith("command")]) == MAX_MARKS


def test_each_launch_has_a_line_and_a_cross_marks_what_was_not_finite() -> None:
    points = [point(1, "aaaaaaaa"), point(9, "aaaaaaaa"), point(5, "bbbbbbbb"), point(6, "bbbbbbbb", loss=math.inf)]
    drawn = read(risk_chart(points, [], POLICY))
    assert [each.attrib["class"] for each in drawn.iter("polyline")] == ["line risk earlier", "line risk"]
    (broken,) = [each for each in drawn.iter("g") if each.attrib.get("class") == "broken"]
    assert broken.find("title").text == "step 6: not finite"  # type: ignore[union-attr]


def test_later_launches_are_marked_at_their_first_step() -> None:
    points = [point(0, "aaaaaaaa"), point(100, "aaaaaaaa"), point(40, "bbbbbbbb"), point(60, "bbbbbbbb")]
    for chart in (risk_chart(points, [], POLICY), scalar_chart(points, SCALAR["lr_scale"])):
        (mark,) = [each for each in read(chart).iter("g") if each.attrib.get("class") == "launch"]
        assert mark.find("title").text == "launch 2 from step 40"  # type: ignore[union-attr]
        assert mark.find("line").attrib["x1"] == "40.00%"  # type: ignore[union-attr]


def test_strips_show_the_values_of_a_snapshot_to_the_mouse() -> None:
    points = [point(step, risk=0.25, loss=2.0, learning_rate=0.1, lr_scale=0.5) for step in range(1000)]
    (hints,) = [each for each in read(risk_chart(points, [], POLICY)).iter("g") if each.attrib.get("class") == "hints"]
    strips = hints.findall("rect")
    assert len(strips) <= MAX_HINTS
    assert sum(float(each.attrib["width"].rstrip("%")) for each in strips) == pytest.approx(100.0, abs=1.0)
    title = strips[0].find("title")
    assert title is not None
    assert title.text is not None
    assert title.text.startswith("step 0: risk 0.25, forecast –, loss 2, lr in force 0.05, gradient norm –")


def logged(step: int, value: float, low: float | None = None, high: float | None = None) -> LoggedPoint:
    reading = BandReading(step, value, low, high)
    return LoggedPoint(incarnation=INCARNATION, step=step, readings={"kl": reading})


def test_a_logged_scalar_has_a_line_and_its_band() -> None:
    points = [logged(0, 1.0), logged(5, 2.0, 1.0, 3.0), logged(10, 9.0, 1.0, 3.0), logged(11, math.nan, 1.0, 3.0)]
    (chart,) = logged_charts(points)
    drawn = read(chart)
    (kl,), (band,) = drawn.iter("polyline"), drawn.iter("polygon")
    assert len(line(kl)) == 3
    tops, bottoms = line(band)[:3], line(band)[3:]
    assert {y for _, y in tops} == {y for _, y in tops[:1]}
    assert min(y for _, y in bottoms) > max(y for _, y in tops)
    assert line(kl)[-1][1] < tops[0][1]
    assert "kl <strong>9</strong>" in chart
    assert logged_charts([]) == []


def test_charts_of_one_axis_have_the_same_steps() -> None:
    axis = StepAxis.of([point(10), point(20)], [logged(0, 1.0), logged(40, 2.0)])
    chart = risk_chart([point(10), point(20)], [], POLICY, axis)
    (risk,) = [each for each in read(chart).iter("polyline") if each.attrib["class"] == "line risk"]
    assert [x for x, _ in line(risk)] == [250.0, 500.0]


def test_nothing_judged_yet_is_said() -> None:
    (chart,) = [each for each in read(risk_chart([], [], POLICY)).iter("svg") if each.attrib.get("role") == "img"]
    assert chart.attrib["aria-label"] == "No snapshot was judged yet."
    assert sparkline([point(1)], 0.4) == ""


def test_the_sparkline_shows_the_last_points() -> None:
    drawn = read(sparkline([point(step, risk=0.5) for step in range(300)], 0.5))
    (risk,) = drawn.iter("polyline")
    (level,) = drawn.iter("line")
    assert len(line(risk)) == 120
    assert {y for _, y in line(risk)} == {float(level.attrib["y1"])}


def test_a_scalar_fits_its_chart_and_a_wide_range_is_logarithmic() -> None:
    narrow = scalar_chart([point(1, loss=2.0), point(2, loss=4.0), point(3, loss=3.0)], SCALAR["loss"])
    (drawn,) = read(narrow).iter("polyline")
    (_, low), (_, high), (_, middle) = line(drawn)
    assert low > middle > high
    assert middle == pytest.approx((low + high) / 2, abs=0.1)
    assert "Loss <strong>3</strong>" in narrow
    wide = scalar_chart([point(1, loss=1.0), point(2, loss=100.0), point(3, loss=10.0)], SCALAR["loss"])
    (drawn,) = read(wide).iter("polyline")
    (_, low), (_, high), (_, middle) = line(drawn)
    assert middle == pytest.approx((low + high) / 2, abs=0.1)
    assert "from 1 to 100, logarithmic" in wide
    (flat,) = read(scalar_chart([point(1, loss=2.0), point(2, loss=2.0)], SCALAR["loss"])).iter("polyline")
    assert all(0 < y < SMALL_HEIGHT for _, y in line(flat))


def test_a_long_line_keeps_its_extremes_and_few_points() -> None:
    risks = [0.5] * 50_000
    risks[12_345], risks[30_000] = 1.0, 0.0
    drawn = read(risk_chart([point(step, risk=risk) for step, risk in enumerate(risks)], [], POLICY))
    (risk,) = drawn.iter("polyline")
    assert len(line(risk)) <= MAX_POINTS
    assert {y for _, y in line(risk)} == {2.0, RISK_HEIGHT / 2, RISK_HEIGHT - 2.0}
    assert [x for x, _ in line(risk)] == sorted(x for x, _ in line(risk))


def test_values_whose_difference_overflows_are_drawn() -> None:
    chart = scalar_chart([point(1, loss=-1.7e308), point(2, loss=1.7e308)], SCALAR["loss"])
    assert "nan" not in chart
    assert "inf" not in chart


def test_a_setting_holds_until_the_next_step() -> None:
    drawn = read(scalar_chart([point(0, lr_scale=1.0), point(10, lr_scale=0.5)], SCALAR["lr_scale"]))
    (held,) = drawn.iter("polyline")
    assert [x for x, _ in line(held)] == [0.0, 1000.0, 1000.0]


def test_a_chart_is_left_out_while_nothing_happens_and_says_what_is_not_known() -> None:
    assert scalar_chart([point(1), point(2)], SCALAR["kss_alpha"]) == ""
    assert "polyline" in scalar_chart([point(1), point(2, kss_alpha=0.1)], SCALAR["kss_alpha"])
    assert "Loss: not known." in scalar_chart([point(1)], SCALAR["loss"])
    assert "Loss: not known." in scalar_chart([point(1, loss=math.nan)], SCALAR["loss"])


def test_the_loss_has_the_upper_limit_of_its_band_from_the_twentieth_value_on() -> None:
    losses = [2.0 + 0.1 * (step % 2) for step in range(30)] + [9.0]
    points = [point(step, loss=loss) for step, loss in enumerate(losses)]
    drawn = read(scalar_chart(points, SCALAR["loss"]))
    (course,), (band,) = drawn.iter("polyline"), drawn.iter("polygon")
    *tops, last, first = line(band)
    assert [x for x, _ in tops] == pytest.approx([1000 * step / 30 for step in range(20, 31)], abs=0.06)
    assert last[0] == tops[-1][0]
    assert first[0] == tops[0][0]
    assert last[1] == first[1] > max(y for _, y in line(course)), "the band has no lower limit"
    assert all(y < min(y for _, y in line(course)[:30]) for _, y in tops), "above the losses inside"
    assert line(course)[-1][1] < tops[-1][1], "the last loss is above the band"
    # A launch has a band of its own.
    again = [*points, point(31, incarnation="bbbbbbbb", loss=2.0)]
    assert not list(read(scalar_chart(again, SCALAR["loss"])).iter("polygon"))
    assert not list(read(scalar_chart(points, SCALAR["grad_norm"])).iter("polygon"))


def test_every_chart_has_a_line_with_a_colour() -> None:
    text = (Path(views.__file__).parent / "static" / "views.css").read_text()
    for scalar in SCALARS:
        assert f".line.{scalar.chart}" in text, f"{scalar.name}: a line without a stroke is invisible"


def test_a_new_scalar_needs_one_entry() -> None:
    norm = Scalar(name="grad_norm", title="Gradient norm", chart="loss")
    assert "Gradient norm <strong>2</strong>" in scalar_chart([point(1, grad_norm=2.0)], norm)


def spectrum(*layers: list[tuple[float, float]]) -> Spectrum:
    flat = [[part for pair in pairs for part in pair] for pairs in layers]
    return Spectrum.of(3, plain_profile(*(1.0 for _ in layers), eigenvalues=flat))


def test_eigenvalues_lie_in_the_plane_and_far_ones_on_the_rim() -> None:
    drawn = eigenvalue_plot(spectrum([(1.0, 0.0), (0.0, -1.0)], [(30.0, 40.0)]))
    groups = read(drawn).find(".//g")
    assert groups is not None
    near, far = groups.findall("path")
    scale = EDGE / 3.0
    assert near.attrib["d"] == f"M{scale:.1f},-0.0h0M0.0,{scale:.1f}h0"
    assert far.attrib["d"] == f"M{0.6 * EDGE:.1f},{-0.8 * EDGE:.1f}h0"
    assert (near.attrib["class"], far.attrib["class"]) == ("depth-0", "depth-15")
    assert "2 of 3 in the near-unit ring, 1 beyond it; the largest modulus is 50." in drawn
    assert "At the dashed rim: 1 beyond modulus 3, the largest 50." in drawn


def test_the_plotted_modulus_follows_the_largest_within_bounds() -> None:
    assert [plotted_modulus(moduli) for moduli in ([], [0.5], [2.0], [50.0])] == [1.3, 1.3, 2.16, 3.0]
