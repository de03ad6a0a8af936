"""Data from the daemon to the pages: bounded, consistent, and up to date."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from koopmon.config import PolicyConfig
from koopmon.history.schema import RunState
from koopmon.monitor import events
from koopmon.monitor.http import json_api
from koopmon.monitor.http import live_state as boards
from koopmon.monitor.http.live_state import LiveState
from koopmon.monitor.http.pages import run_page
from koopmon.risk.band import BandReading
from koopmon.telemetry.metrics import MAX_LAYERS
from koopmon.views.run_view import RunView
from tests import factories
from tests.factories import point

pytestmark = pytest.mark.usefixtures("one_snapshot_is_enough")

Feed = Callable[..., Any]
Profile = Callable[..., Any]


def test_a_run_as_it_is_told(live_state: LiveState, feed: Feed, make_profile: Profile) -> None:
    fed = feed("job")
    fed.heartbeat(4, overhead_ratio=0.002, taps_missing=1, dropped={"queue_full": 3}, step_seconds=0.5)
    fed.tell(events.SnapshotReceived(fed.run))
    fed.tell(events.SnapshotDropped(fed.run, "engine_queue_full"))
    found = make_profile()
    assessment = fed.judge(4, found, loss=2.5)
    fed.heartbeat(5, overhead_ratio=0.002, dropped={"queue_full": 3})
    view = fed.view
    assert (view.state, view.adapter, view.step, view.num_received) == ("running", "transformer", 5, 1)
    assert view.health.dropped == {"queue_full": 3, "engine_queue_full": 1}
    assert (view.health.num_ranks, view.health.world_size) == (1, 2)
    assert view.latest.training.loss == 2.5
    assert view.latest.risk == assessment.risk.value
    assert view.spectrum.labels == ("0", "1", "2")
    assert [len(pairs) for pairs in view.spectrum.eigenvalues] == [16, 16, 16]
    assert view.columns[0].values["spectral_radius"][1] == pytest.approx(found.layers[1].spectral_radius)
    assert live_state.view("other") is None


def test_revisions_grow_with_what_can_be_seen_and_only_then(
    live_state: LiveState, feed: Feed, make_profile: Profile
) -> None:
    one, two = feed("one"), feed("two")
    before = live_state.revision
    one.heard()
    assert live_state.revision == before, "a heartbeat that says nothing new"
    one.judge(1, make_profile())
    assert [view.name for view in live_state.views(since=before)] == ["one"]
    two.heartbeat(7)
    assert {view.name for view in live_state.views(since=before)} == {"one", "two"}
    assert live_state.views(since=live_state.revision) == []


def test_everything_is_bounded(
    live_state: LiveState, feed: Feed, monkeypatch: pytest.MonkeyPatch, make_profile: Profile
) -> None:
    found, fed = make_profile(), feed("job")
    for step in range(1, boards.MAX_POINTS + 50):
        fed.judge(step, found)
    assert len(fed.view.points) == boards.MAX_POINTS
    assert fed.view.points[-1].step == boards.MAX_POINTS + 49, "the newest stay"
    assert len(fed.view.columns) == boards.MAX_COLUMNS
    for step in range(1000, 1000 + 4 * boards.MAX_DECISIONS):
        fed.judge(step, None if step % 2 else found)
    assert len(fed.view.decisions) <= boards.MAX_DECISIONS
    monkeypatch.setattr(boards, "MAX_RUNS", 3)
    ended = feed("ended")
    ended.run.state = RunState.ENDED
    ended.heard()
    feed("third")
    feed("fourth")
    assert live_state.names() == ["job", "third", "fourth"], "an ended run is removed first"
    assert live_state.num_hidden == 1


def test_logged_scalars_are_kept_once_for_each_step(live_state: LiveState, feed: Feed) -> None:
    fed = feed("job")
    for step in (1, 1, 2):
        logged = {"kl": BandReading(step, 0.5 * step)}
        fed.tell(events.HeartbeatReceived(fed.run, factories.heartbeat(step), {}, False, False, logged))
    assert [(point.step, point.readings["kl"].value) for point in fed.view.logged] == [(1, 0.5), (2, 1.0)]
    before = live_state.revision
    fed.tell(events.HeartbeatReceived(fed.run, factories.heartbeat(3), {}, False, False, logged))
    assert live_state.revision == before
    assert json_api.run(fed.view, 0.0)["logged"][-1] == {"step": 2, "values": {"kl": 1.0}}
    page = run_page("", fed.view, 0.0, PolicyConfig(), quantity="near_unit_mass")
    assert "Logged scalars" in page
    assert "kl <strong>1</strong>" in page


def test_many_layers_share_rows(feed: Feed, make_profile: Profile) -> None:
    fed = feed("deep", num_layers=100)
    fed.judge(1, make_profile(num_layers=100))
    assert len(fed.view.spectrum.labels) == 50
    assert len(fed.view.columns[0].values["near_unit_mass"]) == 50 <= MAX_LAYERS


def test_a_decision_and_what_becomes_of_its_commands(feed: Feed, make_profile: Profile) -> None:
    fed = feed("job")
    fed.judge(1, make_profile())
    assessment = fed.judge(2, None)
    assert [each.outcome for each in fed.view.decisions[-1].commands] == ["pending"] * len(assessment.commands)
    scale = next(command for command in assessment.commands if command.kind == "set_lr_scale")
    fed.answer(scale.id, "applied", 4, "on both ranks")
    fed.answer(scale.id, "duplicate", 5)
    fed.give_up(scale)
    (each,) = [each for each in fed.view.decisions[-1].commands if each.command.id == scale.id]
    assert (each.outcome, each.step, each.detail) == ("applied", 4, "on both ranks")
    others = [each.command for each in fed.view.decisions[-1].commands if each.command.id != scale.id]
    fed.give_up(others[0])
    assert {each.outcome for each in fed.view.decisions[-1].commands} == {"applied", "unanswered"}


def test_states_that_are_not_finite_leave_the_last_spectrum(feed: Feed, make_profile: Profile) -> None:
    fed = feed("job", tables={"policy": {"dry_run": True}})
    fed.judge(1, make_profile())
    fed.judge(2, None)
    assert fed.view.latest.risk == 1.0
    assert fed.view.spectrum.step == 1
    assert len(fed.view.columns) == 1
    assert {each.outcome for each in fed.view.decisions[-1].commands} == {"dry_run"}


def test_a_new_launch_goes_on_where_the_last_one_stood(
    live_state: LiveState, feed: Feed, make_profile: Profile
) -> None:
    feed("job").judge(5, make_profile())
    later = feed("job", "bbbbbbbb", step=5)
    assert (later.view.incarnation, later.view.standing) == ("bbbbbbbb", None)
    assert [point.step for point in later.view.points] == [5]


def test_what_the_history_knows_comes_before_what_was_heard(
    live_state: LiveState, feed: Feed, make_profile: Profile
) -> None:
    feed("job").judge(10, make_profile())
    live_state.backfill(RunView(name="job", incarnation="aaaaaaaa"), points=[point(8), point(9), point(10)])
    live_state.backfill(RunView(name="old", incarnation="cccccccc", state="ended"), points=[point(1)])
    job, old = live_state.view("job"), live_state.view("old")
    assert job is not None
    assert old is not None
    assert [each.step for each in job.points] == [8, 9, 10]
    assert job.points[-1].risk == 0.0, "what was heard stays"
    assert job.state == "running"
    assert (old.state, len(old.points)) == ("ended", 1)


def test_readers_see_whole_runs_while_it_is_written(live_state: LiveState, feed: Feed, make_profile: Profile) -> None:
    found, fed, torn = make_profile(), feed("job"), []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            for view in live_state.views():
                steps = [each.step for each in view.points]
                if steps != sorted(steps) or (view.spectrum and view.spectrum.step != view.points[-1].step):
                    torn.append(view)

    reader = threading.Thread(target=read)
    reader.start()
    for step in range(1, 300):
        fed.judge(step, found)
    done.set()
    reader.join(30.0)
    assert not torn
