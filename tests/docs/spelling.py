"""Parsing of koopmon command lines without running them."""

from __future__ import annotations

import re
import shlex

import typer

from koopmon.cli.app import make_app


def koopmon_words(command: str) -> list[str] | None:
    """Return the words after `koopmon` of a simple command; None for any other command."""
    words = words_of(command)
    return words[1:] if words[:1] == ["koopmon"] else None


def words_of(command: str) -> list[str]:
    """Return the program and its arguments, without variables set before it."""
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return words


def parse(words: list[str]) -> None:
    """Parse the words. Raises the exception of the option parser for invalid words."""
    command = typer.main.get_command(make_app())
    context = command.make_context("koopmon", list(words))
    while (rest := [*context._protected_args, *context.args]) and hasattr(command, "commands"):
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
