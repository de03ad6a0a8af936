"""The Helm chart, rendered by Helm itself: schemas of the core kinds, and the same monitor as in the manifests.

Helm is a Go library, whose runtime gets a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

if find_spec("helm_python") is None:
    pytest.importorskip("helm_python")
pytest.importorskip("kubernetes_validate")

import kubernetes_validate

from koopmon.config import load
from tests.deploy.conftest import DEPLOY, HOUSE, parsed

pytestmark = pytest.mark.process
CHART = DEPLOY / "helm/koopmon"
EVERYTHING = {
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
    "env": [{"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://collector:4318"}],
    "image": {"repository": "registry.example.org/koopmon", "tag": "cpu", "pullSecrets": [{"name": "pull"}]},
    "persistence": {"storageClass": "fast", "size": "20Gi"},
    "nodeSelector": {"disk": "ssd"},
    "tolerations": [{"operator": "Exists"}],
    "podLabels": {"team": "a"},
    "podAnnotations": {"a": "b"},
}
CUSTOM = {"ServiceMonitor", "PrometheusRule"}
Documents = dict[tuple[str, str], dict[str, Any]]


def helm(call: str, **given: Any) -> Any:
    """Return the value of an expression over `Chart`, `lint`, `path` and `given`. Raises HelmError."""
    code = f"""
import json, sys
from helm_python.chart import Chart, lint
from helm_python.errors import HelmError
path, given = json.loads(sys.argv[1])
try:
    print(json.dumps({call}))
except HelmError as error:
    sys.exit(f"HelmError: {{error}}")
"""
    words = [sys.executable, "-c", code, json.dumps([str(CHART), given])]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise HelmError(done.stderr)
    return json.loads(done.stdout)


class HelmError(Exception):
    """Refusal of Helm."""


def render(values: Mapping[str, Any] | None = None, name: str = "koopmon") -> Documents:
    """Return the manifests by kind and name."""
    given = {"values": dict(values or {}), "name": name, "namespace": "watch"}
    texts = helm("Chart.load(path).render(**given)", **given)
    found = [each for path, text in texts.items() if "NOTES" not in path for each in yaml.safe_load_all(text) if each]
    return {(each["kind"], each["metadata"]["name"]): each for each in found}


def test_helm_s_linter_has_no_complaint() -> None:
    found = helm("lint(path, **given)", strict=True)
    assert found["errors"] == []
    assert [each["error"] for each in found["messages"]] == ["icon is recommended"]


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["default", "everything"])
@pytest.mark.parametrize("version", ["1.31", kubernetes_validate.latest_version()])
def test_core_kinds_follow_the_schemas(values: dict[str, Any], version: str) -> None:
    documents = render(values)
    kinds = {kind for kind, _ in documents}
    assert kinds >= {"Deployment", "Service", "NetworkPolicy", "PersistentVolumeClaim", "ConfigMap"}
    assert (kinds >= CUSTOM) is bool(values)
    for (kind, _), document in documents.items():
        assert document["metadata"]["labels"]["app.kubernetes.io/part-of"] == "koopmon"
        if kind not in CUSTOM:
            kubernetes_validate.validate(document, version, strict=True)


def test_the_monitor_is_that_of_the_manifests() -> None:
    """Security, probes, volumes and the copies of the keys: tests/deploy/test_kubernetes.py runs those."""
    ours = render()["Deployment", "koopmon"]["spec"]["template"]["spec"]
    theirs = yaml.safe_load((DEPLOY / "kubernetes/base/deployment.yaml").read_text())["spec"]["template"]["spec"]
    for spec in (ours, theirs):
        for container in (*spec["initContainers"], *spec["containers"]):
            del container["image"]
            container.pop("imagePullPolicy", None)
    for volume in theirs["volumes"]:
        if volume["name"] == "store":
            volume["persistentVolumeClaim"]["claimName"] = "koopmon"
        if volume["name"] == "config":
            volume["configMap"]["name"] = "koopmon"
    assert ours == theirs
    parsed(["koopmon", *ours["containers"][0]["args"]])


def test_selectors_and_ports_agree() -> None:
    documents = render(EVERYTHING, name="mine")
    pod = documents["Deployment", "mine-koopmon"]["spec"]["template"]
    labels = pod["metadata"]["labels"]
    service = documents["Service", "mine-koopmon"]
    monitor, policy = documents["ServiceMonitor", "mine-koopmon"], documents["NetworkPolicy", "mine-koopmon"]
    for selector in (
        documents["Deployment", "mine-koopmon"]["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        policy["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert service["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "koopmon"
    ports = {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} == ports
    assert monitor["spec"]["endpoints"][0]["port"] in ports
    assert policy["spec"]["egress"] == []


def test_dashboards_and_rules_are_those_of_the_repository() -> None:
    documents = render(EVERYTHING)
    boards = {
        name: text
        for document in documents.values()
        if document["metadata"]["labels"].get("grafana_dashboard") == "1"
        for name, text in document["data"].items()
    }
    files = {path.name: json.loads(path.read_text()) for path in (HOUSE / "grafana/dashboards").glob("*.json")}
    assert {name: json.loads(text) for name, text in boards.items()} == files
    rules = yaml.safe_load((HOUSE / "grafana/prometheus/koopmon.rules.yml").read_text())
    assert documents["PrometheusRule", "koopmon"]["spec"] == rules
    assert documents["PrometheusRule", "koopmon"]["metadata"]["labels"]["release"] == "prometheus"


def test_the_runbooks_may_have_a_static_address() -> None:
    given = {"prometheusRule": {"enabled": True, "docsUrl": "https://docs.example.org/alerts/"}}
    groups = render(given)["PrometheusRule", "koopmon"]["spec"]["groups"]
    alerts = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    assert alerts
    for rule in alerts:
        assert rule["annotations"]["runbook_url"] == f"https://docs.example.org/alerts/#{rule['alert']}"


def test_the_configuration_is_read_and_a_change_restarts_the_pod(tmp_path: Path) -> None:
    changed = {"config": "[http]\ninsecure_plaintext = true\n[policy]\nname = 'observe'\n"}
    sums = set()
    for values, policy in (({}, "lr"), (changed, "observe")):
        documents = render(values)
        (tmp_path / "koopmon.toml").write_text(documents["ConfigMap", "koopmon"]["data"]["koopmon.toml"])
        read = load(tmp_path / "koopmon.toml")
        assert read.http.insecure_plaintext
        assert (read.policy.name == "observe") is (policy == "observe")
        annotations = documents["Deployment", "koopmon"]["spec"]["template"]["metadata"]["annotations"]
        sums.add(annotations["checksum/config"])
    assert len(sums) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"device": "tpu"},
        {"replicas": 2},
        {"persistence": {"size": "much"}},
        {"serviceMonitor": {"enabled": "yes"}},
        {"prometheusRule": {"enabled": True, "docsUrl": "alerts.html"}},
        {"dashboards": {"enabled": True, "labels": {"a": 1}}},
        {"image": {"repository": ""}},
        {"networkPolicy": {"enabled": True, "egres": []}},
    ],
    ids=str,
)
def test_the_schema_refuses_a_mistake(wrong: dict[str, Any]) -> None:
    with pytest.raises(HelmError, match="HelmError"):
        render(wrong)


def test_parts_can_be_left_out() -> None:
    without = {"networkPolicy": {"enabled": False}, "dashboards": {"enabled": False}}
    kinds = [kind for kind, _ in render(without | {"persistence": {"existingClaim": "mine"}})]
    assert sorted(kinds) == ["ConfigMap", "Deployment", "Service"]
