"""The command line of the agent's install, which has no typer: `koopmon run --monitor ENDPOINT`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from koopmon import __version__
from koopmon.cli import COMPLETION, VERBS
from koopmon.cli.console import set_verbosity
from koopmon.cli.shared_monitor import run_with_shared_monitor
from koopmon.config import load
from koopmon.errors import ConfigError, MissingExtraError
from koopmon.run_names import check_run_name

EXTRA = "koopmon[monitor]"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def call_without(missing: str, words: Sequence[str]) -> int:
    """Run one command where the module `missing` of the extra `monitor` is not installed; return its exit status.

    Raises MissingExtraError for a command that needs the extra, and other errors of koopmon.
    """
    if COMPLETION in os.environ:
        return 0
    others = ", ".join(verb for verb in VERBS if verb != "run")
    parser = _Parser("koopmon", epilog=f"This is the agent's install: {others} need {EXTRA}.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"koopmon {__version__}")
    parser.add_argument("-q", "--quiet", action="store_true", help="print results, warnings and errors only")
    parser.add_argument("-v", "--verbose", action="store_true", help="print koopmon's whole log too")
    parser.add_argument("verb", nargs="?", help="run")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="...")
    given = parser.parse_args(words)
    if given.quiet or given.verbose:
        set_verbosity("quiet" if given.quiet else "verbose")
    if given.verb == "run":
        return _run(missing, given.words)
    if given.verb in VERBS:
        raise MissingExtraError(f"koopmon {given.verb}", missing, EXTRA)
    if given.verb is not None:
        raise ConfigError(f"No such command {given.verb!r}.")
    parser.print_help()
    return 2


def _run(missing: str, words: Sequence[str]) -> int:
    """Parse the options that `koopmon run` takes with --monitor, and run the job."""
    parser = _Parser("koopmon run", allow_abbrev=False, epilog=f"A monitor of the job's own needs {EXTRA}.")
    parser.add_argument("--monitor", metavar="ENDPOINT", help="endpoint of a running monitor")
    parser.add_argument("--config", metavar="FILE", type=Path, help="configuration, TOML; default: KOOPMON_CONFIG")
    parser.add_argument("--keys", metavar="DIR", type=Path, help="key files; default: KOOPMON_KEYS")
    parser.add_argument("--insecure-plaintext-tcp", action="store_true", help="no keys on tcp")
    parser.add_argument("--run", metavar="NAME", default=os.environ.get("KOOPMON_RUN") or None, help="name of the run")
    parser.add_argument("-q", "--quiet", action="store_true", help="print faults only")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- CMD...", help="the job's command")
    given, _ = parser.parse_known_args(words)
    if given.monitor is None:
        raise MissingExtraError("koopmon run without --monitor ENDPOINT", missing, EXTRA)
    given = parser.parse_args(words)
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    if not command:
        raise ConfigError("Missing argument '-- CMD...'.")
    security: dict[str, object] = {} if given.keys is None else {"keys": str(given.keys)}
    security |= {"insecure_plaintext_tcp": True} if given.insecure_plaintext_tcp else {}
    settings = load(given.config, overrides={"security": security} if security else {})
    if given.run is not None:
        check_run_name(given.run, "--run")
    if given.quiet:
        set_verbosity("quiet")
    return run_with_shared_monitor(
        command,
        given.monitor,
        settings,
        name=given.run,
        config=given.config,
        keys=given.keys,
        insecure_plaintext_tcp=given.insecure_plaintext_tcp,
    )
