"""Data of the pages: the names in docs/live-page.md, with values that JSON can represent."""

from __future__ import annotations

import json
import math
from array import array
from pathlib import Path

import msgspec

from koopmon.monitor.http import json_api
from koopmon.views.run_view import CommandView, DecisionView, RunView
from koopmon.views.spectra import QUANTITIES, Column, Spectrum
from tests.factories import INCARNATION, command, point

PAGE = (Path(__file__).parents[3] / "docs" / "live-page.md").read_text(encoding="utf-8")
DECISION = DecisionView(
    incarnation=INCARNATION,
    step=5,
    time=1.0,
    phase="acting",
    reason="high",
    risk=0.9,
    commands=(CommandView(command=command(1), outcome="applied", step=6),),
)
VIEW = RunView(
    name="job",
    incarnation=INCARNATION,
    points=(point(1, loss=math.inf, grad_norm=math.nan), point(2, risk=0.5, forecast=0.25)),
    columns=(Column(2, {name: array("f", [0.5, math.nan]) for name in QUANTITIES}),),
    spectrum=Spectrum(
        step=2,
        labels=("0", "1"),
        eigenvalues=(array("f", [1.0, 0.5]), array("f")),
        num_samples=8,
        informative=True,
        reason="",
    ),
    decisions=(DECISION,),
)


def test_a_summary_is_of_the_last_snapshot_and_the_last_decision() -> None:
    told = json_api.summary(VIEW)
    assert (told["run"], told["risk"], told["forecast"], told["last_heard"]) == ("job", 0.5, 0.25, None)
    assert told["last_decision"] == {"step": 5, "phase": "acting", "reason": "high"}
    nothing = json_api.summary(RunView(name="new", incarnation=INCARNATION))
    assert (nothing["risk"], nothing["forecast"], nothing["last_decision"]) == (None, None, None)
    assert json_api.runs([VIEW], 3.0)["runs"] == [told]


def test_a_run_in_full_is_json_without_numbers_that_are_not_finite() -> None:
    told = json.loads(msgspec.json.encode(json_api.run(VIEW, 3.0)))
    assert [point["loss"] for point in told["points"]] == [None, None]
    assert told["points"][0]["grad_norm"] is None
    assert told["layers"]["steps"] == [2]
    assert told["layers"]["spectral_radius"] == [[0.5, None]]
    assert told["spectrum"]["eigenvalues"] == [[[1.0, 0.5]], []]
    (sent,) = told["decisions"][0]["commands"]
    assert (sent["kind"], sent["lr_scale"], sent["kss_alpha"], sent["step"]) == ("set_lr_scale", 0.5, None, 6)


def test_every_name_is_in_the_documentation() -> None:
    told = json_api.run(VIEW, 3.0)
    names = {*told, *told["points"][0], *told["layers"], *told["spectrum"], *told["health"], *told["decisions"][0]}
    names |= {*told["decisions"][0]["commands"][0], *told["outlook"], *told["model"], *told["last_decision"]}
    assert {name for name in names if f"`{name}`" not in PAGE} == set()
