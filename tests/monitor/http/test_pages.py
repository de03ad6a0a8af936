"""The pages as documents, of runs in every state. tests/monitor/http/test_routes.py requests them over sockets."""

from __future__ import annotations

import re
from array import array
from typing import Any

import pytest

from koopmon.config import PolicyConfig
from koopmon.monitor.http.pages import alerts_page, root_of, run_page, runs_page
from koopmon.telemetry.alerts import ALERTS
from koopmon.views.run_view import AgentHealth, CommandView, DecisionView, RunView
from koopmon.views.spectra import QUANTITIES, Column, Spectrum
from tests.factories import INCARNATION, command, point
from tests.reading import Reading

POLICY = PolicyConfig()
NOW = 1_700_000_000.0


def view(name: str = "job", **fields: Any) -> RunView:
    return RunView(name=name, incarnation=INCARNATION, **{"state": "running", **fields})


def runs(*views: RunView, **options: Any) -> Reading:
    return Reading(runs_page("", views, NOW, POLICY, **options))


def shown(found: RunView, quantity: str = "near_unit_mass") -> Reading:
    return Reading(run_page("../", found, NOW, POLICY, quantity=quantity))


def test_running_runs_come_first_in_their_order_of_arrival_then_the_latest() -> None:
    found = runs(
        view("old", state="ended", last_heard=1.0),
        view("second", last_heard=9.0),
        view("late", state="ended", last_heard=5.0),
        view("first", last_heard=99.0),
        view("lost", state="vanished"),
        view("recorded", state="recorded"),
    )
    rows = [link for link in found.links() if link and link.startswith("runs/")]
    assert rows == [f"runs/{name}" for name in ("second", "first", "lost", "late", "old", "recorded")]


def test_runs_are_counted_and_the_title_says_what_matters() -> None:
    page = runs_page(
        "",
        [
            view("high", points=(point(1, risk=0.4),)),
            view("held", lr_scale=0.5),
            view("kss", kss_alpha=0.1),
            view("over", state="ended", points=(point(1, risk=1.0),), lr_scale=0.5),
        ],
        NOW,
        POLICY,
    )
    assert re.findall(r'<div class="([^"]*)"><dt>([^<]*)</dt><dd>(\d+)</dd>', page) == [
        ("tile", "Running", "3"),
        ("tile bad", "At risk", "1"),
        ("tile held", "Slowed down", "2"),
        ("tile", "Finished", "1"),
    ]
    assert "<title>1 at risk · koopmon</title>" in page
    assert "<title>1 running · koopmon</title>" in runs_page("", [view()], NOW, POLICY)


@pytest.mark.parametrize(
    ("risk", "level"), [(0.19, "low"), (0.2, "raised"), (0.39, "raised"), (0.4, "high"), (0.8, "severe"), (None, "low")]
)
def test_the_policy_s_thresholds_colour_a_risk(risk: float | None, level: str) -> None:
    points = () if risk is None else (point(1, risk=risk),)
    for page in (runs(view(points=points)), shown(view(points=points))):
        assert f"level {level}" in [attributes.get("class") for attributes in page.of("span")]


def test_runs_without_room_are_counted_and_none_says_how_to_start_one() -> None:
    assert "3 earlier runs are not shown" in runs(view(), num_hidden=3).text
    assert "not shown" not in runs(view()).text
    text = runs().text
    assert "koopmon run --monitor ENDPOINT -- torchrun train.py" in text
    assert "koopmon runs lists them" in text, "a job with a monitor of its own never appears here"


def test_the_last_decision_and_the_time_since_the_last_message() -> None:
    decision = DecisionView(incarnation=INCARNATION, step=1234, time=0.0, phase="acting", reason="high risk", risk=0.9)
    found = runs(view(decisions=(decision,), last_heard=NOW - 120.0), view("silent"))
    assert "step 1,234: high risk" in found.text
    assert [attributes["datetime"] for attributes in found.of("time")] == ["2023-11-14T22:11:20Z"]
    assert "2 min ago" in found.text


def test_a_run_of_which_nothing_is_known_yet_has_a_page() -> None:
    found = shown(view())
    for words in (
        "No profile yet.",
        "None yet.",
        "Loss: not known.",
        "Known once this monitor has judged",
        "risk – ·",
    ):
        assert words in found.text
    assert found.of("figure") == []


def test_a_recorded_run_claims_nothing_of_its_agents() -> None:
    """The history has no counts of the agents: zeros and "ready" would be wrong."""
    agents = shown(view(state="recorded", points=(point(7),))).text.split("Host")[1].split("The share of")[0]
    assert "Snapshots – Taps missing – Dropped –" in agents
    assert "Acts –" in agents
    assert "ready" not in agents
    assert "Snapshots 0" in shown(view()).text


def test_what_is_known_of_a_run_is_shown() -> None:
    values = {name: array("f", [0.25, 0.75]) for name in QUANTITIES}
    spectrum = Spectrum(
        step=7,
        labels=("0", "1"),
        eigenvalues=(array("f", [1.0, 0.0]), array("f", [0.5, 0.5])),
        num_samples=64,
        informative=False,
        reason="few tokens",
    )
    commands = (
        CommandView(command=command(1), outcome="refused", step=1234, detail="watch-only"),
        CommandView(command=command(2, kind="set_cadence", cadence_steps=1), outcome="dry_run"),
    )
    decision = DecisionView(
        incarnation=INCARNATION, step=7, time=0.0, phase="backed_off", reason="high", risk=0.9, commands=commands
    )
    found = shown(
        view(
            points=(point(6, loss=2.5), point(7, loss=1.25, grad_norm=0.5)),
            columns=(Column(7, values),),
            spectrum=spectrum,
            decisions=(decision,),
            hostname="node-1",
            num_layers=2,
            width=64,
            health=AgentHealth(
                num_ranks=1,
                world_size=2,
                overhead_ratio=0.004,
                control_ready=False,
                dropped={"queue_full": 1200, "late": 0},
            ),
        ),
        "spectral_radius",
    )
    for words in (
        "Not informative: few tokens",
        "2 layers, 64 wide",
        "node-1",
        "1 of 2",
        "0.4%",
        "down: no command can be applied",
        "queue full 1,200",
        "backed off · risk 0.90",
        "learning rate × 0.5 refused at step 1,234 watch-only",
        "a snapshot every step dry run",
        "Step Risk Forecast Loss LR in force Gradient norm LR scale KSS alpha Held layers Update RMS "
        "Log-partition 7 0.10 – 1.25",
        "Layer Near-unit mass Expansive mass Contractive mass Spectral radius 0 0.25 0.25",
        "Loss 1.25 from 1.25 to 2.5",
    ):
        assert words in found.text, words
    assert "late" not in found.text.split("Dropped snapshots by reason")[1].split("Decisions")[0]
    (heat,) = [attributes for attributes in found.of("img") if attributes["class"] == "heat"]
    assert (heat["alt"] or "").startswith("Spectral radius of 2 layers")
    assert [each["value"] for each in found.of("option") if "selected" in each] == ["spectral_radius"]


def test_a_table_of_layers_of_another_snapshot_is_left_out() -> None:
    spectrum = Spectrum(step=7, labels=("0",), eigenvalues=(array("f"),), num_samples=1, informative=True, reason="")
    two = Column(8, {name: array("f", [0.1, 0.2]) for name in QUANTITIES})
    assert "Values by layer" not in shown(view(spectrum=spectrum, columns=(two,))).text


def test_every_alert_has_its_runbook() -> None:
    page = alerts_page()
    found = Reading(page)
    assert [f"#{alert.name}" for alert in ALERTS] == [link for link in found.links() if link and link[0] == "#"][1:]
    text = "".join(found.text.split())
    for alert in ALERTS:
        for told in (alert.means, alert.look, alert.do, alert.expr):
            assert "".join(told.replace("`", "").split()) in text
    assert "<code>[policy] act_risk</code>" in page
    assert "{{" not in page


def test_the_root_follows_from_the_slashes_of_the_path() -> None:
    assert [root_of(path) for path in (b"/", b"/runs/a%2Fb", b"/runs/a/b")] == ["", "../", "../../"]
