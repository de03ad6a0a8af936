"""Positions of lines, marks and labels in the charts."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from koopmon.config import PolicyConfig
from koopmon.views.run_view import SCALARS, CommandView, DecisionView, Scalar
from koopmon.views.spectra import Spectrum
from koopmon.views.svg_charts import (
    EDGE,
    MAX_MARKS,
    MAX_POINTS,
    RISK_HEIGHT,
    SMALL_HEIGHT,
    eigenvalue_plot,
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
        "severe 0.8",
        "act 0.4",
        "calm below 0.2",
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
    assert len(list(read(risk_chart(points, many, POLICY)).iter("title"))) == MAX_MARKS


def test_each_launch_has_a_line_and_a_cross_marks_what_was_not_finite() -> None:
    points = [point(1, "aaaaaaaa"), point(9, "aaaaaaaa"), point(5, "bbbbbbbb"), point(6, "bbbbbbbb", loss=math.inf)]
    drawn = read(risk_chart(points, [], POLICY))
    assert [each.attrib["class"] for each in drawn.iter("polyline")] == ["line risk earlier", "line risk"]
    (broken,) = [each for each in drawn.iter("g") if each.attrib.get("class") == "broken"]
    assert broken.find("title").text == "step 6: not finite"  # type: ignore[union-attr]


def test_nothing_judged_yet_is_said() -> None:
    (chart,) = read(risk_chart([], [], POLICY)).findall("svg")
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
    assert "No loss is known." in scalar_chart([point(1)], SCALAR["loss"])
    assert "No loss is known." in scalar_chart([point(1, loss=math.nan)], SCALAR["loss"])


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
    assert "1 beyond modulus 3 are drawn at the rim." in drawn


def test_the_plotted_modulus_follows_the_largest_within_bounds() -> None:
    assert [plotted_modulus(moduli) for moduli in ([], [0.5], [2.0], [50.0])] == [1.3, 1.3, 2.16, 3.0]
