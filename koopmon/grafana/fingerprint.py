"""Fingerprints of pushed content, by which a later push detects changes that others have made since.

Grafana adds identifiers, versions and defaults to the pushed content. `bare_*` remove these additions, `fingerprint`
digests the rest, and `holds` checks that Grafana's content includes all wanted content.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

MARK = "koopmon_pushed"
"""Name of the hidden constant variable that stores a dashboard's fingerprint. A manual save in Grafana keeps it."""
RULE_MARK = "__koopmon_pushed__"
"""Annotation of a rule that stores its group's fingerprint. Grafana neither shows nor sends names of the form
`__name__`."""
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
"""Keys of a rule that are compared, including the pause state. `keep_firing_for` is absent: Grafana before 12 drops
it."""
ADDED_TO_QUERIES = frozenset({"intervalMs", "maxDataPoints"})
UNITS = {"w": 604_800_000, "d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1, "y": 31_536_000_000}

Json = Any


def fingerprint(value: Json, digits: int = 16) -> str:
    """Return a hexadecimal digest of JSON, independent of key order and of int or float for whole numbers."""
    text = json.dumps(_plain(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def holds(found: Json, wanted: Json) -> bool:
    """Return True if `found` contains all of `wanted`. Objects may have extra keys; lists must have equal lengths."""
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
    """Return a dashboard without Grafana's additions and without our mark."""
    bare = {key: copy.deepcopy(value) for key, value in dashboard.items() if key not in ADDED_TO_DASHBOARDS}
    variables = [item for item in _variables(bare) if item.get("name") != MARK]
    if variables or "templating" in bare:
        bare["templating"] = {**(bare.get("templating") or {}), "list": variables}
    if bare.get("templating") == {"list": []}:
        del bare["templating"]
    return bare


def mark_of(dashboard: Mapping[str, Json]) -> str | None:
    """Return the fingerprint that our last push stored in a dashboard; None when a push did not create it."""
    values = [item.get("query") for item in _variables(dashboard) if item.get("name") == MARK]
    return values[0] if len(values) == 1 and isinstance(values[0], str) else None


def marked(dashboard: Mapping[str, Json]) -> dict[str, Json]:
    """Return the dashboard with its fingerprint as a mark."""
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
    """Return the compared keys of an alert rule, without our mark and with its duration in milliseconds."""
    bare = {key: value for key, value in rule.items() if key in OF_RULES}
    bare["for"] = milliseconds(bare.get("for"))
    annotations = bare.get("annotations") or {}
    bare["annotations"] = {key: text for key, text in annotations.items() if key != RULE_MARK}
    bare["data"] = [_bare_query(query) for query in bare.get("data") or ()]
    return {**_filled(bare), "isPaused": bool(rule.get("isPaused"))}


def rule_mark(rule: Mapping[str, Json]) -> str | None:
    """Return the group's fingerprint that our last push stored in a rule; None when a push did not create it."""
    mark = (rule.get("annotations") or {}).get(RULE_MARK)
    return mark if isinstance(mark, str) else None


def marked_rule(rule: Mapping[str, Json], mark: str) -> dict[str, Json]:
    """Return a rule with the fingerprint of its group."""
    return {**rule, "annotations": {**(rule.get("annotations") or {}), RULE_MARK: mark}}


def bare_group(interval: int, rules: Iterable[Mapping[str, Json]]) -> dict[str, Json]:
    """Return a rule group's interval in seconds and its bare rules, sorted by uid."""
    return {"interval": interval, "rules": sorted(map(bare_rule, rules), key=lambda rule: str(rule.get("uid")))}


def milliseconds(duration: Json) -> Json:
    """Convert a duration such as "1h30m" to milliseconds, so that "60s" equals "1m"; other values are unchanged."""
    if not isinstance(duration, str) or not re.fullmatch(r"(\d+(ms|[ywdhms]))+|0", duration):
        return duration
    return sum(int(number) * UNITS[unit] for number, unit in re.findall(r"(\d+)(ms|[ywdhms])", duration))


def _bare_query(query: Mapping[str, Json]) -> dict[str, Json]:
    model = {key: value for key, value in (query.get("model") or {}).items() if key not in ADDED_TO_QUERIES}
    return {**query, "model": model}


def _filled(value: Json) -> Json:
    """Remove keys with the value null, empty, false or zero: Grafana omits some of them and adds others."""
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
