"""`koopmon export`: writes a table of a run for pandas, polars, DuckDB or a spreadsheet."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, BinaryIO, cast

from koopmon.cli.console import say
from koopmon.cli.find_history import opened
from koopmon.cli.options import HistoryFile, RunArgument, option
from koopmon.errors import ConfigError, KoopmonError

_FORMATS = ("csv", "json", "parquet", "arrow")
_TABLES = ("snapshots", "layers", "commands", "logged")


def export(
    run: RunArgument = None,
    form: Annotated[
        str | None,
        option("|".join(_FORMATS), "Format. Default: that of the suffix of --out, else csv.", "--format"),
    ] = None,
    table: Annotated[
        str, option("|".join(_TABLES), "Table: one row for each snapshot, layer, command or logged scalar.")
    ] = "snapshots",
    out: Annotated[Path | None, option("FILE", "File to write. Default: standard output.")] = None,
    store: HistoryFile = None,
) -> int:
    """Write the snapshots, layers, commands or logged scalars of a run as CSV, JSON, Parquet or Arrow.

    Parquet and Arrow need the extra `export`. Without RUN it is the latest run. It works during a run and after it.
    docs/export.md describes the columns.
    """
    from koopmon.cli.table_writers import BINARY, FORMATS, SUFFIXES, require_pyarrow
    from koopmon.views.export_tables import TABLES

    chosen = form or SUFFIXES.get(out.suffix.lower() if out is not None else ".csv", "csv")
    if chosen not in FORMATS:
        raise ConfigError(f"--format {chosen!r}: allowed are {', '.join(FORMATS)}")
    if table not in TABLES:
        raise ConfigError(f"--table {table!r}: allowed are {', '.join(TABLES)}")
    if chosen in BINARY:
        require_pyarrow(chosen)
        if out is None and sys.stdout.isatty():
            raise ConfigError(f"--format {chosen} is binary: name a file with --out")
    with opened(run, store) as (history, _, name):
        rows = TABLES[table].rows(history, name)
        if out is None:
            FORMATS[chosen](TABLES[table], rows, cast(BinaryIO, sys.stdout.buffer))
            sys.stdout.buffer.flush()
            return 0
        part = out.with_name(f".{out.name}.{os.getpid()}.part")
        try:
            try:
                with part.open("wb") as file:
                    FORMATS[chosen](TABLES[table], rows, file)
                part.replace(out)
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:
            raise KoopmonError(f"--out {out}: cannot be written: {error.strerror}") from None
    say(f"run {name}: {table} written to {out}")
    return 0
