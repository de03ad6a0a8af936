"""The command line, one file per command. A call imports the file of its own verb only.

The agent's install has no typer: there `koopmon.cli.agent_only` reads the command line.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

from koopmon.cli.console import warn
from koopmon.cli.extras import missing_for_monitor
from koopmon.errors import KoopmonError

__all__ = ["VERBS", "main"]

VERBS = {
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
COMPLETION = "_KOOPMON_COMPLETE"
"""The variable of typer's completion scripts."""


def _typed(words: list[str]) -> list[str]:
    """Return the words after `koopmon`: those of a call, or of the line that a shell completes."""
    if COMPLETION not in os.environ:
        return words
    line = os.environ.get("_TYPER_COMPLETE_ARGS") or os.environ.get("COMP_WORDS", "")
    return line.split()[1:]


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. A user error is one line on standard error, without a traceback."""
    words = sys.argv[1:] if argv is None else list(argv)
    verb = next((word for word in _typed(words) if not word.startswith("-")), "")
    try:
        if missing := missing_for_monitor():
            from koopmon.cli.agent_only import call_without

            return call_without(missing, words)
        if words in (["-h"], ["--help"]) and COMPLETION not in os.environ:
            from koopmon.cli.overview import overview

            print(overview({name: summary for name, (summary, _) in VERBS.items()}), flush=True)  # noqa: T201 - standard output
            return 0
        from koopmon.cli.app import call

        status = call(words, verb)
        if sys.stdout is not None:
            sys.stdout.flush()  # at the exit an error would be a traceback
    except KoopmonError as error:
        warn(str(error))
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has closed standard output; without the redirect the flush at exit would fail again.
        _discard_output()
        return 141
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        _discard_output()
        warn(f"standard output cannot be written: {error.strerror}")
        return 1
    except Exception as error:
        # The attribute identifies the option parser's own errors, whichever click package raises them.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        if text := " ".join(message().split()):  # empty after the help of a bare command
            warn(text)
        return int(getattr(error, "exit_code", 2))
    return status if isinstance(status, int) else 0
