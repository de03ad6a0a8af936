"""Checks of this machine: configuration, the job's Python, launcher, environment, disk space of the history."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from koopmon.agent.autoload import python_path
from koopmon.config import Config, load
from koopmon.doctor.findings import Finding, fail, ok, warn
from koopmon.doctor.http_checks import fix_of_refusal
from koopmon.errors import ConfigError, one_line
from koopmon.wire.messages import ProbeReply

CHILD_SECONDS = 20.0
LEAST_FREE_BYTES = 256 << 20
MIN_TORCH = (2, 7)
LOOK = """
import importlib.metadata, json, sys
def version(name):
    try:
        return importlib.metadata.version(name)
    except Exception:
        return None
hooks = [type(finder).__module__ for finder in sys.meta_path]
flags = [name for name in ("isolated", "no_site", "ignore_environment") if getattr(sys.flags, name)]
print(json.dumps({"live": "koopmon.agent.optimizer_watch" in hooks,
                  "koopmon": version("koopmon"), "torch": version("torch"),
                  "python": sys.version.split()[0], "prefix": sys.prefix, "flags": flags}))
"""


def configuration(path: Path | None, environ: Mapping[str, str]) -> tuple[Config | None, Finding]:
    """Read the settings as agents and monitors do; None when they are not valid."""
    source = str(path or environ.get("KOOPMON_CONFIG") or "")
    try:
        settings = load(path)
    except ConfigError as error:
        fix = "correct that value; koopmon/config/tables.py lists all keys with their bounds"
        return None, fail("config", str(error), fix)
    return settings, ok("config", f"{source} is valid" if source else "no file: the defaults are in force")


def python(program: str, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Start a short child of the job's Python as `koopmon run` does, and check that the import hook is active."""
    child = {key: value for key, value in environ.items() if key != "KOOPMON_ATTACHED_PID"}
    child["PYTHONPATH"] = python_path(environ)
    child["KOOPMON_ENDPOINT"] = "ipc:///nowhere/control"  # the child trains nothing and must not connect to a monitor
    install = f"{program} -m pip install koopmon"
    try:
        done = subprocess.run(
            [program, "-c", LOOK], env=child, capture_output=True, text=True, timeout=CHILD_SECONDS, check=False
        )
        found = json.loads(done.stdout)
    except (OSError, subprocess.TimeoutExpired) as error:
        yield fail("auto-attach", f"{program} cannot be run: {one_line(error)}", "give the job's Python with --python")
        return
    except ValueError:
        said = one_line(done.stderr.strip().rpartition("\n")[2] or done.stdout, 200)
        yield fail("auto-attach", f"{program} printed {said or 'nothing'}", "give the job's Python with --python")
        return
    where = f"Python {found['python']} at {program}"
    if found["koopmon"] is None:
        yield fail("auto-attach", f"{where} has no koopmon", install)
    elif found["live"]:
        yield ok("auto-attach", f"works for {where}, with koopmon {found['koopmon']}")
    else:
        flags = ", ".join(found["flags"])
        why = f"it ignores PYTHONPATH ({flags})" if flags else "its sitecustomize did not run"
        fix = "start it without -I, -E and -S, or call koopmon.attach(model, optimizer) in the script"
        yield fail("auto-attach", f"{where}: {why}", fix)
    yield _torch(found["torch"], program)
    yield _launcher(found["prefix"], environ)


def _torch(version: str | None, program: str) -> Finding:
    if version is None:
        return fail("torch", f"{program} has no torch", f"{program} -m pip install torch")
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    if numbers < MIN_TORCH:
        return fail("torch", f"{version} is older than 2.7", f"{program} -m pip install 'torch>=2.7'")
    return ok("torch", version)


def _launcher(prefix: str, environ: Mapping[str, str]) -> Finding:
    found = shutil.which("torchrun", path=environ.get("PATH"))
    if found is None:
        return warn("launcher", "torchrun is not on PATH", "`python -m torch.distributed.run` is equivalent")
    try:
        with open(found, "rb") as file:
            first = file.readline(4096).decode(errors="replace")
    except OSError as error:
        return warn("launcher", f"{found}: {error.strerror}", "`python -m torch.distributed.run` is equivalent")
    interpreter = next(iter(first.removeprefix("#!").split()), "") if first.startswith("#!") else ""
    if os.path.isabs(interpreter) and not interpreter.endswith("/env"):
        home = os.path.dirname(os.path.dirname(interpreter))
        if os.path.realpath(home) != os.path.realpath(prefix):
            fix = f"--python {interpreter} checks that one; activate one of the two for the job"
            return warn("launcher", f"{found} belongs to {interpreter}, not to the checked Python", fix)
    return ok("launcher", f"{found} belongs to the same Python")


def environment(environ: Mapping[str, str], reply: ProbeReply | None) -> Iterator[Finding]:
    """Check the environment variables that a job started from here inherits."""
    ranks = {name: environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in environ}
    bad = [f"{name}={value!r}" for name, value in ranks.items() if not value.isdigit()]
    if bad:
        yield fail("environment", f"{', '.join(bad)}: not a number", "unset them: the launcher sets them for each rank")
    elif ("RANK" in ranks) != ("WORLD_SIZE" in ranks):
        lacking = "WORLD_SIZE" if "RANK" in ranks else "RANK"
        said = f"{lacking} is missing beside {', '.join(ranks)}"
        yield warn("environment", said, "set both, or leave both to torchrun")
    elif "RANK" in ranks and int(ranks["RANK"]) >= int(ranks["WORLD_SIZE"]):
        said = f"RANK {ranks['RANK']} in a WORLD_SIZE of {ranks['WORLD_SIZE']}"
        yield fail("environment", said, "unset both: the launcher sets them for each rank")
    elif "RANK" in ranks:
        yield ok("environment", f"this is rank {ranks['RANK']} of {ranks['WORLD_SIZE']}")
    else:
        yield ok("environment", "no rank is set: the launcher sets them")
    if "KOOPMON_ATTACHED_PID" in environ:
        said = "KOOPMON_ATTACHED_PID is set: processes started from here count as children of an attached one"
        yield fail("environment", said, "unset KOOPMON_ATTACHED_PID")
    name = environ.get("KOOPMON_RUN")
    if name and reply is not None and reply.run == name and reply.refused:
        yield fail("run name", f"KOOPMON_RUN={name}: {reply.refused}", fix_of_refusal(reply.refused))
    elif name and reply is not None and reply.run == name and reply.run_state == "running":
        said = f"KOOPMON_RUN={name} is running already: another job of that name replaces it"
        yield warn("run name", said, "export KOOPMON_RUN=NAME with a different name for each concurrent job")
    elif name:
        yield ok("run name", f"KOOPMON_RUN={name}")


def store(directory: Path) -> Finding:
    """Check that `koopmon run` and `koopmon monitor` can write histories in `directory`."""
    there = directory
    while not there.exists() and there != there.parent:
        there = there.parent
    fix = "export XDG_STATE_HOME=DIRECTORY, or give --store FILE"
    try:
        with tempfile.TemporaryFile(dir=there):
            free = shutil.disk_usage(there).free
    except OSError as error:
        return fail("store", f"{directory} is not writable: {error.strerror}", fix)
    if free < LEAST_FREE_BYTES:
        return warn("store", f"{free >> 20} MiB free in {directory}: recording pauses on a full disk", fix)
    return ok("store", f"{directory} is writable, {free >> 30} GiB free")
