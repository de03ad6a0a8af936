"""What we sent, in a few digits, so that a later push sees whether somebody has changed it since.

Grafana gives back more than it was given: identifiers, versions, defaults. `bare_*` take that away, `fingerprint`
digests the rest, and `holds` asks whether all that we want is in what Grafana has, whatever it added.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

MARK = "koopmon_pushed"
"""The hidden constant variable of a dashboard that keeps its fingerprint: what is saved by hand keeps it as well."""
RULE_MARK = "__koopmon_pushed__"
"""The annotation of a rule that keeps its group's. Grafana shows and sends none that begin and end like this."""
ADDED_TO_DASHBOARDS = frozenset({"id", "uid", "version", "iteration", "schemaVersion"})
OF_RULES = frozenset(
    {
        "uid",
        "title",
        "condition",
        "data",
        "noDataState",
        "execErrState",
        "for",
        "labels",
        "annotations",
        "notification_settings",
    }
)
"""What counts of a rule, and whether it is paused. Not `keep_firing_for`, which a Grafana before 12 forgets."""
ADDED_TO_QUERIES = frozenset({"intervalMs", "maxDataPoints"})
UNITS = {"w": 604_800_000, "d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1, "y": 31_536_000_000}

Json = Any


def fingerprint(value: Json, digits: int = 16) -> str:
    """A digest of JSON in hexadecimal; the order of keys, and whether a whole number is a float, do not count."""
    text = json.dumps(_plain(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def holds(found: Json, wanted: Json) -> bool:
    """Whether everything of `wanted` is in `found`; objects of `found` may have more keys, lists not more items."""
    if isinstance(wanted, Mapping):
        return isinstance(found, Mapping) and all(
            holds(found[key], value) if key in found else not value for key, value in wanted.items()
        )
    if isinstance(wanted, list | tuple):
        return (
            isinstance(found, list | tuple)
            and len(found) == len(wanted)
            and all(holds(a, b) for a, b in zip(found, wanted, strict=True))
        )
    return bool(_plain(found) == _plain(wanted)) or (not found and not wanted)


def bare_dashboard(dashboard: Mapping[str, Json]) -> dict[str, Json]:
    """A dashboard without what Grafana adds, and without our mark."""
    bare = {key: copy.deepcopy(value) for key, value in dashboard.items() if key not in ADDED_TO_DASHBOARDS}
    variables = [item for item in _variables(bare) if item.get("name") != MARK]
    if variables or "templating" in bare:
        bare["templating"] = {**(bare.get("templating") or {}), "list": variables}
    if bare.get("templating") == {"list": []}:
        del bare["templating"]
    return bare


def mark_of(dashboard: Mapping[str, Json]) -> str | None:
    """The fingerprint that our last push left in a dashboard; None when it is none of ours."""
    values = [item.get("query") for item in _variables(dashboard) if item.get("name") == MARK]
    return values[0] if len(values) == 1 and isinstance(values[0], str) else None


def marked(dashboard: Mapping[str, Json]) -> dict[str, Json]:
    """A dashboard with the mark that tells its content."""
    bare = bare_dashboard(dashboard)
    mark = fingerprint(bare)
    variable = {
        "name": MARK,
        "type": "constant",
        "hide": 2,
        "skipUrlSync": True,
        "query": mark,
        "current": {"text": mark, "value": mark},
    }
    whole: dict[str, Json] = copy.deepcopy(dict(dashboard))
    whole["templating"] = {**(whole.get("templating") or {}), "list": [*_variables(bare), variable]}
    return whole


def bare_rule(rule: Mapping[str, Json]) -> dict[str, Json]:
    """What counts of an alert rule, without our mark, and its duration in milliseconds."""
    bare = {key: value for key, value in rule.items() if key in OF_RULES}
    bare["for"] = milliseconds(bare.get("for"))
    annotations = bare.get("annotations") or {}
    bare["annotations"] = {key: text for key, text in annotations.items() if key != RULE_MARK}
    bare["data"] = [_bare_query(query) for query in bare.get("data") or ()]
    return {**_filled(bare), "isPaused": bool(rule.get("isPaused"))}


def rule_mark(rule: Mapping[str, Json]) -> str | None:
    """The fingerprint of its group that our last push left in a rule; None when it is none of ours."""
    mark = (rule.get("annotations") or {}).get(RULE_MARK)
    return mark if isinstance(mark, str) else None


def marked_rule(rule: Mapping[str, Json], mark: str) -> dict[str, Json]:
    """A rule with the fingerprint of its group."""
    return {**rule, "annotations": {**(rule.get("annotations") or {}), RULE_MARK: mark}}


def bare_group(interval: int, rules: Iterable[Mapping[str, Json]]) -> dict[str, Json]:
    """A rule group's interval in seconds and its bare rules, whatever their order."""
    return {"interval": interval, "rules": sorted(map(bare_rule, rules), key=lambda rule: str(rule.get("uid")))}


def milliseconds(duration: Json) -> Json:
    """A duration such as "1h30m" in milliseconds, so that "60s" is "1m"; what is no duration as it is."""
    if not isinstance(duration, str) or not re.fullmatch(r"(\d+(ms|[ywdhms]))+|0", duration):
        return duration
    return sum(int(number) * UNITS[unit] for number, unit in re.findall(r"(\d+)(ms|[ywdhms])", duration))


def _bare_query(query: Mapping[str, Json]) -> dict[str, Json]:
    model = {key: value for key, value in (query.get("model") or {}).items() if key not in ADDED_TO_QUERIES}
    return {**query, "model": model}


def _filled(value: Json) -> Json:
    """Without the keys that say nothing: null, empty, false, zero. Grafana leaves some out and adds others."""
    if isinstance(value, Mapping):
        filled = {key: _filled(item) for key, item in value.items()}
        return {key: item for key, item in filled.items() if item not in (None, "", 0, [], {})}
    return [_filled(item) for item in value] if isinstance(value, list | tuple) else value


def _plain(value: Json) -> Json:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _variables(dashboard: Mapping[str, Json]) -> list[dict[str, Json]]:
    listed = (dashboard.get("templating") or {}).get("list") or []
    return [item for item in listed if isinstance(item, dict)]
