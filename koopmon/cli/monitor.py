"""`koopmon monitor`: runs the monitor in the foreground."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from koopmon.cli.console import configure_logging, say
from koopmon.cli.launch_inspection import monitor_store, targets_directory
from koopmon.cli.options import (
    ConfigFile,
    DryRun,
    KeysDirectory,
    PlaintextTcp,
    Policy,
    TargetsDirectory,
    option,
    overrides,
)
from koopmon.config import NotifyConfig, load
from koopmon.errors import ConfigError

PATIENCE_SECONDS = 1.0
"""Time in seconds after which a line in the terminal reports the start."""


def monitor(
    bind: Annotated[str, option("ENDPOINT", "Control endpoint that agents connect to.")] = "tcp://127.0.0.1:9465",
    bind_data: Annotated[
        str | None, option("ENDPOINT", "Endpoint for snapshots, which the agents learn from it. Default: chosen.")
    ] = None,
    http: Annotated[
        str, option("HOST:PORT", "Address of the live page, /metrics, /healthz and /readyz.")
    ] = "127.0.0.1:9464",
    web_config: Annotated[
        Path | None,
        option("FILE", "TLS and users of the pages: web.config.yml of exporter-toolkit.", "--web-config"),
    ] = None,
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
    sd_directory: TargetsDirectory = None,
    sd_run: Annotated[str, option("NAME", "The one run of this monitor.", "--sd-run", hidden=True)] = "",
    test_notify: Annotated[
        bool,
        typer.Option("--test-notify", help="Send a test to each target of [notify], print the results, and end."),
    ] = False,
    with_parent: Annotated[bool, typer.Option("--with-parent", hidden=True)] = False,
) -> int:
    """Run the monitor: compute spectra of snapshots, export metrics, and send commands to the agents.

    SIGTERM, SIGINT and SIGHUP end it with status 0, after the history is written. The status of --test-notify is 1 if a
    target did not take the test.
    """
    given = overrides("policy", name=policy, dry_run=dry_run, stop=allow_stop)
    given |= overrides("security", keys=keys, insecure_plaintext_tcp=insecure_plaintext_tcp)
    given |= overrides("grafana", url=grafana_url, token_file=grafana_token_file)
    given |= overrides("http", web_config=web_config)
    settings = load(config, overrides=given)
    configure_logging()
    if test_notify:
        return _test_notify(settings.notify)
    if with_parent:
        _end_with_parent()
    waiting = threading.Timer(
        PATIENCE_SECONDS, say, ["the monitor is starting: it imports torch and opens its history"]
    )
    waiting.daemon = True
    if sys.stderr.isatty():
        waiting.start()
    try:
        # Imported late because it imports torch.
        from koopmon.monitor.daemon import Monitor
        from koopmon.monitor.process import serve
        from koopmon.monitor.target_file import TargetDirectory

        monitor = Monitor(
            settings,
            bind=bind,
            data_bind=bind_data,
            http=http,
            device=device,
            store_path=store or monitor_store(),
            one_job=with_parent,
        )
    finally:
        waiting.cancel()
    targets = TargetDirectory(sd_directory or targets_directory(), sd_run, wanted=sd_directory is not None)
    status = serve(monitor, ready_file, targets)
    # All is closed. An interpreter with torch takes 1 to 2 s to end, and aborts if a thread still computes a profile.
    logging.shutdown()
    os._exit(status)


def _test_notify(settings: NotifyConfig) -> int:
    """Send a test to each target; return 0 if all targets took it, else 1."""
    from koopmon.notify.notifier import send_test
    from koopmon.notify.targets import read_targets

    targets = read_targets(settings, os.environ)
    if not targets:
        raise ConfigError("notify.webhooks, notify.mail: expected at least one target for --test-notify")
    failures = {target.label: send_test(target) for target in targets}
    for label, why in failures.items():
        say(f"{label}: {f'not sent: {why}' if why else 'sent'}")
    return 1 if any(failures.values()) else 0


def _end_with_parent() -> None:
    """Send SIGTERM to this process when standard input ends. The launcher keeps it open during its own life."""

    def watch() -> None:
        # sys.stdin has a lock; a daemon thread that holds it would prevent the interpreter from exiting.
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="koopmon-parent", daemon=True).start()
