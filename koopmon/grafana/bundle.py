"""The wanted content of Grafana as plain data, complete before the first request."""

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
"""Label of koopmon's alerts, by which a notification route selects them."""
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
"""Settings of each contact type: Grafana returns those in PLAIN and never those in SECRET."""
CONTACT_UID = re.compile(r"koopmon-(webhook|slack|email)-([0-9a-f]{12})-([0-9a-f]{8})")


@dataclass(frozen=True, slots=True)
class Contact:
    """One integration of the contact point. `settings` may hold secrets."""

    type: ContactType
    settings: Mapping[str, Any] = field(repr=False)

    @property
    def uid(self) -> str:
        """Uid derived from type and settings, because Grafana stores no other metadata with a contact point.

        It holds 32 bits of a digest of the secrets: enough to detect a change, too few to recover a secret.
        """
        plain = fingerprint(plain_settings(self.type, self.settings), 12)
        secret = fingerprint([self.settings.get(key) for key in SECRET[self.type]], 8)
        return f"koopmon-{self.type}-{plain}-{secret}"

    @property
    def body(self) -> Json:
        """JSON body of the contact point for Grafana's API."""
        return {
            "uid": self.uid,
            "name": CONTACT_POINT,
            "type": self.type,
            "settings": dict(self.settings),
            "disableResolveMessage": False,
        }


@dataclass(frozen=True, slots=True)
class DataSource:
    """The Prometheus that scrapes the monitor. `given` is the uid or name of an existing data source, used unchanged.

    Without `given` the push manages its own data source; with `url` None it keeps the existing address, if any.
    """

    given: str | None = None
    url: str | None = None

    def body(self) -> Json:
        """Return the JSON body of our own data source for Grafana's API."""
        body: Json = datasource_file(self.url or DEFAULT_PROMETHEUS)["datasources"][0]
        return body


@dataclass(frozen=True, slots=True)
class Bundle:
    """All resources of one push."""

    datasource: DataSource
    folder: Json
    """`uid` and `title` of the folder."""
    dashboards: Mapping[str, Json]
    """Dashboards by uid."""
    rule_groups: tuple[Json, ...]
    contacts: tuple[Contact, ...]
    """Integrations of the contact point. When empty, the push changes neither contact point nor notification policy."""


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
    """Return the resources for a Grafana whose Prometheus has the uid `datasource_uid`."""
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
    """Return the contacts of the command-line options. Raises ConfigError with the name of the option."""
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
    """Return the settings of a contact that both koopmon sends and Grafana returns."""
    return {key: settings.get(key) for key in PLAIN[kind]}


def _check_hook(url: str, option: str) -> None:
    """Check a webhook's address. The error never quotes it, because the whole address may be a secret."""
    try:
        check_url(re.split("[?#]", url)[0], option)
    except ConfigError:
        raise ConfigError(f"{option}: expected an address such as https://HOST/PATH, without a password") from None


def _labelled(rule: Json) -> Json:
    return {**rule, "labels": {**rule.get("labels", {}), LABEL[0]: LABEL[1]}}


def _reading(dashboard: Json, uid: str, name: str) -> Json:
    """Return a dashboard with our data source preselected instead of Grafana's default one.

    A dashboard of one run also shows the decisions that the monitor posts as annotations.
    """
    chosen = copy.deepcopy(dashboard)
    for variable in chosen["templating"]["list"]:
        if variable["type"] == "datasource":
            variable["current"] = {"text": name, "value": uid}
        if variable["name"] == "run" and not variable.get("multi"):
            chosen["annotations"]["list"].append(DECISIONS)
    return chosen
