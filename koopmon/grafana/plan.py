"""Compares the wanted resources with those in Grafana and derives one change for each, without I/O.

A push never overwrites resources that others created or that come from a file. It overwrites manual edits since the
last push only with --force.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from koopmon.grafana.bundle import CONTACT_POINT, CONTACT_UID, Bundle, Contact, plain_settings
from koopmon.grafana.fingerprint import (
    bare_dashboard,
    bare_group,
    fingerprint,
    holds,
    mark_of,
    marked,
    marked_rule,
    rule_mark,
)
from koopmon.grafana.routes import ROUTE, merged_policies

Json = dict[str, Any]
ResourceKind = Literal["data source", "folder", "dashboard", "contact point", "rule group", "notification policy"]
ChangeAction = Literal["create", "update", "delete", "unchanged", "foreign", "edited"]
DATASOURCE_MARK = "koopmonPushed"
"""Key of a data source's `jsonData` that stores its fingerprint."""
OURS_TO_CHANGE = frozenset({"", "api"})
"""Provenances of resources that Grafana's API may change."""
BY_HAND = "edited by hand since it was pushed; --force overwrites it"
OVERWRITTEN = "edited by hand, overwritten"
PROVISIONED = "is provisioned by other means, such as a file"
OF_OTHERS = "is there already and was not made by a push"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One resource and its planned change. `before` and `after` are for display; `body` is the request body."""

    kind: ResourceKind
    name: str
    action: ChangeAction
    why: str = ""
    uid: str = ""
    before: Any = None
    after: Any = None
    body: Any = field(default=None, repr=False)
    editable: bool = True
    """True if users may edit the resource in Grafana; a resource that was locked before the push stays locked."""

    @property
    def writes(self) -> bool:
        return self.action in ("create", "update", "delete")

    @property
    def kept(self) -> bool:
        """True if the resource differs from the wanted one but must not be overwritten."""
        return self.action in ("foreign", "edited")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The existing resources in Grafana; None or empty for missing ones."""

    datasource: Json | None = None
    folder: Json | None = None
    dashboards: Mapping[str, Json] = field(default_factory=dict)
    """`dashboard` and `meta` by uid."""
    titles: Mapping[str, str] = field(default_factory=dict)
    """Titles and uids of other dashboards in our folder."""
    rule_groups: Mapping[str, Json] = field(default_factory=dict)
    """Rule groups by title."""
    contact_points: tuple[Json, ...] = ()
    policies: Json | None = None


def plan(bundle: Bundle, found: Found, *, force: bool = False) -> list[Change]:
    """Return the changes in the order of their dependencies, including unchanged resources."""
    changes = [
        _datasource(bundle, found),
        _folder(bundle, found),
        *(_dashboard(bundle, found, uid) for uid in bundle.dashboards),
        *(_rule_group(bundle, found, group) for group in bundle.rule_groups),
    ]
    if force:
        changes = [_overwritten(change) if change.action == "edited" else change for change in changes]
    contacts = list(_contacts(bundle, found, force=force))
    if contacts:
        foreign = any(change.action == "foreign" for change in contacts)
        contacts.append(_policy(found, force=force, foreign=foreign))
    return changes + contacts


def _datasource(bundle: Bundle, found: Found) -> Change:
    wanted, have = bundle.datasource.body(), found.datasource
    change = Change(kind="data source", name=wanted["name"], action="unchanged", uid=wanted["uid"])
    if bundle.datasource.given is not None:
        return replace(change, name=bundle.datasource.given, uid=(have or {}).get("uid", ""), why="used as it is")
    mark = {DATASOURCE_MARK: fingerprint(_core(wanted))}
    if have is None:
        body = {**wanted, "jsonData": {**wanted["jsonData"], **mark}}
        return replace(change, action="create", after=_core(wanted), body=body)
    if bundle.datasource.url is None or _core(have) == _core(wanted):
        return change
    change = replace(change, before=_core(have), after=_core(wanted))
    left = (have.get("jsonData") or {}).get(DATASOURCE_MARK)
    if have.get("readOnly") or left is None:
        return replace(change, action="foreign", why=PROVISIONED if have.get("readOnly") else OF_OTHERS)
    # User additions, such as a password for Prometheus, are kept.
    body = {**have, **_core(wanted), "jsonData": {**have["jsonData"], **mark}}
    return replace(_if_untouched(change, left == fingerprint(_core(have))), body=body)


def _core(datasource: Mapping[str, Any]) -> Json:
    return {key: datasource.get(key) for key in ("type", "access", "url")}


def _folder(bundle: Bundle, found: Found) -> Change:
    body = dict(bundle.folder)
    if found.folder is not None:
        title = str(found.folder.get("title", body["title"]))  # users may rename the folder
        return Change(kind="folder", name=title, action="unchanged", uid=body["uid"])
    return Change(kind="folder", name=body["title"], action="create", uid=body["uid"], after=body, body=body)


def _dashboard(bundle: Bundle, found: Found, uid: str) -> Change:
    dashboard = bundle.dashboards[uid]
    wanted, title = bare_dashboard(dashboard), str(dashboard["title"])
    content = {**marked(dashboard), "id": None, "uid": uid, "version": 0}
    folder = bundle.folder["uid"]
    body = {"dashboard": content, "folderUid": folder, "message": "koopmon grafana push", "overwrite": False}
    change = Change(kind="dashboard", name=title, action="create", uid=uid, after=wanted, body=body)
    there = found.dashboards.get(uid)
    if there is None:
        other = found.titles.get(title)
        if other is None:
            return change
        return replace(change, action="foreign", why=f"a dashboard of this title, uid {other}, {OF_OTHERS}")
    have, meta = there.get("dashboard") or {}, there.get("meta") or {}
    bare, mark = bare_dashboard(have), mark_of(have)
    content["version"] = have.get("version", 0)  # Grafana rejects the save after a concurrent change
    body["folderUid"] = meta.get("folderUid", folder)  # the dashboard stays in the folder to which a user moved it
    change = replace(change, before=bare)
    if meta.get("provisioned") or mark is None:
        return replace(change, action="foreign", why=PROVISIONED if meta.get("provisioned") else OF_OTHERS)
    return _compared(change, mark, fingerprint(wanted))


def _rule_group(bundle: Bundle, found: Found, group: Json) -> Change:
    title, folder = str(group["title"]), bundle.folder["uid"]
    wanted = bare_group(group["interval"], group["rules"])
    mark = fingerprint(wanted)
    rules = [marked_rule(rule, mark) for rule in group["rules"]]
    body = {"title": title, "folderUid": folder, "interval": group["interval"], "rules": rules}
    change = Change(kind="rule group", name=title, action="create", uid=title, after=wanted, body=body)
    have = found.rule_groups.get(title)
    if have is None or not have.get("rules"):
        return change
    uids = {rule["uid"] for rule in rules}
    ours = [rule for rule in have["rules"] if rule_mark(rule) is not None or rule.get("uid") in uids]
    # A write replaces the whole group, so it includes the rules that others added.
    body["rules"] = [*rules, *(rule for rule in have["rules"] if rule not in ours)]
    provenances = {rule.get("provenance") or "" for rule in have["rules"]}
    before = bare_group(have.get("interval", 0), ours)
    change = replace(change, before=before, editable="api" not in provenances)
    marks = {left for rule in ours if (left := rule_mark(rule)) is not None}
    if (locked := not provenances <= OURS_TO_CHANGE) or not marks:
        return replace(change, action="foreign", why=PROVISIONED if locked else OF_OTHERS)
    return _compared(change, marks.pop() if len(marks) == 1 else "", mark)


def _compared(change: Change, mark: str, wanted: str) -> Change:
    """Complete the change of a resource with our `mark`; `wanted` is the fingerprint of the wanted content now."""
    if mark != wanted:
        return _if_untouched(change, mark == fingerprint(change.before))
    # The wanted content is unchanged since the last push, so additions by Grafana do not count as differences.
    return replace(change, action="unchanged") if holds(change.before, change.after) else _if_untouched(change, False)


def _if_untouched(change: Change, untouched: bool) -> Change:
    return replace(change, action="update") if untouched else replace(change, action="edited", why=BY_HAND)


def _overwritten(change: Change) -> Change:
    return replace(change, action="update", why=OVERWRITTEN)


def _contacts(bundle: Bundle, found: Found, *, force: bool) -> Iterator[Change]:
    ours = [point for point in found.contact_points if CONTACT_UID.fullmatch(str(point.get("uid")))]
    foreign = not ours and any(point.get("name") == CONTACT_POINT for point in found.contact_points)
    for contact in bundle.contacts:
        change = Change(
            kind="contact point",
            name=f"{CONTACT_POINT} ({contact.type})",
            action="create",
            uid=contact.uid,
            after=_readable(contact.type, contact.settings),
            body=contact.body,
        )
        if foreign:
            yield replace(change, action="foreign", why=f"a contact point of this name {OF_OTHERS}")
        else:
            there = [point for point in ours if point["uid"].startswith(f"koopmon-{contact.type}-")]
            yield from _contact(change, contact, there, force=force)


def _contact(change: Change, contact: Contact, there: list[Json], *, force: bool) -> Iterator[Change]:
    edited = [point for point in there if _contact_edited(point)]
    change = replace(change, before=_readable(contact.type, there[0].get("settings") or {}) if there else None)
    same = next((point for point in there if point["uid"] == contact.uid), None)
    if edited and not force:
        yield _if_untouched(change, False)
        return
    if same is None:
        yield replace(change, why="in place of the one with other settings" if there else "")
    elif same in edited:
        yield replace(_overwritten(change), editable=same.get("provenance") != "api")
    else:
        yield replace(change, action="unchanged")
    # The uid encodes the settings, so new settings create a new integration and the old one is deleted.
    for point in there:
        if point["uid"] != contact.uid:
            yield replace(change, action="delete", uid=point["uid"], after=None, body=None)


def _contact_edited(point: Json) -> bool:
    known = CONTACT_UID.fullmatch(point["uid"])
    assert known is not None
    kind: Any = known[1]
    plain = plain_settings(kind, point.get("settings") or {})
    return bool(point.get("name") != CONTACT_POINT or point.get("type") != kind or fingerprint(plain, 12) != known[2])


def _readable(kind: str, settings: Mapping[str, Any]) -> Json:
    """Return settings for display. The path of a webhook's address is removed because it may be a secret."""
    if kind == "email":
        return {"type": kind, "addresses": settings.get("addresses")}
    scheme, _, rest = str(settings.get("url")).partition("://")
    return {"type": kind, "url": f"{scheme}://{rest.partition('/')[0]}/..." if rest else "(kept secret by Grafana)"}


def _policy(found: Found, *, force: bool, foreign: bool) -> Change:
    tree = found.policies or {}
    action, after = merged_policies(tree, force=force)
    change = Change(kind="notification policy", name=ROUTE, action=action, before=tree, after=after)
    change = replace(change, editable=tree.get("provenance") != "api")
    if action == "update" and foreign:
        return replace(change, action="foreign", why="its contact point was not made by a push")
    if action == "update" and (tree.get("provenance") or "") not in OURS_TO_CHANGE:
        return replace(change, action="foreign", why=PROVISIONED)
    return replace(change, why=BY_HAND) if action == "edited" else change
