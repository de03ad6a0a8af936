"""`koopmon monitor`: runs the monitor in the foreground."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from koopmon.cli.console import configure_logging
from koopmon.cli.launch_inspection import monitor_store
from koopmon.cli.options import ConfigFile, DryRun, KeysDirectory, PlaintextTcp, Policy, option, overrides
from koopmon.config import load


def monitor(
    bind: Annotated[str, option("ENDPOINT", "Control endpoint that agents connect to.")] = "tcp://127.0.0.1:9465",
    bind_data: Annotated[
        str | None, option("ENDPOINT", "Endpoint for snapshots, which the agents learn from it. Default: chosen.")
    ] = None,
    http: Annotated[
        str, option("HOST:PORT", "Address of the live page, /metrics, /healthz and /readyz.")
    ] = "127.0.0.1:9464",
    device: Annotated[str, option("auto|cpu|cuda:N", "Device that computes spectra.")] = "auto",
    store: Annotated[Path | None, option("FILE", "History, SQLite. Default: under XDG_STATE_HOME.")] = None,
    config: ConfigFile = None,
    policy: Policy = None,
    dry_run: DryRun = False,
    allow_stop: Annotated[
        bool, typer.Option("--allow-stop", help="Request the end of a ruined training ([policy] stop).")
    ] = False,
    keys: KeysDirectory = None,
    insecure_plaintext_tcp: PlaintextTcp = False,
    grafana_url: Annotated[
        str | None,
        option("URL", "Annotate each decision in this Grafana; its token: KOOPMON_GRAFANA_TOKEN, or a file."),
    ] = None,
    grafana_token_file: Annotated[
        Path | None, option("FILE", "Token of a service account of that Grafana, mode 0600.")
    ] = None,
    ready_file: Annotated[Path | None, option("FILE", "File to write, as JSON, once the monitor serves.")] = None,
    with_parent: Annotated[bool, typer.Option("--with-parent", hidden=True)] = False,
) -> int:
    """Run the monitor: compute spectra of snapshots, export metrics, and send commands to the agents.

    SIGTERM and SIGINT end it with status 0, after the history is written.
    """
    given = overrides("policy", name=policy, dry_run=dry_run, stop=allow_stop)
    given |= overrides("security", keys=keys, insecure_plaintext_tcp=insecure_plaintext_tcp)
    given |= overrides("grafana", url=grafana_url, token_file=grafana_token_file)
    settings = load(config, overrides=given)
    configure_logging()
    if with_parent:
        _end_with_parent()
    # Imported late because it imports torch.
    from koopmon.monitor import daemon

    monitor = daemon.Monitor(
        settings, bind=bind, data_bind=bind_data, http=http, device=device, store_path=store or monitor_store()
    )
    status = daemon.serve(monitor, ready_file)
    if with_parent:
        # The launcher waits for this process. All is closed, and an interpreter with torch takes 1 to 2 s to end.
        logging.shutdown()
        os._exit(status)
    return status


def _end_with_parent() -> None:
    """Send SIGTERM to this process when standard input ends. The launcher keeps it open during its own life."""

    def watch() -> None:
        # sys.stdin has a lock; a daemon thread that holds it would prevent the interpreter from exiting.
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="koopmon-parent", daemon=True).start()
