"""The dashboards as resources of Grafana's schema V2 lose nothing, and Grafana's own SDK reads them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from koopmon.grafana.dashboard_resource import dashboard_resource
from koopmon.grafana.dashboards import dashboards
from koopmon.grafana.files import files

CLASSIC = dashboards()
RESOURCES = {uid: dashboard_resource(each) for uid, each in CLASSIC.items()}
Json = dict[str, Any]


@pytest.mark.parametrize("uid", CLASSIC)
def test_every_panel_has_its_queries_and_its_settings(uid: str) -> None:
    resource = RESOURCES[uid]
    assert (resource["kind"], resource["metadata"]["name"]) == ("Dashboard", uid)
    elements = resource["spec"]["elements"]
    panels = [panel for panel in CLASSIC[uid]["panels"] if panel["type"] != "row"]
    assert len(elements) == len(panels)
    for panel in panels:
        spec = elements[f"panel-{panel['id']}"]["spec"]
        assert (spec["title"], spec["description"]) == (panel["title"], panel["description"])
        drawn = spec["vizConfig"]
        assert drawn["group"] == panel["type"]
        assert drawn["spec"] == {"options": panel["options"], "fieldConfig": panel["fieldConfig"]}
        queries = [each["spec"] for each in spec["data"]["spec"]["queries"]]
        assert [each["refId"] for each in queries] == [each["refId"] for each in panel["targets"]]
        for query, target in zip(queries, panel["targets"], strict=True):
            asked = query["query"]
            assert (asked["group"], asked["datasource"]) == ("prometheus", {"name": "${datasource}"})
            assert asked["spec"] | {"refId": target["refId"], "datasource": target["datasource"]} == target
        changed = [each["kind"] for each in spec["data"]["spec"]["transformations"]]
        assert changed == [each["id"] for each in panel.get("transformations", ())]


@pytest.mark.parametrize("uid", CLASSIC)
def test_every_panel_has_its_place_in_a_row(uid: str) -> None:
    board, spec = CLASSIC[uid], RESOURCES[uid]["spec"]
    rows = [each["spec"] for each in spec["layout"]["spec"]["rows"]]
    assert [row["title"] for row in rows] == [each["title"] for each in board["panels"] if each["type"] == "row"]
    items = [[each["spec"] for each in row["layout"]["spec"]["items"]] for row in rows]
    names = [each["element"]["name"] for row in items for each in row]
    assert names == [f"panel-{each['id']}" for each in board["panels"] if each["type"] != "row"]
    for row in items:
        assert min(each["y"] for each in row) == 0, "places are relative to the row"
        assert all(each["x"] + each["width"] <= 24 for each in row)


@pytest.mark.parametrize("uid", CLASSIC)
def test_variables_and_annotations_ask_for_the_same(uid: str) -> None:
    board, spec = CLASSIC[uid], RESOURCES[uid]["spec"]
    classic = board["templating"]["list"]
    source, *variables = spec["variables"]
    assert (source["kind"], source["spec"]["pluginId"]) == ("DatasourceVariable", "prometheus")
    assert [each["spec"]["name"] for each in spec["variables"]] == [each["name"] for each in classic]
    assert [each["spec"]["query"]["spec"] for each in variables] == [each["query"] for each in classic[1:]]
    assert [each["spec"].get("allValue") for each in variables] == [each.get("allValue") for each in classic[1:]]
    marks = [each["spec"] for each in spec["annotations"]]
    assert [each["query"]["spec"]["expr"] for each in marks] == [each["expr"] for each in board["annotations"]["list"]]
    assert all(each["legacyOptions"]["titleFormat"] for each in marks)


@pytest.mark.parametrize("uid", CLASSIC)
def test_the_sdk_reads_it_back_without_loss(uid: str) -> None:
    models = pytest.importorskip("grafana_foundation_sdk.models.dashboardv2beta1")
    pytest.importorskip("grafana_foundation_sdk.cog.plugins").register_default_plugins()
    spec = json.loads(json.dumps(RESOURCES[uid]["spec"]))
    read = models.Dashboard.from_json(spec)
    told = json.loads(json.dumps(read, default=_plain))
    assert list(lost(spec, told, "")) == []


def _plain(value: Any) -> Any:
    # from_json of the SDK 0.0.21 puts kind and version of a panel into sets.
    return next(iter(value)) if isinstance(value, set) else value.to_json()


def lost(made: Any, read: Any, where: str) -> list[str]:
    """Return the places where `read` lacks a value of `made`. It may have more, because the SDK writes defaults."""
    if isinstance(made, dict):
        # The SDK's model of a query of Prometheus lacks the query of a variable.
        names = [name for name in made if not (".variables" in where and where.endswith(".query.spec"))]
        missing = [f"{where}.{name}" for name in names if name not in read]
        known = [name for name in names if name in read]
        return missing + [each for name in known for each in lost(made[name], read[name], f"{where}.{name}")]
    if isinstance(made, list):
        if len(made) != len(read):
            return [where]
        pairs = enumerate(zip(made, read, strict=True))
        return [each for index, (one, other) in pairs for each in lost(one, other, f"{where}[{index}]")]
    return [] if made == read else [where]


def test_the_export_has_them() -> None:
    for uid, resource in RESOURCES.items():
        assert json.loads(files()[f"dashboards-v2/{uid}.json"]) == resource
