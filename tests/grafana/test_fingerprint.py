"""What is sent, digested: the same for the same content, whatever Grafana adds to it, and another for any other."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koopmon.grafana.dashboards import dashboards
from koopmon.grafana.fingerprint import (
    bare_dashboard,
    bare_group,
    fingerprint,
    holds,
    mark_of,
    marked,
    marked_rule,
    milliseconds,
)
from koopmon.grafana.rules import grafana_rule_groups

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10) | st.floats(-10, 10) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("uid", dashboards())
def test_a_dashboard_is_known_again_by_its_mark(uid: str) -> None:
    dashboard = dashboards()[uid]
    sent = marked(dashboard)
    returned = json.loads(json.dumps({**sent, "id": 9, "version": 4, "iteration": 1}))
    assert mark_of(dashboard) is None
    assert mark_of(returned) == fingerprint(bare_dashboard(dashboard)) == fingerprint(bare_dashboard(returned))
    assert marked(returned)["templating"] == sent["templating"], "one mark, not two"
    returned["panels"][0]["title"] += "."
    assert mark_of(returned) != fingerprint(bare_dashboard(returned))


def test_every_part_of_a_rule_counts_but_for_what_grafana_adds() -> None:
    (group, *_) = grafana_rule_groups("prom", "folder")
    mark = fingerprint(bare_group(group["interval"], group["rules"]))
    rules = [marked_rule(rule, mark) for rule in reversed(group["rules"])]
    assert fingerprint(bare_group(group["interval"], rules)) == mark, "neither the mark counts, nor the order"
    for key in ("title", "condition", "for", "noDataState", "execErrState", "labels", "annotations", "isPaused"):
        changed = copy.deepcopy(rules)
        changed[0][key] = {"other": "x"} if key in ("labels", "annotations") else "9m"
        assert fingerprint(bare_group(group["interval"], changed)) != mark, key
    rules[0]["data"][0]["model"]["expr"] += " "
    assert fingerprint(bare_group(group["interval"], rules)) != mark


@given(JSON)
def test_json_that_was_sent_and_returned_has_its_fingerprint(value: Any) -> None:
    returned = json.loads(json.dumps(value))
    assert fingerprint(returned) == fingerprint(value)
    assert holds(returned, value)


@given(JSON, st.text(min_size=1, max_size=3), JSON)
def test_more_keys_hold_what_is_wanted_and_other_values_do_not(value: Any, key: str, more: Any) -> None:
    wanted = {"wanted": value}
    assert holds({**wanted, "added" + key: more}, wanted)
    assert not holds({"wanted": ["other", value]}, {"wanted": value or "x"})


@pytest.mark.parametrize(
    ("duration", "expected"),
    [
        ("0s", 0),
        ("60s", 60_000),
        ("1m", 60_000),
        ("1m0s", 60_000),
        ("1h30m", 5_400_000),
        ("2d", 172_800_000),
        ("250ms", 250),
        ("0", 0),
        ("soon", "soon"),
        (None, None),
    ],
)
def test_durations_are_the_same_however_they_are_written(duration: Any, expected: Any) -> None:
    assert milliseconds(duration) == expected
