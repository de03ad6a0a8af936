"""`koopmon grafana push` to a small Grafana on a real socket, through grafana_client."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from koopmon.grafana.resources import MARK, RULE_MARK
from tests.fake_grafana import FakeGrafana, Json

Push = Callable[..., tuple[int, str, str]]
RUN = "koopmon-run"
RISK = ("koopmon", "koopmon risk")


def done(pushed: tuple[int, str, str]) -> dict[str, Json]:
    """Return the rows of a successful push, by kind and name."""
    status, out, err = pushed
    assert (status, err) == (0, "")
    return {f"{row['kind']} {row['name']}": row for row in json.loads(out)["changes"]}


def actions(pushed: tuple[int, str, str]) -> dict[str, str]:
    """Return the written resources, by kind and name."""
    return {name: row["action"] for name, row in done(pushed).items() if row["done"]}


def edit(dashboard: Json) -> None:
    """Save by hand like Grafana's own page: a new version with the given changes."""
    dashboard["dashboard"]["version"] += 1
    dashboard["dashboard"]["panels"][0]["title"] = "mine"


def test_the_first_push_makes_all_and_the_second_nothing(push: Push, grafana: FakeGrafana) -> None:
    made = actions(push("--json"))
    assert set(made.values()) == {"create"}
    assert len(made) == 8
    state = grafana.state
    assert list(state.datasources) == ["koopmon-prometheus"]
    assert list(state.folders) == ["koopmon"]
    assert set(state.dashboards) == {"koopmon-fleet", RUN, "koopmon-monitor"}
    assert {title for _, title in state.groups} == {"koopmon risk", "koopmon runs", "koopmon monitor"}
    rules = [rule for group in state.groups.values() for rule in group["rules"]]
    assert {query["datasourceUid"] for rule in rules for query in rule["data"]} == {"koopmon-prometheus", "__expr__"}
    # Resources are editable in Grafana: none is locked as provisioned.
    assert {rule["provenance"] for rule in rules} == {""}
    before = copy.deepcopy(state)
    assert {row["action"] for row in done(push("--json")).values()} == {"unchanged"}
    assert grafana.writes == []
    assert state == before


def test_dashboards_read_the_data_source_of_the_push(push: Push, grafana: FakeGrafana) -> None:
    push()
    boards = grafana.state.dashboards
    variables = boards[RUN]["dashboard"]["templating"]["list"]
    (chosen,) = [each["current"] for each in variables if each["type"] == "datasource"]
    assert chosen == {"text": "koopmon Prometheus", "value": "koopmon-prometheus"}
    (mark,) = [each for each in variables if each["name"] == MARK]
    assert (mark["type"], mark["hide"]) == ("constant", 2)
    marks = {uid: [each["name"] for each in board["dashboard"]["annotations"]["list"]] for uid, board in boards.items()}
    assert [uid for uid, names in marks.items() if "Decisions" in names] == [RUN], "what the monitor annotates"


def test_a_dry_run_shows_the_difference_and_writes_nothing(push: Push, grafana: FakeGrafana) -> None:
    status, out, err = push("--dry-run")
    assert (status, err) == (0, "")
    assert out.count("create ") == 8
    assert "dry run: nothing was written" in out
    assert grafana.writes == []
    push()
    status, out, _ = push("--prometheus-url", "http://prometheus.example.org:9090/", "--force", "--dry-run")
    assert status == 0
    assert '- "url": "http://localhost:9090"\n+ "url": "http://prometheus.example.org:9090"\n' in out
    assert grafana.writes == []


def test_a_dashboard_edited_by_hand_is_kept_until_forced(push: Push, grafana: FakeGrafana) -> None:
    push()
    edit(grafana.state.dashboards[RUN])
    edited = copy.deepcopy(grafana.state.dashboards[RUN])
    status, out, err = push()
    assert status == 5
    assert err == "koopmon: dashboard 'koopmon / Run': kept: edited by hand; --force overwrites it\n"
    assert "kept" in out
    assert grafana.writes == []
    assert grafana.state.dashboards[RUN] == edited
    status, out, _ = push("--dry-run")
    assert (status, '-   "title": "mine"' in out) == (5, True)
    assert actions(push("--force", "--json")) == {"dashboard koopmon / Run": "update"}
    assert grafana.state.dashboards[RUN]["dashboard"]["panels"][0]["title"] != "mine"
    assert grafana.state.dashboards[RUN]["dashboard"]["version"] == 3
    assert actions(push("--json")) == {}


@pytest.fixture
def next_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a koopmon with changed dashboards and rules."""
    from koopmon.grafana import push, resources

    dashboards, groups = resources.dashboards, push.grafana_rule_groups

    def newer_dashboards() -> dict[str, Json]:
        return {uid: {**each, "description": "newer"} for uid, each in dashboards().items()}

    def newer_groups(*words: Any, **named: Any) -> list[Json]:
        return [{**group, "interval": group["interval"] + 10} for group in groups(*words, **named)]

    monkeypatch.setattr(resources, "dashboards", newer_dashboards)
    monkeypatch.setattr(push, "grafana_rule_groups", newer_groups)


def test_a_new_koopmon_updates_what_nobody_touched(
    push: Push, grafana: FakeGrafana, request: pytest.FixtureRequest
) -> None:
    push()
    edit(grafana.state.dashboards[RUN])
    grafana.state.groups[RISK]["rules"][0]["isPaused"] = True
    request.getfixturevalue("next_version")
    status, out, err = push("--json")
    assert (status, err.count("edited by hand")) == (5, 2)
    assert {row["name"] for row in json.loads(out)["changes"] if row["done"]} == {
        "koopmon / Fleet", "koopmon / Monitor", "koopmon runs", "koopmon monitor",
    }  # fmt: skip
    assert grafana.state.dashboards["koopmon-fleet"]["dashboard"]["description"] == "newer"
    assert grafana.state.dashboards[RUN]["dashboard"]["panels"][0]["title"] == "mine"
    assert grafana.state.groups[RISK]["rules"][0]["isPaused"]
    assert len(actions(push("--force", "--json"))) == 2
    assert actions(push("--json")) == {}


def test_what_grafana_adds_is_no_edit(push: Push, grafana: FakeGrafana, request: pytest.FixtureRequest) -> None:
    """Identifiers, versions, defaults and other spellings; a renamed folder, a moved dashboard."""
    push()
    grafana.state.folders["koopmon"]["title"] = "Trainings"
    grafana.state.folders["other"] = {"uid": "other", "title": "Other"}
    for each in grafana.state.dashboards.values():
        each["meta"]["folderUid"] = "other"
        each["dashboard"] |= {"id": 77, "version": 12, "schemaVersion": 41}
    for group in grafana.state.groups.values():
        for rule in group["rules"]:
            rule |= {
                "record": None,
                "keep_firing_for": "0s",
                "guid": "5f3a",
                "metadata": {"editor_settings": {"x": True}},
            }
    assert actions(push("--json")) == {}
    request.getfixturevalue("next_version")
    assert len(actions(push("--json"))) == 6
    assert {each["meta"]["folderUid"] for each in grafana.state.dashboards.values()} == {"other"}


def test_dashboards_of_others_are_refused(push: Push, grafana: FakeGrafana) -> None:
    """One with koopmon's uid, one from a file: each is kept, forced or not; the rest is pushed."""
    state = grafana.state
    state.folders["koopmon"] = {"uid": "koopmon", "title": "koopmon"}
    theirs = {"title": "Theirs", "panels": [], "version": 4, "id": 4}
    state.dashboards[RUN] = {"dashboard": {**theirs, "uid": RUN, "title": "Run"}, "meta": {"folderUid": ""}}
    state.dashboards["koopmon-monitor"] = {
        "dashboard": {**theirs, "uid": "koopmon-monitor", "title": "M"}, "meta": {"folderUid": "", "provisioned": True},
    }  # fmt: skip
    before = copy.deepcopy(state.dashboards)
    status, _, err = push("--force")
    assert status == 5
    assert "dashboard 'koopmon / Run': kept: was not made by a push" in err
    assert "dashboard 'koopmon / Monitor': kept: comes from a file" in err
    assert err.count("\n") == 1
    assert state.dashboards == {**before, "koopmon-fleet": state.dashboards["koopmon-fleet"]}
    assert len(state.groups) == 3


@pytest.mark.parametrize("how", ["paused", "threshold", "deleted", "interval"])
def test_rules_edited_by_hand_are_kept_until_forced(push: Push, grafana: FakeGrafana, how: str) -> None:
    push()
    group = grafana.state.groups[RISK]
    rule = group["rules"][0]
    match how:
        case "paused":
            rule["isPaused"] = True
        case "threshold":
            rule["data"][0]["model"]["expr"] = "koopmon_risk > 0.9"
        case "deleted":
            group["rules"].remove(rule)
        case "interval":
            group["interval"] = 300
    edited = copy.deepcopy(group)
    status, _, err = push()
    assert (status, "rule group 'koopmon risk': kept: edited by hand" in err) == (5, True)
    assert (grafana.writes, grafana.state.groups[RISK]) == ([], edited)
    assert actions(push("--force", "--json")) == {"rule group koopmon risk": "update"}
    assert grafana.state.groups[RISK] != edited
    assert actions(push("--json")) == {}


def test_a_rule_that_somebody_added_to_our_group_goes_along(
    push: Push, grafana: FakeGrafana, request: pytest.FixtureRequest
) -> None:
    push()
    mine = copy.deepcopy(grafana.state.groups[RISK]["rules"][0])
    mine |= {"uid": "mine", "title": "mine", "annotations": {}}
    grafana.state.groups[RISK]["rules"].append(mine)
    assert actions(push("--json")) == {}
    request.getfixturevalue("next_version")
    assert actions(push("--json"))["rule group koopmon risk"] == "update"
    rules = grafana.state.groups[RISK]["rules"]
    assert [rule for rule in rules if rule["uid"] == "mine"] == [mine]


def test_a_group_of_others_and_one_from_a_file_are_refused(push: Push, grafana: FakeGrafana) -> None:
    push()
    for rule in grafana.state.groups[RISK]["rules"]:
        del rule["annotations"][RULE_MARK]
    for rule in grafana.state.groups["koopmon", "koopmon runs"]["rules"]:
        rule["provenance"] = "file"
        rule["isPaused"] = True
    status, _, err = push("--force")
    assert (status, grafana.writes) == (5, [])
    assert "rule group 'koopmon risk': kept: was not made by a push" in err
    assert "rule group 'koopmon runs': kept: comes from a file" in err


def test_a_data_source_keeps_what_people_add_and_is_kept_when_they_change_it(push: Push, grafana: FakeGrafana) -> None:
    push("--prometheus-url", "http://one:9090")
    source = grafana.state.datasources["koopmon-prometheus"]
    source |= {"basicAuth": True, "basicAuthUser": "koopmon"}
    assert actions(push("--json")) == {}
    status, _, err = push("--prometheus-url", "http://two:9090/")
    assert (status, "data source 'koopmon Prometheus': kept: has another address" in err) == (5, True)
    assert grafana.writes == []
    assert actions(push("--prometheus-url", "http://two:9090/", "--force", "--json")) == {
        "data source koopmon Prometheus": "update"
    }
    source = grafana.state.datasources["koopmon-prometheus"]
    assert (source["url"], source["basicAuthUser"]) == ("http://two:9090", "koopmon")
    assert actions(push("--prometheus-url", "http://two:9090", "--json")) == {}


def test_a_data_source_that_is_there_is_used_as_it_is(push: Push, grafana: FakeGrafana) -> None:
    theirs = {"uid": "prom uid", "name": "The Prometheus", "type": "prometheus", "access": "proxy", "readOnly": True}
    grafana.state.datasources = {"prom uid": copy.deepcopy(theirs)}
    assert push("--datasource", "prom uid")[0] == 0
    assert grafana.state.datasources == {"prom uid": theirs}
    rule = grafana.state.groups[RISK]["rules"][0]
    assert rule["data"][0]["datasourceUid"] == "prom uid"


def test_a_folder_that_is_there_is_used(push: Push, grafana: FakeGrafana) -> None:
    grafana.state.folders["team"] = {"uid": "team", "title": "Team"}
    assert push("--folder", "team", "--no-alerts")[0] == 0
    assert list(grafana.state.folders) == ["team"]
    assert {each["meta"]["folderUid"] for each in grafana.state.dashboards.values()} == {"team"}
    assert grafana.state.groups == {}
