"""Client of Grafana's HTTP API: reads existing resources and applies changes one by one. Only it uses grafana_client.

grafana_client is an optional extra. It is imported late because it is slow to import and replaces urllib3.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

from koopmon.errors import (
    ConfigError,
    GrafanaDeniedError,
    GrafanaError,
    GrafanaUnreachableError,
    KoopmonError,
    one_line,
)
from koopmon.grafana.access import GrafanaAccess
from koopmon.grafana.bundle import Bundle, DataSource
from koopmon.grafana.plan import Change, Found, ResourceKind
from koopmon.grafana.routes import merged_policies

Json = dict[str, Any]
RETRIES = 2
"""Retries after a refused connection or a status in RETRY_STATUSES. They are safe: each created resource has a fixed
uid, so a repeated request creates no duplicate."""
RETRY_STATUSES = (502, 503, 504)
BACKOFF_SECONDS = 0.5
FIRST_VERSION = (9, 1)
"""First Grafana version with the alerting provisioning API."""
EDITOR = "(role Editor, or Edit on the folder)"
PERMISSIONS: Mapping[ResourceKind, str] = {
    "data source": "datasources:read, datasources:create and datasources:write (role Admin)",
    "folder": "folders:read and folders:create (role Editor)",
    "dashboard": f"dashboards:read, dashboards:create and dashboards:write {EDITOR}",
    "rule group": f"alert.provisioning:read and alert.provisioning:write {EDITOR}",
    "contact point": "alert.provisioning:read and alert.provisioning:write (role Editor)",
    "notification policy": "alert.provisioning:read and alert.provisioning:write (role Editor)",
}


class Grafana:
    """A connection to Grafana with a verified token; a context manager.

    Methods raise ConfigError when no Grafana is at that address, GrafanaDeniedError, GrafanaUnreachableError, and
    GrafanaError for every other error response.
    """

    def __init__(self, access: GrafanaAccess) -> None:
        try:
            import niquests
            from grafana_client.api import GrafanaApi
            from grafana_client.client import GrafanaClientError, GrafanaException, GrafanaTimeoutError
            from niquests.adapters import HTTPAdapter
        except ImportError as error:
            missing = str(error.name).partition(".")[0]
            raise ConfigError(
                f'koopmon grafana push needs {missing}, which is not there: pip install "koopmon[grafana]"'
            ) from None
        self._access = access
        self._refused: Any = GrafanaClientError
        self._failed: Any = GrafanaException
        self._timed_out: Any = GrafanaTimeoutError
        self._broken: Any = niquests.exceptions
        self._api: Any = GrafanaApi.from_url(access.url, credential=access.token, timeout=access.timeout_seconds)
        session = self._api.client.s
        session.max_redirects = 0  # a redirected request would arrive without its body
        retries = niquests.RetryConfiguration(
            total=RETRIES,
            read=False,
            status_forcelist=RETRY_STATUSES,
            allowed_methods=None,
            backoff_factor=BACKOFF_SECONDS,
            respect_retry_after_header=False,
            raise_on_status=False,
        )
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=retries))
        self.version = ""

    def __enter__(self) -> Self:
        try:
            self._connect()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._api.client.s.close()

    def find_datasource(self, wanted: DataSource) -> Json | None:
        """Return the existing data source, or None. Raises ConfigError when a `given` data source is missing."""
        name = wanted.given if wanted.given is not None else wanted.body()["uid"]
        quoted, api = quote(name, safe=""), self._api.datasource
        found = self._get("data source", name, lambda: api.get_datasource_by_uid(quoted))
        if wanted.given is None:
            return found
        found = found or self._get("data source", name, lambda: api.get_datasource_by_name(quoted))
        if found is None:
            raise ConfigError(f"--datasource {one_line(name)!r}: Grafana has no data source of this uid or name")
        if "prometheus" not in str(found.get("type")):
            kind = one_line(found.get("type"))
            raise ConfigError(f"--datasource {one_line(name)!r}: is of type {kind}; expected one of Prometheus")
        return found

    def find(self, bundle: Bundle, datasource: Json | None) -> Found:
        """Read the existing resources of the bundle without changing anything."""
        folder = bundle.folder["uid"]
        api, alerting = self._api, self._api.alertingprovisioning
        if bundle.rule_groups or bundle.contacts:
            self._check_version()
        there = self._get("folder", folder, lambda: api.folder.get_folder(folder))
        dashboards = {
            uid: self._get("dashboard", uid, lambda uid=uid: api.dashboard.get_dashboard(uid))  # type: ignore[misc]
            for uid in bundle.dashboards
        }
        groups = {} if there is None else {group["title"]: group for group in bundle.rule_groups}
        titles = {title: quote(title, safe="") for title in groups}
        rule_groups = {
            title: self._get("rule group", title, lambda quoted=quoted: alerting.get_rule_group(folder, quoted))  # type: ignore[misc]
            for title, quoted in titles.items()
        }
        points, policies = [], None
        if bundle.contacts:
            points = self._list("contact point", alerting.get_contactpoints)
            policies = self._get("notification policy", "tree", alerting.get_notification_policy_tree)
            if policies is None:
                raise self._no_provisioning()
        return Found(
            datasource=datasource,
            folder=there,
            dashboards={uid: each for uid, each in dashboards.items() if each is not None},
            titles={} if there is None else self._titles(folder, bundle),
            rule_groups={title: each for title, each in rule_groups.items() if each is not None},
            contact_points=tuple(points),
            policies=policies,
        )

    def make(self, change: Change, *, force: bool = False) -> None:
        """Apply one change that writes."""
        api, alerting = self._api, self._api.alertingprovisioning
        free = {"disable_provenance": change.editable}
        uid, body = change.uid, change.body
        with self._asking(change.kind, change.name, verb=change.action):
            match change.kind, change.action:
                case "data source", "create":
                    api.datasource.create_datasource(body)
                case "data source", _:
                    api.datasource.update_datasource_by_uid(uid, body)
                case "folder", _:
                    api.folder.create_folder(body["title"], uid=uid)
                case "dashboard", _:
                    api.dashboard.update_dashboard(body)
                case "contact point", "create":
                    alerting.create_contactpoint(body, **free)
                case "contact point", "update":
                    alerting.update_contactpoint(uid, body, **free)
                case "contact point", _:
                    alerting.delete_contactpoint(uid)
                case "rule group", _:
                    alerting.update_rule_group(body["folderUid"], quote(uid, safe=""), body, **free)
                case _:
                    # The API writes the whole tree without a version check, so the tree is read again just before the
                    # write.
                    action, tree = merged_policies(alerting.get_notification_policy_tree(), force=force)
                    if action == "update":
                        alerting.set_notification_policy_tree(tree, **free)

    def _connect(self) -> None:
        """Check that Grafana is reachable and accepts the token."""
        with self._asking(None, "settings", verb="read"):
            try:
                settings = self._api.client.GET("/frontend/settings")
            except self._refused as error:
                if error.status_code == 404:
                    raise self._no_grafana("has no api/frontend/settings (404)") from None
                raise
        if not isinstance(settings, dict) or not isinstance(settings.get("buildInfo"), dict):
            raise self._no_grafana("answers with something else than Grafana's API")
        self.version = one_line(settings["buildInfo"].get("version") or "", 40)

    def _check_version(self) -> None:
        known = re.match(r"(\d+)\.(\d+)", self.version)
        if known and (int(known[1]), int(known[2])) < FIRST_VERSION:
            raise self._no_provisioning()

    def _no_provisioning(self) -> KoopmonError:
        return GrafanaError(
            f"Grafana {self.version or 'of this version'} has no alerting provisioning API, which 9.1 and later have;"
            " --no-alerts pushes the dashboards alone"
        )

    def _no_grafana(self, what: str) -> KoopmonError:
        url = self._access.url
        return ConfigError(
            f"grafana.url = {url!r}: {what}; expected Grafana's address, with its sub-path if it has one"
        )

    def _titles(self, folder: str, bundle: Bundle) -> dict[str, str]:
        wanted = {dashboard["title"]: uid for uid, dashboard in bundle.dashboards.items()}
        search = self._api.search.search_dashboards
        listed = self._list("dashboard", lambda: search(type_="dash-db", folder_uids=[folder], limit=5000))
        taken = [each for each in listed if each.get("title") in wanted and each.get("uid") != wanted[each["title"]]]
        return {each["title"]: one_line(each.get("uid"), 80) for each in taken}

    def _get(self, kind: ResourceKind, name: str, ask: Callable[[], Any]) -> Json | None:
        """Return one object; None when it does not exist."""
        with self._asking(kind, name, verb="read"):
            try:
                answer = ask()
            except self._refused as error:
                if error.status_code == 404:
                    return None
                raise
        if not isinstance(answer, dict):
            raise self._no_grafana(f"answers with something else than Grafana's API when asked for {kind} {name!r}")
        return answer

    def _list(self, kind: ResourceKind, ask: Callable[[], Any]) -> list[Json]:
        with self._asking(kind, "list", verb="read"):
            answer = ask()
        if not isinstance(answer, list) or not all(isinstance(each, dict) for each in answer):
            raise self._no_grafana(f"answers with something else than Grafana's API when asked for each {kind}")
        return answer

    @contextmanager
    def _asking(self, kind: ResourceKind | None, name: str, *, verb: str) -> Iterator[None]:
        """Convert exceptions to koopmon's errors. No message contains the token or a request body."""
        grafana, what = f"Grafana at {self._access.url}", f"{verb} {kind} {name!r}" if kind else f"{verb} its {name}"
        try:
            yield
        except self._timed_out:
            seconds = self._access.timeout_seconds
            raise GrafanaUnreachableError(f"{grafana}: no answer within {seconds:g} s ({what})") from None
        except self._failed as error:
            raise self._refusal(error.status_code, _said(error), kind, what) from None
        except self._broken.TooManyRedirects:
            raise self._no_grafana("sends elsewhere (a redirect)") from None
        except self._broken.JSONDecodeError:
            raise self._no_grafana(f"answers with something that is not JSON ({what})") from None
        except self._broken.SSLError as error:
            raise GrafanaUnreachableError(f"{grafana}: TLS failed: {_cause(error)}") from None
        except self._broken.RequestException as error:
            raise GrafanaUnreachableError(f"{grafana}: cannot be reached: {_cause(error)} ({what})") from None

    def _refusal(self, status: int, said: str, kind: ResourceKind | None, what: str) -> KoopmonError:
        grafana = f"Grafana at {self._access.url}"
        match status:
            case 401:
                return GrafanaDeniedError(f"{grafana} does not know the token (401): {said}; has it expired?")
            case 403:
                needs = f"; it needs {PERMISSIONS[kind]}" if kind else ""
                return GrafanaDeniedError(f"{grafana}: the token may not {what} (403): {said}{needs}")
            case 404 if kind in ("rule group", "contact point", "notification policy"):
                return GrafanaError(
                    f"{grafana}: cannot {what} (404): {said}; has Grafana {self.version} the alerting provisioning API?"
                )
            case 409 | 412:
                return GrafanaError(
                    f"{grafana}: cannot {what} ({status}): {said}; somebody changed it meanwhile, or has its name"
                )
            case _ if status >= 500:
                return GrafanaError(f"{grafana} failed ({status}) when asked to {what}: {said}")
            case _:
                return GrafanaError(f"{grafana} refuses to {what} ({status}): {said}")


def _said(error: Any) -> str:
    """Return Grafana's error message, shortened; a web page counts as no message."""
    answer = error.response
    text = answer.get("message") if isinstance(answer, dict) else answer
    text = " ".join(str(text or "").split())
    return "no reason given" if not text or text.startswith("<") else one_line(text, 200)


def _cause(error: BaseException) -> str:
    """Return the innermost cause with a message, because the wrapping messages of the libraries are long."""
    seen: set[int] = set()
    inner: BaseException | None = error
    while inner is not None and id(inner) not in seen:
        seen.add(id(inner))
        if isinstance(inner, OSError) and inner.strerror:
            return one_line(inner.strerror, 160)
        reason = getattr(inner, "reason", None) or (inner.args[0] if inner.args else None)
        inner = reason if isinstance(reason, BaseException) else inner.__cause__ or inner.__context__
    return one_line(str(error).partition("(Caused by")[0] or type(error).__name__, 160)
