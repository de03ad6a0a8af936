"""Reading of the configuration: TOML, the environment and mappings become tables, or one line with what is allowed."""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
import re
import stat
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from koopmon.config.rules import Config
from koopmon.config.tables import PolicyConfig
from koopmon.errors import ConfigError, one_line

MAX_FILE_BYTES: Final = 1 << 20
"""Largest configuration file. A file with every default takes less than 10 kB."""


def _value_at(data: Any, path: str) -> Any:
    for part in re.findall(r"[^.\[\]]+", path):
        if isinstance(data, (list, tuple)) and part.isdecimal():
            part = int(part)
        elif not isinstance(data, Mapping) or part not in data:
            return None
        data = data[part]
    return data


def from_mapping(data: Mapping[str, Any], *, source: str = "configuration") -> Config:
    """Validate nested tables. Raises ConfigError with the field, the value and the allowed values."""
    try:
        return msgspec.convert(_with_following_defaults(data), Config, strict=True)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, ConfigError):
            raise ConfigError(f"{source}: {error.__cause__}") from None
        message, _, path = str(error).partition(" - at `$.")
        field = path.rstrip("`")
        known, unknown = message.partition("Object contains unknown field ")[::2]
        if not known:
            raise ConfigError(f"{source}: {_unknown(one_line(field, 80), one_line(unknown.strip('`'), 80))}") from None
        if not field:
            raise ConfigError(f"{source}: {message}; allowed tables: {', '.join(Config.__struct_fields__)}") from None
        value, what = _value_at(data, field), one_line(_expected(field, message))
        # The address of a webhook is a secret, and may stand in the wrong place.
        secret = field.startswith("notify") and not isinstance(value, (int, float))
        value = "(not shown)" if secret else _shown(value)
        raise ConfigError(f"{source}: {one_line(field, 80)} = {value}: {what}") from None


def _with_following_defaults(data: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the defaults of the other two thresholds if `act_risk` alone is given and contradicts them."""
    policy = data.get("policy")
    if not isinstance(policy, Mapping):
        return dict(data)
    act = policy.get("act_risk")
    if not isinstance(act, (int, float)) or not 0.0 < act < 1.0:
        return dict(data)
    default = PolicyConfig()
    severe, release = max(default.severe_risk, act), min(default.release_risk, act / 2)
    return {**data, "policy": {"severe_risk": severe, "release_risk": release, **policy}}


def checked(config: Config) -> Config:
    """Validate a configuration that was built in Python, which checks no bounds. Raises ConfigError."""
    return from_mapping(msgspec.to_builtins(config))


def _shown(value: Any) -> str:
    try:
        return one_line(repr(value))
    except ValueError:  # Python prints no integer of thousands of digits
        return "an integer of thousands of digits"


def _expected(field: str, message: str) -> str:
    """Add both bounds of a number, or the allowed values, to the message of msgspec, which has one bound or none."""
    found = _type_of(field)
    if isinstance(found, msgspec.inspect.LiteralType) and message.startswith("Invalid enum value"):
        return f"expected one of {', '.join(map(repr, found.values))}"
    kind, bounds = _bounds(field)
    if not bounds:
        return message[0].lower() + message[1:]
    _, comma, got = message.partition(", got ")
    return f"expected `{kind}` {' and '.join(bounds)}{comma}{got}"


def _bounds(field: str) -> tuple[str, list[str]]:
    """Return the type and the bounds of the number at TABLE.KEY; empty if the key is not a number."""
    found = _type_of(field)
    if not isinstance(found, (msgspec.inspect.IntType, msgspec.inspect.FloatType)):
        return "", []
    signs = {">": found.gt, ">=": found.ge, "<": found.lt, "<=": found.le}
    kind = "int" if isinstance(found, msgspec.inspect.IntType) else "float"
    return kind, [f"{sign} {bound}" for sign, bound in signs.items() if bound is not None]


def _type_of(field: str) -> msgspec.inspect.Type | None:
    return _types().get(re.sub(r"\[\d+\]", "", field))


@functools.cache
def _types() -> dict[str, msgspec.inspect.Type]:
    """Return the type of each TABLE.KEY. A key of a list of tables has no index."""

    def below(path: str, kind: Any) -> Iterator[tuple[str, msgspec.inspect.Type]]:
        kind = getattr(kind, "item_type", kind)
        yield path, kind
        for field in getattr(kind, "fields", ()):
            yield from below(f"{path}.{field.name}".lstrip("."), field.type)

    return dict(below("", msgspec.inspect.type_info(Config)))


def _unknown(table: str, name: str) -> str:
    kind: Any = _type_of(table)
    allowed = sorted(field.name for field in kind.fields)
    near = difflib.get_close_matches(name, allowed, n=1)
    meant = f", did you mean {near[0]}?" if near else ""
    what, where = ("field", f"{table}.{name}") if table else ("table", name)
    return f"there is no {what} {where}{meant} (allowed: {', '.join(allowed)})"


_VARIABLE = re.compile(r"KOOPMON_[A-Z0-9]+(_[A-Z0-9]+)*__[A-Z0-9]+(_[A-Z0-9]+)*")


def load(path: str | os.PathLike[str] | None = None, *, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read the TOML file at `path`, else at KOOPMON_CONFIG, else the defaults.

    Variables KOOPMON_TABLE__KEY replace keys of the file, and `overrides` replaces both. Raises ConfigError if the file
    is missing or invalid.
    """
    path = path or os.environ.get("KOOPMON_CONFIG") or None
    data: dict[str, Any] = {}
    source = "configuration"
    if path is not None:
        source = str(path)
        try:
            data = tomllib.loads(read_file(Path(path)).decode("utf-8"))
        except OSError as error:
            raise ConfigError(f"{source}: cannot be read: {error.strerror}") from None
        except ValueError as error:  # not TOML, not UTF-8, or an integer of thousands of digits
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{source}: not valid TOML: {one_line(error)}") from None
        except RecursionError:
            raise ConfigError(f"{source}: not valid TOML: nested too deeply") from None
    from_environment, names = _from_environment(os.environ)
    if names:
        source += f" with {', '.join(names)}"
    for table, values in [*from_environment.items(), *(overrides or {}).items()]:
        merged = data.get(table, {})
        data[table] = {**merged, **values} if isinstance(values, Mapping) and isinstance(merged, Mapping) else values
    return from_mapping(data, source=source)


def _from_environment(environ: Mapping[str, str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the tables of the variables KOOPMON_TABLE__KEY, and their names. A value is TOML, or else text."""
    tables: dict[str, dict[str, Any]] = {}
    names = sorted(name for name, value in environ.items() if _VARIABLE.fullmatch(name) and value)
    for name in names:
        table, key = name.removeprefix("KOOPMON_").lower().split("__", 1)
        value: Any = environ[name]
        kind = _types().get(f"{table}.{key}")
        kinds = kind.types if isinstance(kind, msgspec.inspect.UnionType) else (kind,)
        if not any(isinstance(each, msgspec.inspect.StrType) for each in kinds):
            with contextlib.suppress(ValueError, RecursionError):  # TOMLDecodeError is a ValueError
                value = tomllib.loads(f"value = {value}")["value"]
        tables.setdefault(table, {})[key] = value
    return tables, names


def read_file(path: Path) -> bytes:
    """Read a regular file of at most MAX_FILE_BYTES. Raises OSError, or ConfigError for any other kind of file."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ConfigError(f"{path}: not a regular file: directories, pipes and devices are refused")
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: {path.stat().st_size} bytes: the limit is {MAX_FILE_BYTES} bytes")
    return content
