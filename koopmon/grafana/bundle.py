"""What is to stand in Grafana: plain data, put together before anything is asked of Grafana."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from koopmon.errors import ConfigError, one_line
from koopmon.grafana.access import check_url
from koopmon.grafana.annotations import TAG
from koopmon.grafana.dashboards import dashboards
from koopmon.grafana.files import DATASOURCE_UID, FOLDER, datasource_file
from koopmon.grafana.fingerprint import fingerprint
from koopmon.grafana.rules import grafana_rule_groups

Json = dict[str, Any]

CONTACT_POINT = "koopmon"
"""Name of the contact point."""
LABEL = ("koopmon", "true")
"""What our rules are labelled with, so that a route can take their alerts."""
DEFAULT_PROMETHEUS = "http://localhost:9090"

DECISIONS: Json = {
    "name": "Decisions",
    "datasource": {"type": "grafana", "uid": "-- Grafana --"},
    "enable": True,
    "hide": False,
    "iconColor": "purple",
    "target": {"type": "tags", "tags": [TAG, "$run"], "matchAny": False, "limit": 100},
}

ContactType = Literal["webhook", "slack", "email"]
PLAIN: Mapping[ContactType, tuple[str, ...]] = {"webhook": ("url", "httpMethod"), "slack": (), "email": ("addresses",)}
SECRET: Mapping[ContactType, tuple[str, ...]] = {"webhook": (), "slack": ("url",), "email": ()}
"""The settings that we send: those that Grafana gives back, and those that it never does."""
CONTACT_UID = re.compile(r"koopmon-(webhook|slack|email)-([0-9a-f]{12})-([0-9a-f]{8})")


@dataclass(frozen=True, slots=True)
class Contact:
    """One way of the contact point. `settings` may hold secrets."""

    type: ContactType
    settings: Mapping[str, Any] = field(repr=False)

    @property
    def uid(self) -> str:
        """Tells type and settings: a contact point has no other place in which Grafana keeps what we would note.

        Of secrets it holds 32 bits of a digest: enough to see that one has changed, too few to find it.
        """
        plain = fingerprint(plain_settings(self.type, self.settings), 12)
        secret = fingerprint([self.settings.get(key) for key in SECRET[self.type]], 8)
        return f"koopmon-{self.type}-{plain}-{secret}"

    @property
    def body(self) -> Json:
        """What Grafana takes."""
        return {
            "uid": self.uid,
            "name": CONTACT_POINT,
            "type": self.type,
            "settings": dict(self.settings),
            "disableResolveMessage": False,
        }


@dataclass(frozen=True, slots=True)
class DataSource:
    """The Prometheus that scrapes the monitor. `given`: uid or name of one that is there, and is only used.

    Without it there is one of ours; a `url` of None leaves its address as it is, if it has one.
    """

    given: str | None = None
    url: str | None = None

    def body(self) -> Json:
        """What Grafana takes for ours."""
        body: Json = datasource_file(self.url or DEFAULT_PROMETHEUS)["datasources"][0]
        return body


@dataclass(frozen=True, slots=True)
class Bundle:
    """Everything that one push is about."""

    datasource: DataSource
    folder: Json
    """`uid` and `title`."""
    dashboards: Mapping[str, Json]
    """By uid."""
    rule_groups: tuple[Json, ...]
    contacts: tuple[Contact, ...]
    """Empty: contact point and notification policy are left alone."""


def make_bundle(
    datasource: DataSource,
    contacts: Iterable[Contact] = (),
    *,
    datasource_uid: str = DATASOURCE_UID,
    datasource_name: str | None = None,
    folder_uid: str = FOLDER,
    alerts: bool = True,
    docs_url: str | None = None,
) -> Bundle:
    """What belongs into a Grafana whose Prometheus has `datasource_uid`."""
    name = datasource_name or str(datasource.body()["name"])
    groups = grafana_rule_groups(datasource_uid, folder_uid, docs_url=docs_url) if alerts else []
    return Bundle(
        datasource=datasource,
        folder={"uid": folder_uid, "title": FOLDER},
        dashboards={uid: _reading(each, datasource_uid, name) for uid, each in dashboards().items()},
        rule_groups=tuple({**group, "rules": [_labelled(rule) for rule in group["rules"]]} for group in groups),
        contacts=tuple(contacts),
    )


def make_contacts(webhook: str | None, slack: str | None, emails: Iterable[str]) -> tuple[Contact, ...]:
    """The contact point that the options ask for. Raises ConfigError naming the option."""
    contacts: list[Contact] = []
    if webhook is not None:
        _check_hook(webhook, "--webhook")
        contacts.append(Contact("webhook", {"url": webhook, "httpMethod": "POST"}))
    if slack is not None:
        _check_hook(slack, "--slack")
        contacts.append(Contact("slack", {"url": slack}))
    addresses = list(emails)
    for address in addresses:
        if not re.fullmatch(r"[^@\s;,]+@[^@\s;,]+", address):
            raise ConfigError(f"--email {one_line(address)!r}: expected an address such as ops@example.org")
    if addresses:
        contacts.append(Contact("email", {"addresses": ";".join(addresses)}))
    return tuple(contacts)


def plain_settings(kind: ContactType, settings: Mapping[str, Any]) -> Json:
    """Of a contact point's settings what we send and Grafana gives back."""
    return {key: settings.get(key) for key in PLAIN[kind]}


def _check_hook(url: str, option: str) -> None:
    """A webhook's address may be a secret as a whole: it is not repeated."""
    try:
        check_url(re.split("[?#]", url)[0], option)
    except ConfigError:
        raise ConfigError(f"{option}: expected an address such as https://HOST/PATH, without a password") from None


def _labelled(rule: Json) -> Json:
    return {**rule, "labels": {**rule.get("labels", {}), LABEL[0]: LABEL[1]}}


def _reading(dashboard: Json, uid: str, name: str) -> Json:
    """The dashboard with our data source chosen, where Grafana would choose its default one, and, where it is about
    one run, with the decisions that the monitor annotates in a Grafana that it knows."""
    chosen = copy.deepcopy(dashboard)
    for variable in chosen["templating"]["list"]:
        if variable["type"] == "datasource":
            variable["current"] = {"text": name, "value": uid}
        if variable["name"] == "run" and not variable.get("multi"):
            chosen["annotations"]["list"].append(DECISIONS)
    return chosen
