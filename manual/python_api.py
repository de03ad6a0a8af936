"""Python reference: the public names of koopmon with their signatures and docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

import koopmon

GROUPS: dict[str, Sequence[str]] = {
    "Guard a training": ("attach", "Agent"),
    "Inspect a model": ("profile", "discover", "SpectralProfile", "LayerProfile", "Discovery"),
    "Configuration and errors": ("Config", "KoopmonError", "ConfigError", "AdapterError", "DiscoveryError"),
    "Write an adapter": (
        "ArchitectureAdapter",
        "hookimpl",
        "Point",
        "Stack",
        "Observable",
        "ExampleModel",
        "BlockList",
        "block_lists",
        "row_stacks",
        "lists_holding",
        "parts_of",
        "normalised",
        "call_arguments",
    ),
}
"""Public names by purpose. Names without a group come last. A test requires every public name."""
OTHERS = "Others"
ELSEWHERE = {
    "Config": "Every table and key, frozen and validated: see [Configuration](configuration.md).",
    "hookimpl": "Marks a function as an implementation of one of koopmon's hooks, `koopmon_architecture_adapters` and"
    " `koopmon_example_models`; it is a `pluggy.HookimplMarker`.",
}
"""Texts that replace the docstring of a name."""
MODULES = re.compile(r"\b(?:torch(?:\.\w+)*|koopmon(?:\.\w+)+|collections\.abc|typing|pathlib)\.(?=[A-Z])")
WIDTH = 100


def page() -> str:
    """Return the page as Markdown."""
    parts = [
        "# Python",
        "",
        "All public names are in `koopmon`. `import koopmon` alone imports neither torch nor zmq. Shapes: N samples, D"
        " width, R svd_rank, L layers.",
        "",
    ]
    placed = {name for names in GROUPS.values() for name in names} | {"__version__"}
    for title, names in {**GROUPS, OTHERS: sorted(set(koopmon.__all__) - placed)}.items():
        parts += [f"## {title}", ""] if names else []
        for name in names:
            parts += _entry(name, getattr(koopmon, name))
    return "\n".join(parts)


def _entry(name: str, value: Any) -> list[str]:
    lines = [f"### koopmon.{name}", ""]
    if name in ELSEWHERE:
        return [*lines, ELSEWHERE[name], ""]
    if not inspect.isclass(value) or dataclasses.is_dataclass(value):  # a function builds the others
        lines += ["```python", _signature(f"koopmon.{name}", value), "```", ""]
    if own := _document(value):
        lines += [own, ""]
    for member, below in _members(value) if inspect.isclass(value) else ():
        head = member if isinstance(below, property) else _method(member, inspect.unwrap(below))
        lines += [f"`{name}.{head}`", "", f":   {_document(below).replace(chr(10), chr(10) + '    ')}", ""]
    return lines


def _members(kind: type) -> Iterator[tuple[str, Any]]:
    """Return the documented methods and properties of a class, in the order of its source."""
    for name, value in vars(kind).items():
        below = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if not name.startswith("_") and (isinstance(below, property) or inspect.isfunction(below)) and below.__doc__:
            yield name, below


def _method(name: str, function: Any) -> str:
    """Format the signature of a method on one line, without self."""
    signature = inspect.signature(function)
    return _plain(f"{name}{signature.replace(parameters=list(signature.parameters.values())[1:])}")


def _signature(name: str, value: Any) -> str:
    """Format a signature on one line if it fits, else with one parameter per line."""
    signature = inspect.signature(value)
    text = _plain(f"{name}{signature}")
    if len(text) <= WIDTH:
        return text
    rows, star = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            rows.append("*")
        star = star or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        rows.append(_plain(str(parameter)))
    listed = "".join(f"    {row},\n" for row in rows)
    return f"{name}(\n{listed}){text[text.rfind(' -> ') :] if ' -> ' in text else ''}"


def _plain(text: str) -> str:
    """Remove quotes and module names from annotations."""
    return MODULES.sub("", " ".join(text.replace("'", "").split())).replace("<factory>", "...")


def _document(value: Any) -> str:
    """Convert a docstring to Markdown, with indented blocks as code; empty for the generated one of a dataclass."""
    text = inspect.cleandoc(value.__doc__ or "")
    if text.startswith(f"{getattr(value, '__name__', '')}("):
        return ""
    blocks = []
    for block in re.split(r"\n\s*\n", text):
        is_code = all(line.startswith("    ") for line in block.split("\n"))
        blocks.append(block if is_code else _paragraph(block))
    return "\n\n".join(blocks)


def _paragraph(block: str) -> str:
    """Convert a paragraph to Markdown on one line; the arguments of an `Args:` block become a list."""
    head, _, rest = block.partition("\n")
    if head != "Args:":
        return re.sub(r"([<*])", r"\\\1", " ".join(block.split()))
    items = re.split(r"\n(?= {4}\w)", rest)
    return "\n".join(["Arguments:", "", *(re.sub(r"^(\w+):", r"- `\1`:", _paragraph(item)) for item in items)])
