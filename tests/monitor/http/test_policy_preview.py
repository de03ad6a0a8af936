"""The previewed decision equals the later decision of the policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from koopmon.monitor.http.policy_preview import preview

pytestmark = pytest.mark.usefixtures("one_snapshot_is_enough")

Feed = Callable[..., Any]
Profile = Callable[..., Any]


def test_before_anything_was_judged_it_says_so(feed: Feed) -> None:
    told = preview(feed("job").view)
    assert told.phase == "calm"
    assert "judged" in told.lines[0][1]


def test_what_is_foretold_of_a_severe_risk_comes_true_and_asking_changes_nothing(
    feed: Feed, make_profile: Profile
) -> None:
    fed = feed("job")
    fed.judge(1, make_profile())
    before = fed.controller.policy_state
    told = dict(preview(fed.view).lines)
    assert fed.controller.policy_state is before
    assert told["If the risk is high, 0.4 or more"] == "Learning rate × 0.5."
    assert told["If the risk is severe, 0.8 or more"] == "Learning rate × 0.25."
    assert told["Budget"].startswith("0 of 120")
    assessment = fed.judge(2, None)
    assert next(command.lr_scale for command in assessment.commands if command.kind == "set_lr_scale") == 0.25
    after = preview(fed.view)
    assert after.phase == "acting"
    lines = dict(after.lines)
    assert "until step 8" in lines["Cool-down"]
    assert lines["If it stays calm"] == "After 200 calm steps: learning rate × 0.312."
    assert lines["Budget"].startswith("1 of 120")


def test_the_lowest_scale_and_a_spent_budget(feed: Feed) -> None:
    low = feed("low", tables={"policy": {"min_lr_scale": 0.25}})
    low.judge(1, None)
    assert "as low as it may be, 0.25" in dict(preview(low.view).lines)["If the risk is severe, 0.8 or more"]
    spent = feed("spent", tables={"policy": {"max_actions_per_hour": 1}})
    spent.judge(1, None)
    assert "budget of 1 actions" in dict(preview(spent.view).lines)["If the risk is severe, 0.8 or more"]


@pytest.mark.parametrize(
    ("tables", "hello", "says"),
    [
        ({"policy": {"name": "observe"}}, {}, "observe, which only watches"),
        ({"policy": {"dry_run": True}}, {}, "dry run"),
        ({}, {"acts": False}, "watch-only"),
    ],
)
def test_why_nothing_would_be_sent(feed: Feed, make_profile: Profile, tables: Any, hello: Any, says: str) -> None:
    fed = feed("job", tables=tables, **hello)
    fed.judge(1, make_profile())
    assert says in dict(preview(fed.view).lines)["Commands"]


def test_of_a_run_that_is_over_nothing_is_foretold(feed: Feed, make_profile: Profile) -> None:
    fed = feed("job")
    fed.judge(1, make_profile())
    ended = replace(fed.view, state="ended")
    assert preview(ended).lines == (("Now", "The run is ended: no command is sent."),)


def test_kss_is_foretold_where_it_is_the_policy(feed: Feed, make_profile: Profile) -> None:
    fed = feed("job", tables={"policy": {"name": "kss"}, "kss": {"method": "published"}})
    fed.judge(1, make_profile())
    assert "KSS alpha 0.15" in dict(preview(fed.view).lines)["If the risk is severe, 0.8 or more"]


def test_within_a_cool_down_the_action_after_it_is_foretold(feed: Feed) -> None:
    fed = feed("job")
    fed.judge(2, None)
    lines = dict(preview(fed.view).lines)
    assert "until step 8" in lines["Cool-down"]
    assert lines["If the risk is high, 0.4 or more"] == "Learning rate × 0.125."
