"""The command line, one file per command. Nothing here imports torch before a command needs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from koopmon.cli import adapters, calibrate, demo, doctor, grafana, keys, monitor, profile, replay, report, run
from koopmon.cli.console import say
from koopmon.errors import KoopmonError

__all__ = ["app", "main"]

app = typer.Typer(
    name="koopmon",
    help="Detect training divergence early, in the spectrum of the residual stream, and prevent it.",
    epilog="Example: koopmon run -- torchrun --nproc-per-node 2 train.py",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (run, monitor, profile, calibrate, report, replay, doctor, demo, adapters, keys, grafana):
    verb.add_to(app)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. A user error is one line on standard error, without a traceback."""
    try:
        status = app(args=None if argv is None else list(argv), prog_name="koopmon", standalone_mode=False)
    except KoopmonError as error:
        say(str(error))
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has closed standard output; without the redirect the flush at exit would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        # The attribute identifies the option parser's own errors, whichever click package raises them.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        if text := " ".join(message().split()):  # empty after the help of a bare command
            say(text)
        return int(getattr(error, "exit_code", 2))
    return status if isinstance(status, int) else 0
