"""Resources of a push, each compared with its present state in Grafana, without I/O.

Each pushed dashboard and rule holds a fingerprint of its content. Content that differs from its fingerprint was edited
by hand, and is overwritten only with `force`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from urllib.parse import quote

from koopmon.grafana.annotations import TAG
from koopmon.grafana.dashboards import Json, dashboards
from koopmon.grafana.files import FOLDER, datasource_file

DEFAULT_PROMETHEUS = "http://localhost:9090"
DECISIONS: Json = {
    "name": "Decisions",
    "datasource": {"type": "grafana", "uid": "-- Grafana --"},
    "enable": True,
    "hide": False,
    "iconColor": "purple",
    "target": {"type": "tags", "tags": [TAG, "$run"], "matchAny": False, "limit": 100},
}
MARK = "koopmon_pushed"
"""Hidden constant variable that stores a dashboard's fingerprint. A manual save in Grafana keeps it."""
RULE_MARK = "__koopmon_pushed__"
"""Annotation of a rule that stores its group's fingerprint. Grafana neither shows nor sends names of this form."""
ADDED_TO_DASHBOARDS = frozenset({"id", "uid", "version", "iteration", "schemaVersion"})
ADDED_TO_QUERIES = frozenset({"intervalMs", "maxDataPoints"})
RULE_KEYS = ("uid", "title", "condition", "noDataState", "execErrState", "labels")
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
FROM_A_FILE = "comes from a file"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One resource and its planned change. `before` and `after` are for display."""

    kind: Literal["data source", "folder", "dashboard", "rule group"]
    name: str
    action: Literal["create", "update", "unchanged", "kept"] = "create"
    why: str = ""
    done: bool = False
    before: Any = None
    after: Any = None
    request: tuple[str, str, Json] = field(default=("", "", {}), repr=False)
    """Method, path and body of the request that makes the change."""

    @property
    def writes(self) -> bool:
        return self.action in ("create", "update")


def datasource(have: Json | None, url: str | None, *, force: bool) -> Change:
    """Compare our data source, a Prometheus at `url`; None accepts the present address."""
    wanted = datasource_file(url or DEFAULT_PROMETHEUS)["datasources"][0]
    change = Change(kind="data source", name=wanted["name"], after=wanted, request=("POST", "/datasources", wanted))
    if have is None:
        return change
    body = {**have, "url": wanted["url"]}  # keeps what users added, such as a password for Prometheus
    request = ("PUT", f"/datasources/uid/{wanted['uid']}", body)
    change = replace(change, before={**wanted, "url": have.get("url")}, request=request)
    if url is None or url == have.get("url"):
        return replace(change, action="unchanged")
    if have.get("readOnly"):
        return replace(change, action="kept", why=FROM_A_FILE)
    return _edited(change, "has another address", force=force)


def folder(have: Json | None, uid: str) -> Change:
    """Compare the folder; users may rename it."""
    wanted = {"uid": uid, "title": FOLDER}
    change = Change(kind="folder", name=FOLDER, after=wanted, request=("POST", "/folders", wanted))
    return change if have is None else replace(change, name=str(have.get("title")), action="unchanged")


def wanted_dashboards(datasource_uid: str, datasource_name: str) -> Iterator[Json]:
    """Yield the dashboards with our data source preselected instead of Grafana's default one.

    The dashboard of one run also shows the decisions that the monitor posts as annotations.
    """
    for board in dashboards().values():
        for variable in _variables(board):
            if variable["type"] == "datasource":
                variable["current"] = {"text": datasource_name, "value": datasource_uid}
            if variable["name"] == "run" and not variable.get("multi"):
                board["annotations"]["list"].append(DECISIONS)
        yield board


def dashboard(wanted: Json, have: Json | None, folder_uid: str, *, force: bool) -> Change:
    """Compare a dashboard. It stays in the folder to which a user moved it."""
    there, meta = (have or {}).get("dashboard") or {}, (have or {}).get("meta") or {}
    after = _bare_dashboard(wanted)
    mark = fingerprint(after)
    constant = {"name": MARK, "type": "constant", "hide": 2, "query": mark, "current": {"text": mark, "value": mark}}
    # Grafana rejects the request if the version has changed since it was read.
    board = {**wanted, "templating": {"list": [*_variables(wanted), constant]}, "version": there.get("version", 0)}
    place = meta.get("folderUid", folder_uid)
    body = {"dashboard": board, "folderUid": place, "message": "koopmon grafana push", "overwrite": False}
    change = Change(kind="dashboard", name=wanted["title"], after=after, request=("POST", "/dashboards/db", body))
    if have is None:
        return change
    marks = {item.get("query") for item in _variables(there) if item.get("name") == MARK}
    return _compared(replace(change, before=_bare_dashboard(there)), marks, bool(meta.get("provisioned")), force=force)


def rule_group(wanted: Json, have: Json | None, *, force: bool) -> Change:
    """Compare a rule group. Rules that others added to it stay."""
    after = _bare_group(wanted["interval"], wanted["rules"])
    mark = fingerprint(after)
    rules = [{**rule, "annotations": {**rule["annotations"], RULE_MARK: mark}} for rule in wanted["rules"]]
    uids = {rule["uid"] for rule in rules}
    there = (have or {}).get("rules") or []
    ours = [rule for rule in there if rule.get("uid") in uids or _rule_mark(rule)]
    body = {**wanted, "rules": [*rules, *(rule for rule in there if rule not in ours)]}
    change = Change(
        kind="rule group", name=wanted["title"], after=after, request=("PUT", rule_group_path(wanted), body)
    )
    if have is None or not there:
        return change
    provisioned = any(rule.get("provenance") for rule in there)
    change = replace(change, before=_bare_group(have.get("interval", 0), ours))
    return _compared(change, {_rule_mark(rule) for rule in ours}, provisioned, force=force)


def rule_group_path(group: Json) -> str:
    """Return the API path of a rule group."""
    return f"/v1/provisioning/folder/{group['folderUid']}/rule-groups/{quote(group['title'], safe='')}"


def fingerprint(content: Any) -> str:
    """Return a digest of JSON, independent of key order and of int or float for whole numbers."""
    normal = json.loads(json.dumps(content), parse_float=lambda text: int(x) if (x := float(text)).is_integer() else x)
    return hashlib.sha256(json.dumps(normal, sort_keys=True).encode()).hexdigest()[:16]


def _compared(change: Change, marks: set[Any], provisioned: bool, *, force: bool) -> Change:
    """Complete the change of a resource that exists; `marks` are the fingerprints that it holds."""
    if provisioned or not marks - {None}:
        return replace(change, action="kept", why=FROM_A_FILE if provisioned else "was not made by a push")
    if marks == {fingerprint(change.after)} and _holds(change.before, change.after):
        return replace(change, action="unchanged")
    if marks == {fingerprint(change.before)}:
        return replace(change, action="update")
    return _edited(change, "edited by hand", force=force)


def _holds(found: Any, wanted: Any) -> bool:
    """Return True if `found` has all of `wanted`: a newer Grafana may add keys to what it was sent."""
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(_holds(found.get(key), value) for key, value in wanted.items())
    if isinstance(wanted, list):
        return isinstance(found, list) and len(found) == len(wanted) and all(map(_holds, found, wanted))
    return bool(found == wanted) or not (found or wanted)


def _edited(change: Change, why: str, *, force: bool) -> Change:
    if force:
        return replace(change, action="update", why=why)
    return replace(change, action="kept", why=f"{why}; --force overwrites it")


def _variables(board: Mapping[str, Any]) -> list[Json]:
    return list((board.get("templating") or {}).get("list") or [])


def _bare_dashboard(board: Mapping[str, Any]) -> Json:
    """Return a dashboard without the mark and without the keys that Grafana sets."""
    bare = {key: value for key, value in board.items() if key not in ADDED_TO_DASHBOARDS}
    return {**bare, "templating": [item for item in _variables(board) if item.get("name") != MARK]}


def _bare_group(interval: int, rules: Iterable[Mapping[str, Any]]) -> Json:
    return {"interval": interval, "rules": sorted(map(_bare_rule, rules), key=lambda rule: str(rule["uid"]))}


def _bare_rule(rule: Mapping[str, Any]) -> Json:
    """Return what users can edit of a rule, without the mark. `keep_firing_for` is absent: Grafana before 12 drops it.

    Grafana writes durations in its own way, for example "60s" as "1m".
    """
    queries = [
        {
            **{key: query.get(key) for key in ("refId", "relativeTimeRange", "datasourceUid")},
            "model": {key: value for key, value in (query.get("model") or {}).items() if key not in ADDED_TO_QUERIES},
        }
        for query in rule.get("data") or ()
    ]
    return {
        **{key: rule.get(key) for key in RULE_KEYS},
        "data": queries,
        "for": sum(int(number) * SECONDS[unit] for number, unit in re.findall(r"(\d+)([smhdw])", str(rule.get("for")))),
        "annotations": {key: text for key, text in (rule.get("annotations") or {}).items() if key != RULE_MARK},
        "notification_settings": rule.get("notification_settings") or None,
        "isPaused": bool(rule.get("isPaused")),
    }


def _rule_mark(rule: Mapping[str, Any]) -> Any:
    return (rule.get("annotations") or {}).get(RULE_MARK)
