"""The process of a monitor: signals, ready file, Prometheus target and service manager."""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path

from koopmon.errors import EndpointError
from koopmon.files import open_private
from koopmon.monitor.daemon import Addresses, Monitor
from koopmon.monitor.http.address import reachable
from koopmon.monitor.systemd import Watchdog, sd_notify
from koopmon.monitor.target_file import TargetDirectory, announced


def serve(monitor: Monitor, ready_file: Path | None = None, targets: TargetDirectory | None = None) -> int:
    """Run a monitor until SIGTERM, SIGINT or SIGHUP; returns exit status 0. Call it in the main thread.

    When the monitor accepts messages, it writes a JSON object to `ready_file` (endpoint, data_endpoint, http, scheme,
    pid), and a target file of Prometheus to `targets`. The files are removed at the end, but for the ready file of a
    monitor for one job: a training that begins later must not wait for it. Under systemd it sends READY, WATCHDOG and
    STOPPING. Raises EndpointError, KeysError or StoreError, each one line, when it cannot start.
    """

    def ready(addresses: Addresses) -> None:
        gc.freeze()  # each full collection would walk over torch's objects, for 0.13 s of CPU time
        if ready_file is not None:
            _write_ready(ready_file, addresses)
        if targets is not None:
            stack.enter_context(announced(targets, reachable(addresses.http), addresses.scheme))
        sd_notify("READY=1")

    def stop(*_: object) -> None:
        sd_notify("STOPPING=1")
        monitor.stop()

    monitor.ready, monitor.turned = ready, Watchdog().alive
    _raise_descriptor_limit()
    with ExitStack() as stack:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup: the monitor outlives its terminal
            stack.callback(signal.signal, number, signal.signal(number, stop))
        if ready_file is not None and not monitor.one_job:
            stack.callback(_remove, ready_file)
        monitor.run()
    return 0


def _raise_descriptor_limit() -> None:
    """Raise the limit of open files to the system's maximum: each peer uses one descriptor.

    At the limit libzmq aborts the process for one more peer on ipc (ipc_listener.cpp), and accepts no further peer on
    tcp.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # some systems reject "unlimited"
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _write_ready(path: Path, addresses: Addresses) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open_private(temporary, truncate=True) as file:
            file.write(json.dumps({**asdict(addresses), "pid": os.getpid()}).encode())
        temporary.replace(path)
    except OSError as error:
        _remove(temporary)
        raise EndpointError(f"ready file {path}: cannot be written: {error.strerror}") from None


def _remove(path: Path) -> None:
    with suppress(OSError):  # a name that cannot be written may not be removable either
        path.unlink()
