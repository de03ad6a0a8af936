"""Fingerprints: equal for equal content, also with Grafana's additions, and different for other content."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koopmon.grafana.resources import dashboard, fingerprint, rule_group, wanted_dashboards
from koopmon.grafana.rules import grafana_rule_groups

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10) | st.floats(-10, 10) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def pushed_board() -> tuple[Any, Any]:
    """Return a wanted dashboard, and Grafana's response after its first push."""
    (wanted, *_) = wanted_dashboards("prom", "Prometheus")
    body = dashboard(wanted, None, "folder", force=False).request[2]
    returned = {**json.loads(json.dumps(body["dashboard"])), "id": 9, "version": 4, "iteration": 1}
    return wanted, {"dashboard": returned, "meta": {"folderUid": "folder"}}


def pushed_group() -> tuple[Any, Any]:
    """Return a wanted rule group, and Grafana's response after its first push."""
    (wanted, *_) = grafana_rule_groups("prom", "folder")
    return wanted, json.loads(json.dumps(rule_group(wanted, None, force=False).request[2]))


def test_a_dashboard_is_known_again_until_it_is_edited() -> None:
    wanted, there = pushed_board()
    assert dashboard(wanted, there, "folder", force=False).action == "unchanged"
    there["dashboard"]["panels"][0]["title"] += "."
    assert dashboard(wanted, there, "folder", force=False).action == "kept"
    assert dashboard(wanted, there, "folder", force=True).action == "update"


def test_keys_that_grafana_adds_are_no_edit_until_there_is_newer_content() -> None:
    wanted, there = pushed_board()
    there["dashboard"]["preload"] = False
    there["dashboard"]["panels"][0]["pluginVersion"] = "12.0.0"
    assert dashboard(wanted, there, "folder", force=False).action == "unchanged"
    newer = {**wanted, "description": "newer"}
    assert dashboard(newer, there, "folder", force=False).action == "kept"


def test_a_second_push_adds_no_second_mark() -> None:
    wanted, there = pushed_board()
    again = dashboard(wanted, there, "folder", force=False).request[2]["dashboard"]
    assert again["templating"] == there["dashboard"]["templating"]


@pytest.mark.parametrize(
    "key", ["title", "condition", "for", "noDataState", "execErrState", "labels", "annotations", "isPaused", "expr",
            "notification_settings"]
)  # fmt: skip
def test_every_part_of_a_rule_counts(key: str) -> None:
    wanted, there = pushed_group()
    there["rules"].reverse()
    assert rule_group(wanted, there, force=False).action == "unchanged", "the order does not count"
    if key == "expr":
        there["rules"][0]["data"][0]["model"]["expr"] += " "
    elif key in ("labels", "annotations"):
        there["rules"][0][key][{"labels": "severity", "annotations": "summary"}[key]] = "x"
    elif key == "notification_settings":
        there["rules"][0][key] = {"receiver": "x"}
    else:
        there["rules"][0][key] = "9m"
    assert rule_group(wanted, there, force=False).action == "kept"


@pytest.mark.parametrize("spelling", [("10m", "600s"), ("10m", "10m0s"), ("60m", "1h"), ("60m", "1h0m0s"), ("0s", "0")])
def test_durations_are_the_same_however_they_are_written(spelling: tuple[str, str]) -> None:
    wanted, _ = pushed_group()
    for rule in wanted["rules"]:
        rule["for"] = spelling[0]
    there = copy.deepcopy(rule_group(wanted, None, force=False).request[2])
    for rule in there["rules"]:
        rule["for"] = spelling[1]
    assert rule_group(wanted, there, force=False).action == "unchanged"


@given(JSON)
def test_json_that_was_sent_and_returned_has_its_fingerprint(value: Any) -> None:
    assert fingerprint(json.loads(json.dumps(value))) == fingerprint(value)
    assert fingerprint([value]) != fingerprint([value, None])


def test_whole_numbers_are_the_same_as_floats_and_key_order_does_not_count() -> None:
    assert fingerprint({"a": -1e9, "b": 0.4}) == fingerprint({"b": 0.4, "a": -1_000_000_000})
    assert fingerprint({"a": 1.5}) != fingerprint({"a": 1})
