"""The sbatch scripts under shellcheck, and on a Slurm with two nodes on this machine, without GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from koopmon.history.reader import HistoryReader
from tests.deploy.cluster import Cluster, free_ports
from tests.deploy.conftest import DEPLOY, HOUSE, begun, beside_python, environment, koopmon, wait_until

SCRIPTS = DEPLOY / "slurm"
TRAIN = (str(HOUSE / "tests/scripts/train_prose.py"), "--lr", "0.001")


@pytest.mark.process
@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sbatch")), ids=lambda path: path.name)
def test_scripts_are_clean(script: Path) -> None:
    words = [beside_python("shellcheck"), str(script)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.process
@pytest.mark.parametrize(
    ("words", "environ", "told"),
    [
        ([], {}, "usage: sbatch"),
        (["train.py"], {"MONITOR": "gpu"}, "MONITOR=gpu: allowed are cpu and spare"),
        (["train.py"], {"MONITOR": "spare"}, "a node of this job has 0 GPUs"),
        (["train.py"], {"MONITOR": "spare", "SLURM_GPUS_ON_NODE": "1"}, "a node of this job has 1 GPUs, expected 2"),
    ],
)
def test_mistakes_are_refused_before_anything_starts(words: list[str], environ: dict[str, str], told: str) -> None:
    command = ["bash", str(SCRIPTS / "koopmon.sbatch"), *words]
    done = subprocess.run(command, env=environment(**environ), capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if os.geteuid() != 0:
        pytest.skip("slurmd runs as root alone")
    place = tmp_path_factory.mktemp("slurm")
    koopmon("keys", "make", "--keys", str(place / "keys"))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with begun() as start:
        cluster = Cluster(place, start, PATH=path, KOOPMON_KEYS=str(place / "keys"), USER="root")
        yield cluster
        cluster.ask("scancel", "--user=root", "--full")
        wait_until(lambda: cluster.ask("squeue", "--noheader") == "")


def ended(log: Path) -> str:
    """The training script's message at its end."""
    told: dict[str, str] = json.loads(log.read_text().splitlines()[-1])
    return told["end"]


@pytest.mark.distributed
@pytest.mark.needs("slurmctld")
def test_a_job_with_a_monitor_of_its_own_on_two_nodes(cluster: Cluster) -> None:
    log = cluster.home / "train.jsonl"
    job = cluster.submit("--nodes=2", str(SCRIPTS / "koopmon.sbatch"), *TRAIN, "--steps", "12", "--out", str(log))
    assert cluster.finished(job) == "COMPLETED", cluster.output(job)
    assert ended(log) == "finished"
    kept = cluster.home / f"koopmon-{job}"
    assert "2 ranks" in (kept / "monitor.log").read_text()
    with HistoryReader.open(kept / "history.sqlite3") as history:
        assert history.runs() == [f"koopmon-{job}"]


@pytest.mark.distributed
@pytest.mark.needs("slurmctld")
def test_before_its_time_limit_a_job_ends_in_order(cluster: Cluster) -> None:
    """Slurm sends the script its signal: the ranks end, then the monitor, after everything is written."""
    log = cluster.home / "long.jsonl"
    job = cluster.submit(str(SCRIPTS / "koopmon.sbatch"), *TRAIN, "--steps", "100000", "--out", str(log))
    wait_until(lambda: log.exists() and len(log.read_text().splitlines()) > 3)
    cluster.ask("scancel", "--batch", "--signal=TERM", job)
    assert cluster.finished(job) == "FAILED", "the ranks were ended, and the job says so"
    kept = cluster.home / f"koopmon-{job}"
    assert (kept / "monitor.log").read_text().rstrip().endswith("monitor: stopped")
    assert "ended with status" not in cluster.output(job)
    assert not list(cluster.home.parent.glob(f"koopmon-{job}.*")), "nothing is left on the node"


@pytest.mark.distributed
@pytest.mark.needs("slurmctld")
def test_without_keys_the_job_runs_unguarded(cluster: Cluster) -> None:
    log = cluster.home / "unguarded.jsonl"
    words = (*TRAIN, "--steps", "3", "--out", str(log))
    job = cluster.submit(str(SCRIPTS / "koopmon.sbatch"), *words, KOOPMON_KEYS=str(cluster.home / "none"))
    assert cluster.finished(job) == "COMPLETED", cluster.output(job)
    assert ended(log) == "finished"
    assert "runs unguarded" in cluster.output(job)
    assert "koopmon keys make" in cluster.output(job)


@pytest.mark.distributed
@pytest.mark.needs("slurmctld")
def test_two_jobs_share_a_monitor_that_outlives_them(cluster: Cluster) -> None:
    shared = cluster.home / "shared"
    port, data_port, http_port = map(str, free_ports(3))
    settings = {"KOOPMON_HOME": str(shared), "STORE": str(shared / "store/monitor.sqlite3")}
    ports = {"PORT": port, "DATA_PORT": data_port, "HTTP_PORT": http_port}
    monitor = cluster.submit("--nodelist=node2", str(SCRIPTS / "monitor.sbatch"), **settings, **ports)
    wait_until(lambda: (shared / "endpoint").exists())
    names = ("alice", "bob")
    jobs = [
        cluster.submit(
            f"--job-name={name}",
            str(SCRIPTS / "attached.sbatch"),
            *(*TRAIN, "--steps", "6", "--out", str(cluster.home / f"{name}.jsonl")),
            **settings,
        )
        for name in names
    ]
    assert [cluster.finished(job) for job in jobs] == ["COMPLETED", "COMPLETED"]
    cluster.ask("scancel", "--batch", "--signal=TERM", monitor)
    assert cluster.finished(monitor) == "COMPLETED", cluster.output(monitor)
    assert not (shared / "endpoint").exists()
    with HistoryReader.open(shared / "store/monitor.sqlite3") as history:
        assert sorted(history.runs()) == [f"{name}-{job}" for name, job in zip(names, jobs, strict=True)]
