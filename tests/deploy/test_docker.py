"""The image and the compose files under their own checkers, and the same processes without containers.

The tests do not use Docker's engine, so they build no image and start no container.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from koopmon.config import load
from tests.deploy.cluster import free_ports
from tests.deploy.conftest import DEPLOY, HOUSE, KOOPMON, Starter, beside_python, environment, parsed, ready, wait_until

httpx = pytest.importorskip("httpx")

DOCKERFILE = (DEPLOY / "docker/Dockerfile").read_text()
MONITOR_DIRECTORY = "/etc/koopmon"


def compose(*files: str) -> dict[str, Any]:
    """Return the compose files as docker-compose parses them."""
    options = [word for file in files for word in ("-f", str(DEPLOY / file))]
    done = subprocess.run(
        ["docker-compose", *options, "config"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    read: dict[str, Any] = yaml.safe_load(done.stdout)
    return read


def monitor_command() -> list[str]:
    return ["koopmon", *compose("compose.yaml")["services"]["monitor"]["command"]]


@pytest.mark.process
def test_the_dockerfile_is_clean() -> None:
    words = [beside_python("hadolint"), str(DEPLOY / "docker/Dockerfile")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.process
def test_torch_comes_first_and_alone() -> None:
    """Use the expression of the Dockerfile that reads the pin from constraints.txt."""
    (expression,) = re.findall(
        r'"\$\((sed [^)]*constraints\.txt)\)"', DOCKERFILE.replace("\\(", "\x01").replace("\\)", "\x02")
    )
    words = shlex.split(expression.replace("\x01", "\\(").replace("\x02", "\\)"))
    done = subprocess.run(words, cwd=HOUSE, capture_output=True, text=True, timeout=30, check=True)
    assert re.fullmatch(r"torch==[\d.]+\n", done.stdout)
    assert DOCKERFILE.index("${TORCH_PIP_ARGS} ") < DOCKERFILE.index('pip install -c constraints.txt ".[all]"')


@pytest.mark.process
def test_the_package_builds_from_what_the_image_is_made_of(tmp_path: Path) -> None:
    """.dockerignore admits every source of a COPY, and the sources are enough for a wheel."""
    let_through = {line[1:] for line in (HOUSE / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    context = tmp_path / "src"
    context.mkdir()
    for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.M):
        for source in line.split():
            assert source in let_through
            let_through.discard(source)
            path = HOUSE / source
            if path.is_dir():
                shutil.copytree(path, context / source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
            else:
                shutil.copy(path, context / source)
    assert not let_through, "nothing else is let through"
    words = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        ".",
    ]
    done = subprocess.run(
        words, cwd=context, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("koopmon-*.whl"))


def test_the_image_starts_a_monitor_as_nobody_of_note() -> None:
    (entry,) = re.findall(r'^ENTRYPOINT \["(\w+)"\]', DOCKERFILE, re.M)
    (verb,) = re.findall(r'^CMD \["(\w+)"\]', DOCKERFILE, re.M)
    parsed([entry, verb])
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.M) == ["10001:10001"]


def test_the_image_has_labels_and_a_base_with_a_digest() -> None:
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.M)
    assert re.fullmatch(r"python:3\.\d+-slim-\w+@sha256:[0-9a-f]{64}", bases[0])
    assert set(bases[1:]) == {"base"}
    labels = set(re.findall(r"org\.opencontainers\.image\.(\w+)=", DOCKERFILE))
    assert labels == {"title", "description", "licenses", "version", "revision", "source"}
    assert "PYTHONDONTWRITEBYTECODE=1" in DOCKERFILE, "its file system is read-only"


@pytest.mark.process
@pytest.mark.needs("docker-compose")
def test_the_compose_files_are_sound() -> None:
    services = compose("compose.yaml")["services"]
    with_gpu = compose("compose.yaml", "compose.gpu.yaml")["services"]["monitor"]
    assert with_gpu["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert with_gpu["command"] == services["monitor"]["command"]
    assert set(services) == {"keys", "monitor", "prometheus", "alertmanager", "grafana"}
    for name, service in services.items():
        assert service.get("user") != "root", name
        assert "privileged" not in service, name
        for port in service.get("ports", []):
            assert str(port).startswith("127.0.0.1:"), f"{name} publishes {port} beyond loopback"
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith(("/", ".")) or Path(source).exists(), f"{name}: {source}"
        assert re.search(r":v?\d", service["image"]) or service["image"].startswith("koopmon:"), name


@pytest.mark.process
@pytest.mark.needs("docker-compose")
def test_the_monitors_command_line_is_one() -> None:
    given = parsed(monitor_command())
    assert (given["bind"], given["bind_data"]) == ("tcp://0.0.0.0:9465", "tcp://0.0.0.0:9466")
    assert not given["insecure_plaintext_tcp"]
    assert given["config"] == Path(MONITOR_DIRECTORY) / "koopmon.toml"
    assert load(DEPLOY / "docker/koopmon.toml").security.insecure_plaintext_tcp is False


@pytest.mark.distributed
@pytest.mark.needs("docker-compose")
@pytest.mark.needs("prometheus")
@pytest.mark.needs("promtool")
def test_the_same_processes_without_containers(tmp_path: Path, start: Starter) -> None:
    """Run the keys' one-off service twice, the monitor with its command, a job on its host, and Prometheus."""
    keys, state = tmp_path / "keys", tmp_path / "state"
    for directory in (keys, state):
        directory.mkdir(mode=0o700)
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/koopmon"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(KOOPMON)} "$@"\n')
    program.chmod(0o755)
    env = environment(KOOPMON_KEYS=str(keys), PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    for _ in range(2):
        words = compose("compose.yaml")["services"]["keys"]["entrypoint"]
        subprocess.run(words, cwd=keys, env=env, check=True, timeout=90, stdout=subprocess.DEVNULL)
    secret = (keys / "monitor.secret").read_bytes()

    control, data, http, prometheus = free_ports(4)
    moved = {":9464": f":{http}", ":9465": f":{control}", ":9466": f":{data}", "/var/lib/koopmon": str(state)}
    moved |= {MONITOR_DIRECTORY: str(DEPLOY / "docker"), "--device=auto": "--device=cpu", "=0.0.0.0": "=127.0.0.1"}
    command = monitor_command()
    for old, new in moved.items():
        command = [word.replace(old, new) for word in command]
    process = start([*KOOPMON, *command[1:], "--ready-file", str(state / "ready")], env, cwd=state)
    ready(process, state / "ready")
    (check,) = re.findall(r"CMD \[\"python\", \"-c\", \"(.*)\"\]", DOCKERFILE)
    health = [sys.executable, "-c", check.replace(":9464", f":{http}")]
    assert subprocess.run(health, timeout=60, check=False).returncode == 0

    train = str(HOUSE / "tests/scripts/train_prose.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", train]
    guard = [*KOOPMON, "run", "--monitor", f"tcp://127.0.0.1:{control}", "--config", str(DEPLOY / "docker/agent.toml")]
    job = [*guard, "--run", "composed", "--", *torchrun, "--lr", "0.001", "--steps", "3", "--out", str(state / "out")]
    done = subprocess.run(job, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr

    text = (DEPLOY / "prometheus.yml").read_text().replace("monitor:9464", f"127.0.0.1:{http}")
    (tmp_path / "prometheus.yml").write_text(text)
    shutil.copy(HOUSE / "grafana/prometheus/koopmon.rules.yml", tmp_path)
    subprocess.run(["promtool", "check", "config", str(tmp_path / "prometheus.yml")], check=True, timeout=60)
    url = f"127.0.0.1:{prometheus}"
    options = [f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/tsdb"]
    with (tmp_path / "prometheus.log").open("wb") as log:
        start(["prometheus", *options, f"--web.listen-address={url}"], stdout=log, stderr=log)

    def ask(path: str, **params: str) -> Any:
        try:
            answer = httpx.get(f"http://{url}/api/v1/{path}", params=params, timeout=10)
        except httpx.TransportError:
            return None
        return answer.json()["data"] if answer.status_code == 200 else None

    query = 'koopmon_snapshots_received_total{run="composed",instance="127.0.0.1:9464"} > 0'
    assert wait_until(lambda: (ask("query", query=query) or {}).get("result")), "the target is not scraped"
    groups = ask("rules")["groups"]
    assert groups
    assert all(rule["health"] != "err" for group in groups for rule in group["rules"])
    assert (keys / "monitor.secret").read_bytes() == secret


@pytest.mark.process
@pytest.mark.needs("promtool")
def test_the_page_shows_configurations_that_prometheus_takes(tmp_path: Path) -> None:
    page = (HOUSE / "docs/deploy.md").read_text()
    shown = re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S)
    assert len(shown) == 2
    for number, text in enumerate(shown):
        file = tmp_path / f"{number}.yml"
        file.write_text(text)
        done = subprocess.run(
            ["promtool", "check", "config", str(file)], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
