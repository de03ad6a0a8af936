"""Generates the page of the tables and columns of `koopmon export`."""

from __future__ import annotations

from koopmon.views.export_tables import TABLES
from manual.cells import cell

WRITTEN = "<!-- Written by `python -m manual.write`: edit koopmon/views/export_tables.py, not this. -->"
HEAD = """\
# Export a run

`koopmon export RUN` writes one table of a run for pandas, polars, DuckDB or a spreadsheet. Without RUN it is the
latest run. It works during a run and after it, and does not disturb the monitor.

<!-- not run: tests/cli/test_export_verb.py reads such files back -->
```sh
koopmon export train-1a2b3c4d --out train.csv
koopmon export train-1a2b3c4d --table layers --out layers.parquet
koopmon export train-1a2b3c4d --table commands --format json
```

The format is that of `--format`, else of the suffix of `--out` (`.csv`, `.json`, `.parquet`, `.arrow`, `.feather`),
else CSV. Parquet and Arrow need the extra `export`. Rows are read and written in batches, so a long run needs little
memory.

| format | unknown values | not finite | flags |
|---|---|---|---|
| CSV | empty | `NaN`, `inf` | 0, 1 |
| JSON, an array of objects | `null` | `null` | `true`, `false` |
| Parquet, Arrow | null | NaN, infinity | booleans |

```python
import pandas

snapshots = pandas.read_csv("train.csv")
snapshots.groupby("launch").risk.max()
```
"""


def page() -> str:
    """Return the page as Markdown."""
    parts = [HEAD.replace("# Export a run\n", f"# Export a run\n\n{WRITTEN}\n", 1)]
    for table in TABLES.values():
        parts += [f"## The table `{table.name}`", "", f"It has {table.description}.", ""]
        parts += ["| column | type | content |", "|---|---|---|"]
        parts += [f"| `{each.name}` | {each.kind} | {cell(each.description)} |" for each in table.columns] + [""]
    return "\n".join(parts)
