"""Push to a running Grafana through its HTTP API. Only this module uses grafana_client.

grafana_client is an optional extra. It is imported late because it is slow to import and replaces urllib3.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from koopmon.errors import (
    ConfigError,
    GrafanaDeniedError,
    GrafanaError,
    GrafanaUnreachableError,
    KoopmonError,
    one_line,
)
from koopmon.grafana import resources
from koopmon.grafana.access import GrafanaAccess, check_url
from koopmon.grafana.files import DATASOURCE_UID, FOLDER
from koopmon.grafana.resources import Change, Json, Kind

EDITOR = "(role Editor, or Edit on the folder)"
PERMISSIONS: dict[Kind, str] = {
    "data source": "datasources:read, datasources:create and datasources:write (role Admin)",
    "folder": "folders:read and folders:create (role Editor)",
    "dashboard": f"dashboards:read, dashboards:create and dashboards:write {EDITOR}",
    "rule group": f"alert.provisioning:read and alert.provisioning:write {EDITOR}",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PushOptions:
    """Options of a push. Raises ConfigError with the name of the option."""

    datasource: str | None = None
    """Uid or name of an existing data source; None for our own."""
    prometheus_url: str | None = None
    """Address of Prometheus for our own data source; None accepts the present one."""
    folder: str = FOLDER
    alerts: bool = True
    docs_url: str | None = None
    force: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.datasource is not None and self.prometheus_url is not None:
            raise ConfigError("--datasource and --prometheus-url: one or the other")
        if self.prometheus_url is not None:
            check_url(self.prometheus_url, "--prometheus-url")
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", self.folder):
            raise ConfigError(
                f"--folder {one_line(self.folder)!r}: expected a uid: 1 to 40 letters, digits, '-' and '_'"
            )


@dataclass(frozen=True, slots=True)
class PushResult:
    """Planned changes, those that were made, and the error at which the push stopped."""

    version: str
    """Version of Grafana."""
    changes: Sequence[Change]
    done: Sequence[Change] = ()
    error: KoopmonError | None = None


def push(access: GrafanaAccess, options: PushOptions) -> PushResult:
    """Bring Grafana to the wanted state; a second push with the same options writes nothing.

    Raises ConfigError when no Grafana is at that address, GrafanaDeniedError, GrafanaUnreachableError, and GrafanaError
    for every other error response, unless it has begun to write.
    """
    grafana = _Grafana(access)
    with closing(grafana):
        version = grafana.connect()
        changes = _plan(grafana, options)
        done: list[Change] = []
        try:
            for change in changes:
                if change.writes and not options.dry_run:
                    grafana.call(
                        *change.request, what=f"{change.action} {change.kind} {change.name!r}", kind=change.kind
                    )
                    done.append(change)
        except KoopmonError as error:
            return PushResult(version, changes, done, error)
    return PushResult(version, changes, done)


def _plan(grafana: _Grafana, options: PushOptions) -> list[Change]:
    force, given, folder = options.force, options.datasource, options.folder
    if given is None:
        source = grafana.read("data source", DATASOURCE_UID, resources.datasource_path())
        url = options.prometheus_url and options.prometheus_url.rstrip("/")
        changes = [resources.datasource(source, url, force=force)]
        source = source or {"uid": DATASOURCE_UID, "name": changes[0].name}
    else:
        source = _given_datasource(grafana, given)
        changes = [Change(kind="data source", name=given, action="unchanged", why="used as it is")]
    there = grafana.read("folder", folder, f"/folders/{folder}")
    changes.append(resources.folder(there, folder))
    for board in resources.wanted_dashboards(source["uid"], source["name"]):
        have = grafana.read("dashboard", board["title"], f"/dashboards/uid/{board['uid']}")
        changes.append(resources.dashboard(board, have, folder, force=force))
    groups = resources.wanted_rule_groups(source["uid"], folder, options.docs_url) if options.alerts else ()
    for group in groups:
        have = there and grafana.read("rule group", group["title"], resources.rule_group_path(group))
        changes.append(resources.rule_group(group, have, force=force))
    return changes


def _given_datasource(grafana: _Grafana, given: str) -> Json:
    shown = f"--datasource {one_line(given)!r}"
    paths = (resources.datasource_path(given, by) for by in ("uid", "name"))
    found = given and next(filter(None, (grafana.read("data source", given, path) for path in paths)), None)
    if not found:
        raise ConfigError(f"{shown}: Grafana has no data source of this uid or name")
    if "prometheus" not in str(found.get("type")):
        raise ConfigError(f"{shown}: is of type {one_line(found.get('type'))}; expected one of Prometheus")
    return found


class _Grafana:
    """HTTP API with koopmon's errors. No error quotes the token or a request body."""

    def __init__(self, access: GrafanaAccess) -> None:
        try:
            import niquests.exceptions
            from grafana_client import client
            from grafana_client.api import GrafanaApi
        except ImportError as error:
            missing = str(error.name).partition(".")[0]
            raise ConfigError(
                f'koopmon grafana push needs {missing}, which is not there: pip install "koopmon[grafana]"'
            ) from None
        self._access, self._errors, self._transport_errors = access, client, niquests.exceptions
        api = GrafanaApi.from_url(access.url, credential=access.token, timeout=access.timeout_seconds)
        self._client: Any = api.client
        self._client.s.max_redirects = 0  # a redirected request would arrive without its body
        self._client.s.headers["X-Disable-Provenance"] = "true"  # rules stay editable in Grafana's pages

    def close(self) -> None:
        self._client.s.close()

    def connect(self) -> str:
        """Check address and token; return Grafana's version."""
        settings = self.read(None, "its settings", "/frontend/settings") or {}
        if not isinstance(build := settings.get("buildInfo"), dict):
            raise self._no_grafana("its settings are missing")
        return one_line(build.get("version") or "", 40)

    def read(self, kind: Kind | None, name: str, path: str) -> Json | None:
        """Return a resource; None when it does not exist."""
        what = f"read {kind} {name!r}" if kind else f"read {name}"
        return self.call("GET", path, what=what, kind=kind, missing=None)

    def call(
        self, method: str, path: str, body: Json | None = None, *, what: str, kind: Kind | None, **missing: None
    ) -> Json | None:
        """Send one request and return its answer; `missing` is the answer in case of status 404."""
        where = f"Grafana at {self._access.url}"
        try:
            answer = getattr(self._client, method)(path, json=body)
        except self._errors.GrafanaTimeoutError:
            raise GrafanaUnreachableError(
                f"{where}: no answer within {self._access.timeout_seconds:g} s ({what})"
            ) from None
        except self._errors.GrafanaException as error:
            if error.status_code == 404 and missing:
                return None
            raise _refusal(error, where, what, kind) from None
        except (self._transport_errors.TooManyRedirects, self._transport_errors.JSONDecodeError):
            raise self._no_grafana(f"a redirect, or no JSON ({what})") from None
        except self._transport_errors.RequestException as error:
            raise GrafanaUnreachableError(f"{where}: cannot be reached: {_cause(error)} ({what})") from None
        if not isinstance(answer, dict):
            raise self._no_grafana(f"no JSON ({what})")
        return answer

    def _no_grafana(self, why: str) -> ConfigError:
        return ConfigError(
            f"grafana.url = {self._access.url!r}: no answer of Grafana's API: {why}; expected Grafana's address, with"
            " its sub-path if it has one"
        )


def _refusal(error: Any, where: str, what: str, kind: Kind | None) -> KoopmonError:
    status, answer = error.status_code, error.response
    said = answer.get("message") if isinstance(answer, dict) else None
    said = one_line(said or "no reason given", 200)
    match status:
        case 401:
            return GrafanaDeniedError(f"{where} does not know the token (401): {said}; has it expired?")
        case 403:
            needs = f"; it needs {PERMISSIONS[kind]}" if kind else ""
            return GrafanaDeniedError(f"{where}: the token may not {what} (403): {said}{needs}")
        case 404 if kind == "rule group":
            hint = "; rules need Grafana 9.1 or later: --no-alerts pushes the dashboards alone"
        case 409 | 412:
            hint = "; somebody changed it meanwhile, or has its name"
        case _:
            hint = ""
    return GrafanaError(f"{where}: cannot {what} ({status}): {said}{hint}")


def _cause(error: BaseException) -> str:
    """Return the operating system's message, because the messages of the libraries are long."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError) and inner.strerror:
            return one_line(inner.strerror, 160)
        inner = inner.__cause__ or inner.__context__
    return one_line(error, 160)
