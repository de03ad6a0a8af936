"""Slurm on this machine alone: two nodes, as daemons in a private directory."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

from tests.deploy.conftest import Starter, environment, wait_until

CONF = """
ClusterName=koopmon
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthInfo=socket={place}/munge/socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=1
ReturnToService=2
StateSaveLocation={place}/state
SlurmctldPort={ports[0]}
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd-%n.pid
SlurmdSpoolDir={place}/spool-%n
SlurmdParameters=config_overrides
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=4000
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=4000
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def free_ports(count: int) -> list[int]:
    """Find free ports."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class Cluster:
    """munged, slurmctld and two slurmds, started by `start`. Jobs are submitted from `home`."""

    def __init__(self, place: Path, start: Starter, **environ: str) -> None:
        self.home = place / "home"
        for name in ("munge", "state", "home"):
            (place / name).mkdir()
        (place / "munge/key").write_bytes(os.urandom(1024))
        (place / "munge/key").chmod(0o600)
        host = socket.gethostname().partition(".")[0]
        (place / "slurm.conf").write_text(CONF.format(place=place, host=host, ports=free_ports(3)))
        self.environ = environment(SLURM_CONF=str(place / "slurm.conf"), TMPDIR=str(place), **environ)
        files = [f"--{name}-file={place}/munge/{name}" for name in ("key", "log", "pid", "seed")]
        daemons = {
            "munged": ["munged", "--foreground", "--force", f"--socket={place}/munge/socket", *files],
            "slurmctld": ["slurmctld", "-D"],
            "node1": ["slurmd", "-D", "-N", "node1"],
            "node2": ["slurmd", "-D", "-N", "node2"],
        }
        for name, words in daemons.items():
            program = shutil.which(words[0], path=f"{os.environ['PATH']}:/usr/sbin")
            assert program is not None, words[0]
            with (place / f"{name}.log").open("wb") as log:
                start([program, *words[1:]], self.environ, stdout=log, stderr=log)
        wait_until(lambda: self.ask("sinfo", "--noheader", "--format=%t %D").split() == ["idle", "2"])

    def ask(self, *words: str, **environ: str) -> str:
        """Return the standard output of a Slurm command."""
        done = subprocess.run(
            words, env=self.environ | environ, cwd=self.home, capture_output=True, text=True, timeout=60, check=False
        )
        return done.stdout

    def submit(self, *words: str, **environ: str) -> str:
        """Submit a script with options before it; return the job's number."""
        number = self.ask("sbatch", "--parsable", *words, **environ).strip()
        assert number.isdigit(), words
        return number

    def state(self, job: str) -> str:
        match = re.search(r"JobState=(\S+)", self.ask("scontrol", "show", "job", job))
        return match[1] if match else "unknown"

    def finished(self, job: str) -> str:
        """Return the final state of a job."""
        wait_until(lambda: self.state(job) not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"))
        return self.state(job)

    def output(self, job: str) -> str:
        (file,) = self.home.glob(f"*-{job}.out")
        return file.read_text()
