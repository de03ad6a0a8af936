"""The application of typer, with the file of one verb loaded."""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module
from typing import Annotated

import typer

from koopmon import __version__
from koopmon.cli import VERBS
from koopmon.cli.console import set_verbosity
from koopmon.cli.overview import EPILOG, HELP, OPTIONS

_NEED_ARGUMENTS = ("run", "profile", "calibrate", "compare")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"koopmon {__version__}")
        raise typer.Exit


def make_app(loaded: Collection[str] = tuple(VERBS)) -> typer.Typer:
    """Return the application in which the verbs `loaded` work. The others are only listed by its help."""
    app = typer.Typer(
        name="koopmon",
        help=HELP,
        epilog=EPILOG,
        no_args_is_help=True,
        # The import of rich takes twice as long as all else that the list of verbs needs.
        rich_markup_mode="markdown" if loaded else None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_set_output)
    for name, (summary, example) in VERBS.items():
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
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help=OPTIONS["-q, --quiet"])] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help=OPTIONS["-v, --verbose"])] = False,
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help=OPTIONS["--version"]),
    ] = False,
) -> None:
    if quiet and verbose:
        raise typer.BadParameter("--quiet and --verbose contradict each other")
    set_verbosity("quiet" if quiet else "verbose" if verbose else "normal")


def _listed() -> None:
    """Stand in for a verb that is not loaded."""


def call(words: list[str], verb: str) -> object:
    """Run one command and return its result. Raises the errors of koopmon and of the option parser."""
    try:
        return make_app([verb] if verb in VERBS else [])(args=words, prog_name="koopmon", standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
