"""A real Prometheus and Alertmanager on real monitors and trainings: one that diverges, and the same one guarded."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.alert_lead import WARNING, WIDTH, Pair, lead, left_band
from benchmarks.alert_stack import Stack
from koopmon.grafana.dashboards import dashboards
from koopmon.grafana.rules import prometheus_rules

httpx = pytest.importorskip("httpx")

pytestmark = [
    pytest.mark.timeout(420),
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.needs("prometheus"),
    pytest.mark.needs("prometheus-alertmanager"),
]
SEED = 2
STEPS = 200
SECONDS = 300.0
NEEDED_STEPS = 5


@dataclass(frozen=True, slots=True)
class Scene:
    stack: Stack
    pair: Pair
    began: float


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Both trainings of one seed with all notifications; the stack still runs."""
    if not (shutil.which("prometheus") and shutil.which("prometheus-alertmanager")):
        pytest.skip("needs prometheus and prometheus-alertmanager")
    with Stack(tmp_path_factory.mktemp("stack"), ("observe", "lr")) as stack:
        began = time.time()
        pair = Pair(stack, SEED, steps=STEPS)
        while not pair.settled():
            assert time.time() < began + SECONDS, pair.told()
            time.sleep(0.5)
        yield Scene(stack, pair, began)


def test_the_alert_comes_before_the_loss_leaves_its_band(scene: Scene) -> None:
    steps = scene.pair.alone.steps()
    out = left_band(steps)
    assert out is not None
    warned = scene.stack.heard(scene.pair.alone.name, WARNING, "firing")
    assert warned is not None
    found = lead(steps, warned.at)
    assert found is not None
    assert found >= NEEDED_STEPS, scene.pair.told()
    assert warned.annotations["summary"] == f"{scene.pair.alone.name}: the risk of divergence spiked"
    over = scene.stack.heard(scene.pair.alone.name, WARNING, "resolved")
    assert over is None or over.at > out.at  # without an action, it did not resolve earlier


def test_it_resolves_after_the_guard_acted(scene: Scene) -> None:
    name = scene.pair.guarded.name
    warned = scene.stack.heard(name, WARNING, "firing")
    assert warned is not None
    told = scene.pair.told()["guarded"]
    assert told["acted_at"]
    assert told["resolved_at"] is not None
    assert told["resolved_at"] > min(told["acted_at"])
    assert scene.stack.heard(name, "KoopmonActionTaken", "firing") is not None
    # It survives and learns beyond the step at which the other training's loss left its band.
    steps = scene.pair.guarded.steps()
    moved = left_band(scene.pair.alone.steps())
    assert moved is not None
    assert steps[-1].step > moved.step
    assert steps[-1].loss < WIDTH * steps[0].loss


def test_where_a_notification_leads_there_is_a_runbook(scene: Scene) -> None:
    warned = scene.stack.heard(scene.pair.guarded.name, WARNING, "firing")
    assert warned is not None
    url, _, anchor = warned.annotations["runbook_url"].partition("#")
    page = httpx.get(url, timeout=30.0)
    assert page.status_code == 200
    assert f'id="{anchor}"' in page.text


def filled_in(expr: str, run: str) -> str:
    values = {
        "$run": run,
        "$layer": ".*",
        "$job": ".*",
        "$__interval": "15s",
        "$instance": ".*",
        "$__rate_interval": "15s",
    }
    for name, value in values.items():
        expr = expr.replace(name, value)
    assert "$" not in expr.replace("$1", "")
    return expr


def numbers(result: list[dict[str, Any]]) -> list[float]:
    values = [float(value) for row in result for _, value in row.get("values", [row.get("value")])]
    return [value for value in values if not math.isnan(value)]


LOGGED = re.compile(r"koopmon_(?:logged_value|band_low)\{[^}]*\}")
"""Queries that have an answer only for a script that logs scalars. Their panel also shows the band of the loss."""


def test_every_query_of_every_panel_and_annotation_has_an_answer(scene: Scene) -> None:
    span = {"start": str(scene.began), "end": str(time.time()), "step": "5"}
    empty, asked = [], 0
    for uid, board in dashboards().items():
        run = scene.pair.guarded.name if uid == "koopmon-run" else ".*"
        queries = [(panel["title"], target) for panel in board["panels"] for target in panel.get("targets", ())]
        queries += [(each["name"], {"expr": each["expr"], "instant": False}) for each in board["annotations"]["list"]]
        for title, target in queries:
            asked += 1
            expr = filled_in(target["expr"], run)
            if target["instant"]:
                result = scene.stack.ask("query", query=expr)["result"]
            else:
                result = scene.stack.ask("query_range", query=expr, **span)["result"]
            if not numbers(result) and not LOGGED.fullmatch(expr):
                empty.append(f"{uid}: {title}: {expr}")
    assert empty == []
    assert asked > 60


def test_every_selector_of_every_rule_matches_a_series(scene: Scene) -> None:
    selectors = set(re.findall(r"\b(?:koopmon_\w+|up)\b(?:\{[^}]*\})?", json.dumps(exprs()).replace('\\"', '"')))
    assert len(selectors) > 15
    family = re.compile(r'koopmon_observable_|name!="loss"|ephemeral')
    """This scene has no mixture of experts, no logged scalar and no monitor that outlives its job."""
    selectors = {each for each in selectors if not family.search(each)}
    lost = [each for each in selectors if not scene.stack.ask("query", query=f"last_over_time({each}[10m])")["result"]]
    assert lost == []


def exprs() -> list[str]:
    return [rule["expr"] for group in prometheus_rules()["groups"] for rule in group["rules"]]


def test_nothing_but_what_was_to_be_expected_was_told(scene: Scene) -> None:
    told = {notice.name for notice in scene.stack.notices if notice.status == "firing"}
    about_the_run = {WARNING, "KoopmonRiskHigh", "KoopmonForecastHigh", "KoopmonDivergenceLikely"}
    # A rate that is too high makes gradients jump above their second moments.
    assert told <= about_the_run | {"KoopmonActionTaken", "KoopmonActionWithoutEffect", "KoopmonUpdateRmsHigh"}
    log = Path(scene.stack.folder / "prometheus.log").read_text()
    assert "Evaluating rule failed" not in log
