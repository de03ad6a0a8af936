"""Writers of `koopmon export`: CSV, JSON, Parquet and Arrow, each in batches of rows."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import TextIOWrapper
from itertools import islice
from types import ModuleType
from typing import Any, BinaryIO

from koopmon.errors import MissingExtraError
from koopmon.views.export_tables import ExportTable, Row

BATCH_ROWS = 10_000
SUFFIXES = {".csv": "csv", ".json": "json", ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow"}
"""Formats by the suffix of a file's name."""


def write_csv(table: ExportTable, rows: Iterable[Row], out: BinaryIO) -> None:
    """Write a line of column names, and one line for each row. Unknown values are empty, flags 0 or 1."""
    text = TextIOWrapper(out, encoding="utf-8", newline="", write_through=True)
    try:
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow(column.name for column in table.columns)
        lines.writerows(map(_for_csv, row) for row in rows)
    finally:
        text.detach()


def _for_csv(value: str | float | None) -> str | float | None:
    if isinstance(value, bool):
        return int(value)
    # Not every reader takes Python's "nan" for a number.
    return "NaN" if isinstance(value, float) and math.isnan(value) else value


def write_json(table: ExportTable, rows: Iterable[Row], out: BinaryIO) -> None:
    """Write an array with one object for each row, on lines of their own. A number that is not finite becomes null."""
    names = [column.name for column in table.columns]
    before = "["
    for row in rows:
        plain = (None if isinstance(value, float) and not math.isfinite(value) else value for value in row)
        out.write(f"{before}\n{json.dumps(dict(zip(names, plain, strict=True)))}".encode())
        before = ","
    out.write(b"[]\n" if before == "[" else b"\n]\n")


def write_parquet(table: ExportTable, rows: Iterable[Row], out: BinaryIO) -> None:
    """Write a Parquet file with one row group for each batch. Raises MissingExtraError without pyarrow."""
    arrow = require_pyarrow("parquet")
    from pyarrow import parquet

    schema = _schema(arrow, table)
    with parquet.ParquetWriter(out, schema) as writer:
        for batch in _batches(arrow, schema, rows):
            writer.write_batch(batch)


def write_arrow(table: ExportTable, rows: Iterable[Row], out: BinaryIO) -> None:
    """Write an Arrow IPC file, also called Feather. Raises MissingExtraError without pyarrow."""
    arrow = require_pyarrow("arrow")
    schema = _schema(arrow, table)
    with arrow.ipc.new_file(out, schema) as writer:
        for batch in _batches(arrow, schema, rows):
            writer.write_batch(batch)


FORMATS: Mapping[str, Callable[[ExportTable, Iterable[Row], BinaryIO], None]] = {
    "csv": write_csv,
    "json": write_json,
    "parquet": write_parquet,
    "arrow": write_arrow,
}
BINARY = ("parquet", "arrow")


def require_pyarrow(form: str) -> ModuleType:
    """Import pyarrow. Raises MissingExtraError."""
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise MissingExtraError(f"--format {form}", "pyarrow", "koopmon[export]") from None
    return pyarrow  # type: ignore[no-any-return]


def _schema(arrow: Any, table: ExportTable) -> Any:
    kinds = {"text": arrow.string(), "integer": arrow.int64(), "number": arrow.float64(), "flag": arrow.bool_()}
    return arrow.schema(
        [arrow.field(each.name, kinds[each.kind], metadata={"description": each.description}) for each in table.columns]
    )


def _batches(arrow: Any, schema: Any, rows: Iterable[Row]) -> Iterator[Any]:
    waiting = iter(rows)
    while batch := list(islice(waiting, BATCH_ROWS)):
        arrays = [
            arrow.array(values, field.type) for values, field in zip(zip(*batch, strict=True), schema, strict=True)
        ]
        yield arrow.record_batch(arrays, schema=schema)
