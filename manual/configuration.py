"""Configuration reference: every table and key of koopmon.config with its description, default and bounds."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from koopmon import config
from koopmon.config import Config
from manual.cells import cell

READERS = {
    "agent": ("model", "sampling", "cadence", "limits", "control"),
    "monitor": ("monitor", "http", "grafana", "notify", "store", "risk", "policy"),
}
"""Process that reads a table, as in the docstring of koopmon.config. Both read the tables that are not listed."""
UNITS = {
    "seconds": "seconds",
    "per_second": "per second",
    "bytes": "bytes",
    "bytes_per_second": "bytes per second",
    "days": "days",
    "steps": "optimizer steps",
    "every": "optimizer steps",
}
"""Unit of a key, by the end of its name."""


def page() -> str:
    """Return the page as Markdown."""
    parts = [
        "# Configuration",
        "",
        "`--config` or `KOOPMON_CONFIG` selects one TOML file. Every key is optional. koopmon refuses a file with an"
        " unknown table or key, or with a value outside its bounds, and prints one line with the allowed values.",
        "",
        "```toml",
        "[policy]",
        "dry_run = true        # decide and record, but send nothing",
        "",
        "[limits]",
        "min_lr_scale = 0.25   # lower bound that the agent enforces on every command",
        "```",
        "",
    ]
    for name, table in tables():
        parts += [f"## [{name}]", "", f"{_paragraph(table.__doc__)} {_reader(name)}", ""]
        parts += ["| key | default | allowed | description |", "|---|---|---|---|", *_rows(table), ""]
    parts += [
        "## Relations between keys",
        "",
        "koopmon also refuses a file that breaks one of these rules. A missing key has its default.",
        "",
        "| rule | otherwise |",
        "|---|---|",
        *(f"| {cell(f'`{rule.condition}`')} | {cell(rule.otherwise)} |" for rule in config.RULES),
        "",
    ]
    return "\n".join(parts)


def tables() -> Iterator[tuple[str, type[config.Section]]]:
    """Return every table by its name. The name of a list of tables is in brackets, as in TOML."""
    for name, table in get_type_hints(Config).items():
        yield name, table
        for key, hint in get_type_hints(table).items():
            if get_origin(hint) is tuple and issubclass(get_args(hint)[0], config.Section):
                yield f"[{name}.{key}]", get_args(hint)[0]


def _documents(table: type[config.Section]) -> dict[str, str]:
    """Return the text below each field in the source."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(table))).body
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for field, below in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            told = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else ""
            found[field.target.id] = _paragraph(str(told))
    return found


def _rows(table: type[config.Section]) -> Iterator[str]:
    hints = get_type_hints(table, include_extras=True)
    documents = _documents(table)
    for field in msgspec.structs.fields(table):
        unit = _unit(field.name, documents[field.name])
        said = f"{documents[field.name]} {unit}".strip()
        yield f"| `{field.name}` | {_value(field.default)} | {cell(_kind(hints[field.name]))} | {cell(said)} |"


def _unit(name: str, told: str) -> str:
    """Return the unit of a key if its text does not contain it."""
    units = [unit for ending, unit in UNITS.items() if f"_{name}".endswith(f"_{ending}")]
    return f"In {units[-1]}." if units and units[-1].split()[-1] not in told.lower() else ""


def _value(value: Any) -> str:
    if value is msgspec.NODEFAULT:
        return "required"
    if value is None:
        return "absent"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(_quoted, value))}]`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{_quoted(value)}`" if isinstance(value, str) else f"`{_number(value)}`"


def _quoted(text: str) -> str:
    return f'"{text}"'


def _number(value: float) -> str:
    """Format a number as TOML does."""
    return f"{value:g}" if isinstance(value, float) and value < 1e6 else f"{int(value):_}"


def _kind(hint: Any) -> str:
    """Describe type and bounds in words, from the constraints that msgspec checks."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        unit = "entries" if get_origin(arguments[0]) is tuple else "characters"
        return " ".join([_kind(arguments[0]), *_bounds(arguments[1:], unit)])
    if origin in (Union, UnionType):
        return " ".join(_kind(each) for each in arguments if each is not NoneType)
    if origin is tuple:
        (item, _) = arguments
        return "tables" if isinstance(item, type) and issubclass(item, config.Section) else f"list of {_kind(item)}"
    if origin is Literal:
        return ", ".join(f'`"{value}"`' for value in arguments)
    return {int: "integer", float: "number", str: "text", bool: "`true`, `false`"}[hint]


def _bounds(metas: tuple[msgspec.Meta, ...], unit: str) -> Iterator[str]:
    for meta in metas:
        signs = {">": meta.gt, "≥": meta.ge, "<": meta.lt, "≤": meta.le}
        yield from (f"{sign} {_number(bound)}" for sign, bound in signs.items() if bound is not None)
        if meta.max_length is not None:
            yield f"of at most {meta.max_length} {unit}"
        if meta.pattern is not None:
            yield f"like `{meta.pattern}`"


def _reader(name: str) -> str:
    top = name.strip("[]").partition(".")[0]
    who = next((who for who, tables in READERS.items() if top in tables), None)
    return "Read by both sides." if who is None else f"Read by the {who}."


def _paragraph(text: str | None) -> str:
    return " ".join(inspect.cleandoc(text or "").split())
