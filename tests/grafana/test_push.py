"""`koopmon grafana push` against a small Grafana on a real socket, through grafana_client."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from koopmon.grafana.fingerprint import MARK, RULE_MARK
from koopmon.grafana.routes import ROUTE
from tests.fake_grafana import FakeGrafana, Json, Request

Push = Callable[..., tuple[int, str, str]]
RUN = "koopmon-run"
RISK = ("koopmon", "koopmon risk")
SECRET = "S3CRETofSlack"
WEBHOOK = ("--webhook", "https://hooks.example.org/t0ken")
ALL = (*WEBHOOK, "--slack", f"https://hooks.slack.com/services/T0/B0/{SECRET}", "--email", "ops@example.org")
OUR_ROUTE = {"receiver": "koopmon", "object_matchers": [["koopmon", "=", "true"]], "continue": True}


def done(pushed: tuple[int, str, str]) -> dict[str, Json]:
    """The rows of a push that went well, by kind and name."""
    status, out, err = pushed
    assert (status, err) == (0, "")
    return {f"{row['kind']} {row['name']}": row for row in json.loads(out)["changes"]}


def actions(pushed: tuple[int, str, str]) -> dict[str, str]:
    """What was written, by kind and name."""
    return {name: row["action"] for name, row in done(pushed).items() if row["done"]}


def edit(dashboard: Json) -> None:
    """What saving by hand in Grafana's own page does: a new version, and whatever was changed."""
    dashboard["dashboard"]["version"] += 1
    dashboard["dashboard"]["panels"][0]["title"] = "mine"


def test_the_first_push_makes_all_and_the_second_nothing(push: Push, grafana: FakeGrafana) -> None:
    made = actions(push(*ALL, "--json"))
    assert set(made.values()) == {"create", "update"}
    assert len(made) == 12
    state = grafana.state
    assert list(state.datasources) == ["koopmon-prometheus"]
    assert list(state.folders) == ["koopmon"]
    assert set(state.dashboards) == {"koopmon-fleet", RUN, "koopmon-monitor"}
    assert {title for _, title in state.groups} == {"koopmon risk", "koopmon runs", "koopmon monitor"}
    assert [point["type"] for point in state.contact_points] == ["webhook", "slack", "email"]
    assert list(state.secrets.values()) == [ALL[3]]
    assert state.policies["routes"] == [OUR_ROUTE]
    rules = [rule for group in state.groups.values() for rule in group["rules"]]
    assert {rule["labels"]["koopmon"] for rule in rules} == {"true"}
    assert {query["datasourceUid"] for rule in rules for query in rule["data"]} == {"koopmon-prometheus", "__expr__"}
    # People may edit everything in Grafana's pages: nothing is locked as provisioned.
    assert {thing["provenance"] for thing in (*rules, *state.contact_points)} == {""}
    before = copy.deepcopy(state)
    assert {row["action"] for row in done(push(*ALL, "--json")).values()} == {"unchanged"}
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
    status, out, err = push(*ALL, "--dry-run")
    assert (status, err) == (0, "")
    assert out.count("create") == 11
    assert '+   "receiver": "koopmon"' in out
    assert "dry run: nothing was written" in out
    assert grafana.writes == []
    push(*ALL)
    status, out, _ = push("--prometheus-url", "http://prometheus.example.org:9090/", "--dry-run")
    assert status == 0
    assert '- "url": "http://localhost:9090"\n+ "url": "http://prometheus.example.org:9090"\n' in out
    assert grafana.writes == []


def test_a_dashboard_edited_by_hand_is_kept_until_forced(push: Push, grafana: FakeGrafana) -> None:
    push()
    edit(grafana.state.dashboards[RUN])
    edited = copy.deepcopy(grafana.state.dashboards[RUN])
    status, out, err = push()
    assert status == 5
    assert (
        err == "koopmon: dashboard 'koopmon / Run': kept: edited by hand since it was pushed; --force overwrites it\n"
    )
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
    """From now on, a koopmon whose dashboards and rules have changed."""
    from koopmon.grafana import bundle

    dashboards, groups = bundle.dashboards, bundle.grafana_rule_groups

    def newer_dashboards() -> dict[str, Json]:
        return {uid: {**each, "description": "newer"} for uid, each in dashboards().items()}

    def newer_groups(*words: Any, **named: Any) -> list[Json]:
        return [{**group, "interval": group["interval"] + 10} for group in groups(*words, **named)]

    monkeypatch.setattr(bundle, "dashboards", newer_dashboards)
    monkeypatch.setattr(bundle, "grafana_rule_groups", newer_groups)


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
    """Identifiers, versions, defaults, other spellings; a folder that was renamed, a dashboard that was moved."""
    push(*ALL)
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
    for point in grafana.state.contact_points:
        point["settings"] |= {"maxAlerts": 5, "message": ""}
    assert actions(push(*ALL, "--json")) == {}
    request.getfixturevalue("next_version")
    assert len(actions(push(*ALL, "--json"))) == 6
    assert {each["meta"]["folderUid"] for each in grafana.state.dashboards.values()} == {"other"}


def test_dashboards_of_others_are_refused(push: Push, grafana: FakeGrafana) -> None:
    """One with our uid, one with our title, one from a file: each is kept, forced or not; the rest is pushed."""
    state = grafana.state
    state.folders["koopmon"] = {"uid": "koopmon", "title": "koopmon"}
    theirs = {"uid": "x", "title": "koopmon / Fleet", "panels": [], "version": 4, "id": 4}
    state.dashboards["x"] = {"dashboard": theirs, "meta": {"folderUid": "koopmon"}}
    state.dashboards[RUN] = {"dashboard": {**theirs, "uid": RUN, "title": "Run"}, "meta": {"folderUid": ""}}
    state.dashboards["koopmon-monitor"] = {
        "dashboard": {**theirs, "uid": "koopmon-monitor", "title": "M"}, "meta": {"folderUid": "", "provisioned": True},
    }  # fmt: skip
    before = copy.deepcopy(state.dashboards)
    status, _, err = push("--force")
    assert status == 5
    assert "dashboard 'koopmon / Fleet': kept: a dashboard of this title, uid x, is there already" in err
    assert "dashboard 'koopmon / Run': kept: is there already and was not made by a push" in err
    assert "dashboard 'koopmon / Monitor': kept: is provisioned by other means" in err
    assert err.count("\n") == 1
    assert state.dashboards == before
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
    assert "rule group 'koopmon risk': kept: is there already" in err
    assert "rule group 'koopmon runs': kept: is provisioned by other means" in err


def test_locked_rules_stay_locked(push: Push, grafana: FakeGrafana, request: pytest.FixtureRequest) -> None:
    push()
    for rule in grafana.state.groups[RISK]["rules"]:
        rule["provenance"] = "api"
    request.getfixturevalue("next_version")
    assert actions(push("--json"))["rule group koopmon risk"] == "update"
    assert {rule["provenance"] for rule in grafana.state.groups[RISK]["rules"]} == {"api"}


FOREIGN_TREE: Json = {
    "receiver": "grafana-default-email",
    "group_by": ["..."],
    "group_wait": "45s",
    "routes": [
        {"receiver": "grafana-default-email", "object_matchers": [["team", "=~", "ml"]], "mute_time_intervals": ["n"]},
        {"receiver": "grafana-default-email", "matchers": ["a=b"], "routes": [{"receiver": "grafana-default-email"}]},
    ],
}  # fmt: skip


def test_a_policy_tree_of_others_is_left_but_for_one_route(push: Push, grafana: FakeGrafana) -> None:
    grafana.state.policies = copy.deepcopy(FOREIGN_TREE)
    assert actions(push(*WEBHOOK, "--json"))[f"notification policy {ROUTE}"] == "update"
    tree = grafana.state.policies
    assert tree == {**FOREIGN_TREE, "routes": [OUR_ROUTE, *FOREIGN_TREE["routes"]]}
    assert list(tree) == list(FOREIGN_TREE)
    # What people set on our route, and where they put it, is theirs.
    moved = {**OUR_ROUTE, "group_wait": "5m", "mute_time_intervals": ["nights"]}
    tree["routes"] = [{**FOREIGN_TREE["routes"][0], "routes": [moved]}]
    assert actions(push(*WEBHOOK, "--json")) == {}
    moved["receiver"] = "grafana-default-email"
    assert push(*WEBHOOK)[0] == 5
    assert grafana.writes == []
    assert actions(push(*WEBHOOK, "--force", "--json")) == {f"notification policy {ROUTE}": "update"}
    assert grafana.state.policies["routes"] == [
        {**FOREIGN_TREE["routes"][0], "routes": [{**moved, "receiver": "koopmon"}]}
    ]


def test_a_route_that_came_in_between_is_not_written_over(push: Push, grafana: FakeGrafana) -> None:
    """The tree is read again just before it is written."""

    def somebody_saves(request: Request) -> None:
        if request.method == "POST" and "contact-points" in request.path:
            grafana.state.policies = copy.deepcopy(FOREIGN_TREE)

    grafana.watchers.append(somebody_saves)
    assert push(*WEBHOOK)[0] == 0
    assert grafana.state.policies == {**FOREIGN_TREE, "routes": [OUR_ROUTE, *FOREIGN_TREE["routes"]]}


@pytest.mark.parametrize(("provenance", "status"), [("api", 0), ("file", 5), ("converted_prometheus", 5)])
def test_a_locked_policy_tree_stays_as_it_is(push: Push, grafana: FakeGrafana, provenance: str, status: int) -> None:
    grafana.state.policies = {**FOREIGN_TREE, "provenance": provenance}
    assert push(*WEBHOOK)[0] == status
    assert grafana.state.policies["provenance"] == provenance
    assert len(grafana.state.policies["routes"]) == (2 if status else 3)


def test_without_a_contact_point_the_policy_tree_is_not_even_read(push: Push, grafana: FakeGrafana) -> None:
    push()
    assert not any("policies" in request.path or "contact-points" in request.path for request in grafana.requests)


def test_a_contact_point_with_other_settings_takes_the_place_of_the_old(push: Push, grafana: FakeGrafana) -> None:
    push(*ALL)
    slack = ("--slack", f"https://hooks.slack.com/services/T0/B1/{SECRET}")
    changes = json.loads(push(*slack, "--json")[1])["changes"]
    assert [row["action"] for row in changes if row["kind"] == "contact point"] == ["create", "delete"]
    assert list(grafana.state.secrets.values())[-1] == slack[1]
    assert sorted(point["type"] for point in grafana.state.contact_points) == ["email", "slack", "webhook"]
    assert not any(SECRET in json.dumps(point) for point in grafana.state.contact_points)
    assert actions(push(*slack, "--json")) == {}


def test_a_contact_point_edited_by_hand_is_kept_until_forced(push: Push, grafana: FakeGrafana) -> None:
    push(*WEBHOOK)
    (point,) = grafana.state.contact_points
    point["settings"]["url"] = "https://elsewhere.example.org/"
    for words in (WEBHOOK, ("--webhook", "https://third.example.org/")):
        status, _, err = push(*words)
        assert (status, grafana.writes) == (5, [])
        assert "contact point 'koopmon (webhook)': kept: edited by hand" in err
    assert actions(push(*WEBHOOK, "--force", "--json")) == {"contact point koopmon (webhook)": "update"}
    assert grafana.state.contact_points[0]["settings"]["url"] == WEBHOOK[1]
    assert actions(push(*WEBHOOK, "--json")) == {}


def test_a_contact_point_of_others_with_our_name_is_refused(push: Push, grafana: FakeGrafana) -> None:
    theirs = {"uid": "x", "name": "koopmon", "type": "pagerduty", "settings": {}, "provenance": ""}
    grafana.state.contact_points = [theirs]
    status, _, err = push(*WEBHOOK, "--force")
    assert status == 5
    assert "contact point 'koopmon (webhook)': kept: a contact point of this name is there already" in err
    assert "notification policy" in err
    assert grafana.state.contact_points == [theirs]
    assert "routes" not in grafana.state.policies


def test_a_data_source_keeps_what_people_add_and_is_kept_when_they_change_it(push: Push, grafana: FakeGrafana) -> None:
    push("--prometheus-url", "http://one:9090")
    source = grafana.state.datasources["koopmon-prometheus"]
    source |= {"basicAuth": True, "basicAuthUser": "koopmon"}
    assert actions(push("--json")) == {}
    assert actions(push("--prometheus-url", "http://two:9090", "--json")) == {
        "data source koopmon Prometheus": "update"
    }
    source = grafana.state.datasources["koopmon-prometheus"]
    assert (source["url"], source["basicAuthUser"]) == ("http://two:9090", "koopmon")
    source["url"] = "http://by-hand:9090"
    status, _, err = push("--prometheus-url", "http://three:9090")
    assert (status, "data source 'koopmon Prometheus': kept: edited by hand" in err) == (5, True)
    assert grafana.state.datasources["koopmon-prometheus"]["url"] == "http://by-hand:9090"
    assert push("--prometheus-url", "http://three:9090", "--force")[0] == 0
    assert grafana.state.datasources["koopmon-prometheus"]["url"] == "http://three:9090"


@pytest.mark.parametrize("given", ["prom uid", "The Prometheus"])
def test_a_data_source_that_is_there_is_used_as_it_is(push: Push, grafana: FakeGrafana, given: str) -> None:
    theirs = {"uid": "prom uid", "name": "The Prometheus", "type": "prometheus", "access": "proxy", "readOnly": True}
    grafana.state.datasources = {"prom uid": copy.deepcopy(theirs)}
    assert push("--datasource", given)[0] == 0
    assert grafana.state.datasources == {"prom uid": theirs}
    rule = grafana.state.groups[RISK]["rules"][0]
    assert rule["data"][0]["datasourceUid"] == "prom uid"


def test_a_folder_that_is_there_is_used(push: Push, grafana: FakeGrafana) -> None:
    grafana.state.folders["team"] = {"uid": "team", "title": "Team"}
    assert push("--folder", "team", "--no-alerts")[0] == 0
    assert list(grafana.state.folders) == ["team"]
    assert {each["meta"]["folderUid"] for each in grafana.state.dashboards.values()} == {"team"}
    assert grafana.state.groups == {}
