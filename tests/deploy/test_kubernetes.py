"""The manifests: schemas of the core kinds, references between files, and the copies of the keys.

There is no cluster. Kinds of the Prometheus operator and of Kubeflow have no schema here. The tests check their pods as
pods, and the fields that their references need.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("kubernetes_validate")

import kubernetes_validate
import yaml

from koopmon.config import load
from koopmon.errors import KeysError
from koopmon.wire.auth_policy import AuthPolicy
from koopmon.wire.keys import read_secret
from tests.deploy.conftest import DEPLOY, HOUSE, koopmon, parsed

ROOM = DEPLOY / "kubernetes"
BASE, OVERLAY, EXAMPLES = ROOM / "base", ROOM / "overlays/example", ROOM / "examples"
VERSIONS = ("1.31", kubernetes_validate.latest_version())
CUSTOM = {
    "ServiceMonitor": ("spec.selector.matchLabels", "spec.endpoints"),
    "PrometheusRule": ("spec.groups",),
    "PyTorchJob": ("spec.pytorchReplicaSpecs.Master", "spec.nprocPerNode"),
    "TrainingRuntime": ("spec.mlPolicy.numNodes", "spec.template.spec.replicatedJobs"),
    "TrainJob": ("spec.runtimeRef.name", "spec.trainer.command"),
}
"""Required fields of a kind without a schema."""

Document = Mapping[str, Any]


def documents(path: Path) -> list[Document]:
    return list(yaml.safe_load_all(path.read_text()))


def kustomization(directory: Path) -> dict[str, Any]:
    (read,) = documents(directory / "kustomization.yaml")
    return dict(read)


RESOURCES = {
    document["kind"]: document for name in kustomization(BASE)["resources"] for document in documents(BASE / name)
}
JOBS = {document["kind"]: document for path in EXAMPLES.glob("*.yaml") for document in documents(path)}
POD = RESOURCES["Deployment"]["spec"]["template"]
(MONITOR,) = POD["spec"]["containers"]


def at(document: Any, path: str) -> Any:
    for part in path.split("."):
        document = document[part]
    return document


def pods(document: Document) -> Iterator[Document]:
    """Return the pod templates of a Kubeflow job."""
    match document["kind"]:
        case "PyTorchJob":
            yield from (replica["template"] for replica in document["spec"]["pytorchReplicaSpecs"].values())
        case "TrainingRuntime":
            yield from (
                job["template"]["spec"]["template"] for job in at(document, "spec.template.spec.replicatedJobs")
            )


def secrets(place: Path, keys: Path, *names: str) -> Path:
    """Create files like a Secret's volume with a group: symbolic links to files of mode 0440."""
    data = place / "..data"
    data.mkdir(parents=True)
    for name in names:
        (data / Path(name).name).write_bytes((keys / name).read_bytes())
        (data / Path(name).name).chmod(0o440)
        (place / Path(name).name).symlink_to(Path("..data") / Path(name).name)
    return place


def copy_keys(pod: Document, **places: Path) -> None:
    """Run the init container's script with its mount points in `places`, twice, as after a restart."""
    (container,) = pod["spec"]["initContainers"]
    words = list(container["command"])
    for name, place in sorted(places.items(), reverse=True):
        words[-1] = words[-1].replace(f"/{name.replace('_', '/')}", str(place))
    for _ in range(2):
        subprocess.run(words, check=True, timeout=30, umask=0o022)


@pytest.mark.parametrize("version", VERSIONS)
def test_core_kinds_follow_the_schemas(version: str) -> None:
    core = [document for kind, document in RESOURCES.items() if kind not in CUSTOM]
    assert {document["kind"] for document in core} >= {"Deployment", "Service", "NetworkPolicy", "Namespace"}
    templates = [pod for document in JOBS.values() for pod in pods(document)]
    assert len(templates) == 3
    in_jobs = [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **pod} for pod in templates]
    for document in [*core, *in_jobs]:
        kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_schemas_find_a_mistake(version: str) -> None:
    wrong = {**RESOURCES["Service"], "spec": {"ports": [{"port": "http"}], "selektor": {}}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, version, strict=True)


def test_other_kinds_have_what_they_need() -> None:
    found = {kind: document for kind, document in {**RESOURCES, **JOBS}.items() if kind in CUSTOM}
    assert set(found) == set(CUSTOM)
    for kind, document in found.items():
        assert document["metadata"]["name"]
        assert all(at(document, path) for path in CUSTOM[kind]), kind
    assert [c["name"] for pod in pods(JOBS["PyTorchJob"]) for c in pod["spec"]["containers"]] == ["pytorch"] * 2
    assert [c["name"] for pod in pods(JOBS["TrainingRuntime"]) for c in pod["spec"]["containers"]] == ["node"]
    assert JOBS["TrainJob"]["spec"]["runtimeRef"]["name"] == JOBS["TrainingRuntime"]["metadata"]["name"]


def test_every_file_is_used_and_every_name_is_of_something() -> None:
    files = {path.name for path in BASE.glob("*.yaml")} - {"kustomization.yaml"}
    assert files == set(kustomization(BASE)["resources"])
    volumes = {volume["name"]: volume for volume in POD["spec"]["volumes"]}
    for container in [*POD["spec"]["initContainers"], MONITOR]:
        assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)
    made = {each["name"] for each in kustomization(OVERLAY)["secretGenerator"]}
    assert {volume["secret"]["secretName"] for volume in volumes.values() if "secret" in volume} == made
    (config,) = kustomization(BASE)["configMapGenerator"]
    assert volumes["config"]["configMap"]["name"] == config["name"]
    assert (
        volumes["store"]["persistentVolumeClaim"]["claimName"] == RESOURCES["PersistentVolumeClaim"]["metadata"]["name"]
    )
    assert {container["image"] for container in [*POD["spec"]["initContainers"], MONITOR]} == {
        image["name"] for image in kustomization(OVERLAY)["images"]
    }
    # Two monitors on one history: the second one would not start.
    assert (RESOURCES["Deployment"]["spec"]["replicas"], at(RESOURCES["Deployment"], "spec.strategy.type")) == (
        1,
        "Recreate",
    )


def test_labels_and_ports_meet() -> None:
    labels = POD["metadata"]["labels"]
    (pairs,) = (each["pairs"] for each in kustomization(BASE)["labels"])
    assert at(RESOURCES["Deployment"], "spec.selector.matchLabels") == labels
    assert RESOURCES["Service"]["spec"]["selector"] == labels
    assert at(RESOURCES["NetworkPolicy"], "spec.podSelector.matchLabels") == labels
    selected = at(RESOURCES["ServiceMonitor"], "spec.selector.matchLabels")
    assert selected.items() <= pairs.items(), "which the service has from kustomize"
    assert at(RESOURCES["ServiceMonitor"], "spec.jobLabel") in pairs
    ports = {port["name"]: port["containerPort"] for port in MONITOR["ports"]}
    assert {port["name"]: port["port"] for port in RESOURCES["Service"]["spec"]["ports"]} == ports
    assert all(port["targetPort"] == port["name"] for port in RESOURCES["Service"]["spec"]["ports"])
    ingress = RESOURCES["NetworkPolicy"]["spec"]["ingress"]
    assert [[port["port"] for port in rule["ports"]] for rule in ingress] == [["control", "data"], ["http"]]
    assert [endpoint["port"] for endpoint in RESOURCES["ServiceMonitor"]["spec"]["endpoints"]] == ["http"]
    probes = {name: MONITOR[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert {probe["port"] for probe in probes.values()} == {"http"}
    assert [probe["path"] for probe in probes.values()] == ["/healthz", "/healthz", "/readyz"]
    given = parsed(["koopmon", *MONITOR["args"]])
    told = [given[name].rpartition(":")[2] for name in ("http", "bind", "bind_data")]
    assert told == [str(ports[name]) for name in ("http", "control", "data")]
    assert not given["insecure_plaintext_tcp"]


def test_the_configuration_is_one() -> None:
    assert load(BASE / "koopmon.toml").http.insecure_plaintext
    mounts = {mount["name"]: mount["mountPath"] for mount in MONITOR["volumeMounts"]}
    given = parsed(["koopmon", *MONITOR["args"]])
    assert given["config"] == Path(mounts["config"]) / "koopmon.toml"
    assert given["store"].parent == Path(mounts["store"])
    assert given["keys"] == Path(mounts["keys"]) / "koopmon"


def test_the_alerts_are_those_of_the_rules_file() -> None:
    (rules,) = documents(HOUSE / "grafana/prometheus/koopmon.rules.yml")
    assert RESOURCES["PrometheusRule"]["spec"] == rules, "prometheusrule.yaml has the command that writes it"


def test_nothing_runs_as_root_or_writes_to_its_image() -> None:
    security = POD["spec"]["securityContext"]
    assert security["runAsNonRoot"]
    assert security["runAsUser"] == security["fsGroup"] == 10001
    for container in [*POD["spec"]["initContainers"], MONITOR]:
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"]
        assert not context["allowPrivilegeEscalation"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert "memory" in container["resources"]["limits"]


@pytest.mark.process
def test_the_monitor_takes_the_copied_keys_and_would_not_take_the_mounted_ones(tmp_path: Path) -> None:
    keys = tmp_path / "made"
    koopmon("keys", "make", "--keys", str(keys))
    monitor, agents = (each["files"] for each in kustomization(OVERLAY)["secretGenerator"])
    mounted = secrets(tmp_path / "monitor", keys, *(file.removeprefix("keys/") for file in monitor))
    served = secrets(tmp_path / "agents", keys, *(file.removeprefix("keys/") for file in agents))
    target = tmp_path / "keys"
    target.mkdir()
    target.chmod(0o2777)  # an emptyDir for a group
    copy_keys(POD, secrets_monitor=mounted, secrets_agents=served, keys=target)
    trust = AuthPolicy(target / "koopmon")
    assert trust.monitor_secret() == AuthPolicy(keys).monitor_secret()
    assert len(trust.authorized_keys()._agents) == 1
    with pytest.raises(KeysError, match="lets others in"):
        read_secret(mounted, "monitor")


@pytest.mark.process
@pytest.mark.parametrize("kind", ["PyTorchJob", "TrainJob"])
def test_the_example_jobs_find_the_monitor_and_their_keys(tmp_path: Path, kind: str) -> None:
    keys = tmp_path / "made"
    koopmon("keys", "make", "--keys", str(keys))
    holder = JOBS["TrainingRuntime" if kind == "TrainJob" else kind]
    for number, pod in enumerate(pods(holder)):
        container = JOBS[kind]["spec"]["trainer"] if kind == "TrainJob" else pod["spec"]["containers"][0]
        given = parsed([*container["command"], *container["args"]])
        assert given["command"][0] == "torchrun"
        service = RESOURCES["Service"]["metadata"]["name"]
        control = next(port["port"] for port in RESOURCES["Service"]["spec"]["ports"] if port["name"] == "control")
        assert given["monitor"] == f"tcp://{service}.{kustomization(BASE)['namespace']}.svc:{control}"
        assert "KOOPMON_RUN" in {variable["name"] for variable in container["env"]}

        mounted = secrets(tmp_path / f"secret{number}", keys, "agent.secret", "agent.key", "monitor.key")
        target = tmp_path / f"keys{number}"
        target.mkdir(mode=0o777)
        copy_keys(pod, secrets=mounted, keys=target)
        (mount,) = pod["spec"]["containers"][0]["volumeMounts"]
        trust = AuthPolicy(target / given["keys"].relative_to(mount["mountPath"]))
        trust.check_agent_keys("tcp://10.0.0.1:9465")
        assert os.stat(target / "koopmon/agent.secret").st_mode & 0o077 == 0
