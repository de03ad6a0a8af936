"""Push to a running Grafana through its HTTP API. Only this module uses grafana_client.

grafana_client is an optional extra. It is imported late because it is slow to import and replaces urllib3.
"""

from __future__ import annotations

import re
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

from koopmon.deadline import LimitedCalls
from koopmon.errors import ConfigError, GrafanaDeniedError, GrafanaError, GrafanaUnreachableError, one_line
from koopmon.grafana import resources
from koopmon.grafana.access import GrafanaAccess, check_url
from koopmon.grafana.dashboards import Json
from koopmon.grafana.files import DATASOURCE_UID, FOLDER
from koopmon.grafana.resources import Change
from koopmon.grafana.rules import grafana_rule_groups

HINTS = {
    401: "; has it expired?",
    403: "; it needs role Editor, or Edit on the folder, and Admin for a data source",
    404: "; rules need Grafana 9.1 or later: --no-alerts pushes the dashboards alone",
    409: "; somebody changed it meanwhile, or has its name",
    412: "; somebody changed it meanwhile, or has its name",
}


@dataclass(frozen=True, slots=True)
class PushOptions:
    """Options of a push. Raises ConfigError with the name of the option."""

    datasource: str | None = None
    """Uid of an existing data source; None for our own."""
    prometheus_url: str | None = None
    """Address of Prometheus for our own data source; None accepts the present one."""
    folder: str = FOLDER
    docs_url: str | None = None
    alerts: bool = True
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
    """Grafana's version, all changes, and the error that stopped the push after it had begun to write."""

    version: str
    changes: list[Change]
    error: ConfigError | GrafanaError | None = None


def push_to(access: GrafanaAccess, options: PushOptions) -> PushResult:
    """Bring Grafana to the wanted state; a second push with the same options writes nothing.

    Raises ConfigError when no Grafana is at that address, GrafanaDeniedError, GrafanaUnreachableError, and GrafanaError
    for every other error response.
    """
    with closing(_Grafana(access)) as grafana:
        version = grafana.version()
        changes = _plan(grafana, options)
        for index, change in enumerate(changes):
            if change.writes and not options.dry_run:
                try:
                    grafana.call(*change.request, what=f"{change.action} {change.kind} {change.name!r}")
                except (ConfigError, GrafanaError) as error:
                    return PushResult(version, changes, error)
                changes[index] = replace(change, done=True)
    return PushResult(version, changes)


def _plan(grafana: _Grafana, options: PushOptions) -> list[Change]:
    force, given, folder_uid = options.force, options.datasource, options.folder
    name = DATASOURCE_UID if given is None else given
    source = grafana.read(f"data source {name!r}", f"/datasources/uid/{quote(name, safe='')}")
    if given is None:
        url = options.prometheus_url and options.prometheus_url.rstrip("/")
        changes = [resources.datasource(source, url, force=force)]
        source = source or {"uid": name, "name": changes[0].name}
    elif source is None or "prometheus" not in str(source.get("type")):
        raise ConfigError(f"--datasource {one_line(given)!r}: Grafana has no Prometheus data source of this uid")
    else:
        changes = [Change(kind="data source", name=given, action="unchanged", why="used as it is")]
    folder = grafana.read(f"folder {folder_uid!r}", f"/folders/{folder_uid}")
    changes.append(resources.folder(folder, folder_uid))
    for board in resources.wanted_dashboards(source["uid"], source["name"]):
        have = grafana.read(f"dashboard {board['title']!r}", f"/dashboards/uid/{board['uid']}")
        changes.append(resources.dashboard(board, have, folder_uid, force=force))
    for group in grafana_rule_groups(source["uid"], folder_uid, docs_url=options.docs_url) if options.alerts else ():
        have = folder and grafana.read(f"rule group {group['title']!r}", resources.rule_group_path(group))
        changes.append(resources.rule_group(group, have, force=force))
    return changes


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
        self._calls = LimitedCalls(access.timeout_seconds)
        self._client.s.max_redirects = 0  # a redirected request would arrive without its body
        self._client.s.headers["X-Disable-Provenance"] = "true"  # rules stay editable in Grafana's pages

    def close(self) -> None:
        self._client.s.close()

    def version(self) -> str:
        """Return Grafana's version, after a check of address and token."""
        settings = self.read("its settings", "/frontend/settings") or {}
        if not isinstance(build := settings.get("buildInfo"), dict):
            raise self._no_grafana("its settings are missing")
        return one_line(build.get("version") or "", 40)

    def read(self, name: str, path: str) -> Json | None:
        """Return a resource; None when it does not exist."""
        return self.call("GET", path, what=f"read {name}")

    def call(self, method: str, path: str, body: Json | None = None, *, what: str) -> Json | None:
        """Send one request and return its answer; None for a GET with status 404."""
        where = f"Grafana at {self._access.url}"
        try:
            answer = self._calls.run(lambda: getattr(self._client, method)(path, json=body))
        except (self._errors.GrafanaTimeoutError, TimeoutError):
            seconds = self._access.timeout_seconds
            raise GrafanaUnreachableError(f"{where}: no answer within {seconds:g} s ({what})") from None
        except self._errors.GrafanaException as error:
            if error.status_code == 404 and method == "GET":
                return None
            raise _refusal(error, where, what) from None
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


def _refusal(error: Any, where: str, what: str) -> GrafanaError:
    status, answer = error.status_code, error.response
    said = answer.get("message") if isinstance(answer, dict) else None
    words = f"({status}): {one_line(said or 'no reason given', 200)}{HINTS.get(status, '')}"
    if status == 401:
        return GrafanaDeniedError(f"{where} does not know the token {words}")
    if status == 403:
        return GrafanaDeniedError(f"{where}: the token may not {what} {words}")
    return GrafanaError(f"{where}: cannot {what} {words}")


def _cause(error: BaseException) -> str:
    """Return the operating system's message, because the messages of the libraries are long."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError) and inner.strerror:
            return one_line(inner.strerror, 160)
        inner = inner.__cause__ or inner.__context__
    return one_line(error, 160)
