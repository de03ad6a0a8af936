"""The command line, one file per command. Nothing here imports torch before a command needs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

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
_VERBS: tuple[tuple[Callable[..., int], str], ...] = (
    (run.run, "run -- torchrun --nproc-per-node 2 train.py --lr 0.003"),
    (monitor.monitor, "monitor --bind tcp://127.0.0.1:9465 --http 127.0.0.1:9464 --device auto"),
    (profile.profile, "profile train.py:make_model_and_batch --png spectrum.png"),
    (calibrate.calibrate, "calibrate ~/.local/state/koopmon/runs/*.sqlite3 --out calibrator.json"),
    (report.report, "report train-1a2b3c4d --out report"),
    (replay.replay, "replay train-1a2b3c4d --policy careful.toml"),
    (doctor.doctor, "doctor --monitor tcp://127.0.0.1:9465 --run train-1a2b3c4d"),
    (demo.demo, "demo --policy lr"),
)
"""Each verb with the example of its help."""
_NEED_ARGUMENTS = (run.run, profile.profile, calibrate.calibrate, report.report, replay.replay)
for verb, example in _VERBS:
    # The words of a job belong to the job, also after its first one.
    settings = {"allow_interspersed_args": verb is not run.run}
    app.command(
        epilog=f"Example: koopmon {example}", no_args_is_help=verb in _NEED_ARGUMENTS, context_settings=settings
    )(verb)
for group in (adapters, keys, grafana):
    group.add_to(app)


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
