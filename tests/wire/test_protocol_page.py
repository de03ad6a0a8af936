"""PROTOCOL.md agrees with messages.py, field by field."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import msgspec.inspect as inspect
import pytest

import koopmon.wire
from koopmon.wire.codec import DTYPES
from koopmon.wire.headers import MAGIC, PREFIX, REJECTION_REASONS, UNBOUNDED_SCALARS, WireLimits
from koopmon.wire.messages import (
    DROP_REASONS,
    PROTOCOL_VERSION,
    AgentMessage,
    AnyMessage,
    Applied,
    Judgement,
    KssSettings,
    LoggedScalar,
    Message,
    Rewind,
    Shard,
    TrainingStep,
)

PAGE = (Path(koopmon.wire.__file__).parent / "PROTOCOL.md").read_text(encoding="utf-8")
MESSAGES = AnyMessage.__args__
STRUCTS = [Message, *MESSAGES, TrainingStep, LoggedScalar, KssSettings, Rewind, Applied, Judgement]


def describe(kind: inspect.Type) -> str:
    """Format a type as on the page."""
    match kind:
        case inspect.UnionType(types=types):
            return " or ".join(describe(each) for each in types)
        case inspect.NoneType():
            return "nil"
        case inspect.BoolType():
            return "bool"
        case inspect.StructType(cls=cls):
            return cls.__name__
        case inspect.LiteralType(values=values):
            return "one of " + ", ".join(f"`{value}`" for value in values)
        case inspect.DictType(key_type=key, value_type=value, max_length=most):
            return f"map of {describe(key)} to {describe(value)}" + (f", at most {most}" if most is not None else "")
        case inspect.ListType(item_type=item, max_length=most) | inspect.VarTupleType(item_type=item, max_length=most):
            return f"list of {describe(item)}, at most {most}"
        case inspect.StrType(min_length=least, max_length=most, pattern=pattern):
            return f"str `{pattern}`" * bool(pattern) + f"str {least or 0} to {most}" * (
                most is not None and not pattern
            )
        case inspect.IntType() | inspect.FloatType():
            name = "int" if isinstance(kind, inspect.IntType) else "float"
            bounds = [("ge", ">= "), ("gt", "> "), ("le", "<= "), ("lt", "< ")]
            parts = [
                f"{sign}{number(getattr(kind, bound))}" for bound, sign in bounds if getattr(kind, bound) is not None
            ]
            return " ".join([name, *parts])
    raise AssertionError(f"no words for {kind}")


def number(value: float) -> str:
    power = value.bit_length() - 1 if isinstance(value, int) else 0
    return f"2^{power}" if power >= 10 and value == 1 << power else f"{value:g}" if value < 1e6 else str(value)


def describe_default(field: inspect.Field) -> str:
    match field.default:
        case _ if field.required:
            return "required"
        case None:
            return "nil"
        case bool() as value:
            return str(value).lower()
        case int() | float() as value:
            return f"{value:g}"
        case msgspec.Struct():
            return "its defaults"
        case _:  # "" or a factory of an empty map
            return "empty"


def rows_of(struct: type[msgspec.Struct]) -> list[tuple[str, str, str]]:
    """Return (field, type, default) as on the page; the page lists the fields of `Message` once."""
    inherited = () if struct is Message else Message.__struct_fields__
    fields = inspect.type_info(struct).fields
    return [(f.name, describe(f.type), describe_default(f)) for f in fields if f.name not in inherited]


def tables() -> dict[str, list[list[str]]]:
    """Return the page's tables by heading, cell by cell."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in PAGE.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("| "):
            found.setdefault(heading, []).append([cell.strip() for cell in line.strip("|").split(" | ")])
    return {name: rows[1:] for name, rows in found.items()}


def section(name: str) -> str:
    return PAGE.split(f"\n#### {name}\n")[1].split("\n#")[0]


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
def test_table_lists_every_field_with_its_type_and_default(struct: type[msgspec.Struct]) -> None:
    rows = tables().get(struct.__name__, [])
    assert [tuple(row[:3]) for row in rows] == rows_of(struct)
    assert all(len(row) == 4 and row[3].strip("| ") for row in rows), "a field without a meaning"


@pytest.mark.parametrize("struct", MESSAGES, ids=lambda struct: struct.__name__)
def test_type_and_direction_are_named(struct: type[msgspec.Struct]) -> None:
    assert f"`type` is `{struct.__struct_config__.tag}`" in section(struct.__name__)
    from_agents = PAGE.split("\n### From agents\n")[1].split("\n### From the monitor\n")[0]
    assert (f"#### {struct.__name__}\n" in from_agents) == (struct in (*AgentMessage.__args__, Shard))


def test_no_message_is_listed_that_does_not_exist() -> None:
    assert set(re.findall(r"^#### (\w+)$", PAGE, re.MULTILINE)) == {struct.__name__ for struct in STRUCTS}


def test_version() -> None:
    assert PAGE.startswith(f"# The koopmon protocol, version {PROTOCOL_VERSION}\n")
    assert f"| {len(MAGIC)} | the protocol version, {PROTOCOL_VERSION} |" in PAGE
    assert f"| 0 to {len(MAGIC) - 1} | `{MAGIC.decode()}` in ASCII |" in PAGE
    assert bytes([*MAGIC, PROTOCOL_VERSION]) == PREFIX


def test_limits_reasons_and_dtypes() -> None:
    limits = {row[0].strip("`"): int(row[1]) for row in tables()["Limits of a receiver"]}
    assert limits == {name: getattr(WireLimits(), name) for name in WireLimits.__slots__}
    assert tuple(row[0].strip("`") for row in tables()["Rejections"]) == REJECTION_REASONS
    dtypes = {row[0].strip("`"): int(row[1].strip("| ")) for row in tables()["2. Frames"] if "`" in row[0]}
    assert dtypes == {name: dtype.itemsize for name, dtype in DTYPES.items()}
    assert all(f"`{name}`" in PAGE.split("### Numbers that are not finite")[1] for name in UNBOUNDED_SCALARS)
    assert all(f"`{reason}`" in section("Heartbeat") for reason in DROP_REASONS)
