"""The command line, one file per command. A call imports the file of its own verb only."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Sequence
from importlib import import_module
from typing import Annotated

import typer

from koopmon import __version__
from koopmon.cli.console import set_verbosity, warn
from koopmon.errors import KoopmonError

__all__ = ["main", "make_app"]

_VERBS = {
    "run": (
        "Guard an unchanged training job, on one node with a monitor of its own.",
        "run -- torchrun --nproc-per-node 2 train.py --lr 0.003",
    ),
    "monitor": (
        "Run the monitor: compute spectra of snapshots, export metrics, and send commands to the agents.",
        "monitor --bind tcp://127.0.0.1:9465 --http 127.0.0.1:9464 --device auto",
    ),
    "runs": ("List the recorded runs and the running jobs, and delete histories.", ""),
    "profile": (
        "Profile a model's residual stream from one forward pass: its spectrum, layer by layer, and its initial risk.",
        "profile train.py:make_model_and_batch --png spectrum.png",
    ),
    "calibrate": (
        "Fit the probability that a run diverges, from its spectrum at the start and its learning rate.",
        "calibrate ~/.local/state/koopmon/runs/*.sqlite3 --out calibrator.json",
    ),
    "report": (
        "Write a report of a run: one HTML file that needs no other file.",
        "report train-1a2b3c4d --out report",
    ),
    "replay": (
        "Decide a recorded run again under another policy, and list the actions with their steps.",
        "replay train-1a2b3c4d --config careful.toml",
    ),
    "compare": (
        "Compare runs side by side, and list the facts that only the bad ones share.",
        "compare good-1a2b3c4d bad-5e6f7a8b",
    ),
    "export": (
        "Write the snapshots, layers or commands of a run as CSV, JSON, Parquet or Arrow.",
        "export train-1a2b3c4d --format csv --out train.csv",
    ),
    "doctor": (
        "Find out why the monitor does not see a job, and print each finding with its fix.",
        "doctor --monitor tcp://127.0.0.1:9465 --run train-1a2b3c4d",
    ),
    "demo": (
        "Train a model four times on two ranks, alone and under koopmon, and compare: under 5 minutes.",
        "demo --policy lr",
    ),
    "adapters": ("List the architecture adapters with the plugin and the distribution of each.", ""),
    "keys": ("Create, list and rotate the keys of monitor and agents.", ""),
    "grafana": ("Dashboards and alert rules for Prometheus and Grafana.", ""),
}
"""The first line of each verb's help, and the example of its help. A group has its examples in its own file."""
_NEED_ARGUMENTS = ("run", "profile", "calibrate", "compare")
COMPLETION = "_KOOPMON_COMPLETE"
"""The variable of typer's completion scripts."""


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"koopmon {__version__}")
        raise typer.Exit


def make_app(loaded: Collection[str] = tuple(_VERBS)) -> typer.Typer:
    """Return the application in which the verbs `loaded` work. The others are only listed by its help."""
    app = typer.Typer(
        name="koopmon",
        help="Detect training divergence early, in the spectrum of the residual stream, and prevent it.",
        epilog="Example: koopmon run -- torchrun --nproc-per-node 2 train.py",
        no_args_is_help=True,
        # The import of rich takes twice as long as all else that the list of verbs needs.
        rich_markup_mode="markdown" if loaded else None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_set_output)
    for name, (summary, example) in _VERBS.items():
        module = import_module(f"koopmon.cli.{name}") if name in loaded else None
        if module is None:
            app.command(name, short_help=summary)(_listed)
        elif not example:
            module.add_to(app)
        else:
            # The words of a job belong to the job, also after its first one.
            settings = {"allow_interspersed_args": name != "run"}
            app.command(
                name,
                short_help=summary,
                epilog=f"Example: koopmon {example}",
                no_args_is_help=name in _NEED_ARGUMENTS,
                context_settings=settings,
            )(getattr(module, name))
    return app


def _set_output(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print results, warnings and errors only.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print koopmon's whole log too.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit."),
    ] = False,
) -> None:
    if quiet and verbose:
        raise typer.BadParameter("--quiet and --verbose contradict each other")
    set_verbosity("quiet" if quiet else "verbose" if verbose else "normal")


def _listed() -> None:
    """Stand in for a verb that is not loaded."""


def _typed(words: list[str]) -> list[str]:
    """Return the words after `koopmon`: those of a call, or of the line that a shell completes."""
    if COMPLETION not in os.environ:
        return words
    line = os.environ.get("_TYPER_COMPLETE_ARGS") or os.environ.get("COMP_WORDS", "")
    return line.split()[1:]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. A user error is one line on standard error, without a traceback."""
    words = sys.argv[1:] if argv is None else list(argv)
    verb = next((word for word in _typed(words) if not word.startswith("-")), "")
    try:
        app = make_app([verb] if verb in _VERBS else [])
        status = app(args=words, prog_name="koopmon", standalone_mode=False)
    except KoopmonError as error:
        warn(str(error))
        return error.exit_status
    except (KeyboardInterrupt, typer.Abort):
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
            warn(text)
        return int(getattr(error, "exit_code", 2))
    return status if isinstance(status, int) else 0
