"""`koopmon export`: files of each format, read back by other programs."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from koopmon.cli import main, table_writers
from koopmon.risk.band import BandReading
from koopmon.views.export_tables import TABLES
from tests.report.recorder import NAN, Recorder, guarded

FORMATS = ("csv", "json", "parquet", "arrow")


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state directory with the history of one run, whose last loss is NaN."""
    directory = tmp_path_factory.mktemp("state")
    path = directory / "koopmon" / "runs" / "mine.sqlite3"
    path.parent.mkdir(parents=True)
    recorder = Recorder(path, "mine")
    recorder.hello()
    recorder.saw(1, 0.05, 3.0, profiled=True)
    recorder.close()
    recorder = Recorder(path, "mine")
    guarded(recorder)
    recorder.saw(202, 1.0, NAN, non_finite=True)
    recorder.beat(202, logged={"kl": BandReading(202, 0.5)})
    recorder.close()
    return directory


@pytest.fixture
def place(state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, beside that state directory."""
    monkeypatch.setenv("XDG_STATE_HOME", str(state))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def exported(form: str, table: str = "snapshots") -> Path:
    if form in table_writers.BINARY:
        pytest.importorskip("pyarrow")
    out = Path(f"{table}.{form}")
    assert main(["export", "mine", "--table", table, "--out", str(out)]) == 0
    assert not [path for path in Path().iterdir() if path.name.endswith(".part")]
    return out


def check(steps: list[Any], risks: list[Any], losses: list[Any], non_finite: list[Any], launches: list[Any]) -> None:
    assert [int(step) for step in steps] == [1, *range(0, 204, 2)]
    assert (risks[21], risks[-1]) == (0.85, 1.0)
    assert losses[21] == 3.1
    assert losses[-1] is None or losses[-1] != losses[-1]
    assert [bool(flag) for flag in non_finite] == [False] * 102 + [True]
    # A reader of CSV may take this identifier for another type.
    assert len(set(launches)) == 1


COLUMNS = ("step", "risk", "loss", "non_finite", "launch")


@pytest.mark.parametrize("form", FORMATS)
def test_pandas_reads_each_format(place: Path, form: str) -> None:
    pandas = pytest.importorskip("pandas")
    read = {"csv": "read_csv", "json": "read_json", "parquet": "read_parquet", "arrow": "read_feather"}[form]
    frame = getattr(pandas, read)(exported(form))
    check(*(frame[name].tolist() for name in COLUMNS))


@pytest.mark.parametrize("form", FORMATS)
def test_polars_reads_each_format(place: Path, form: str) -> None:
    polars = pytest.importorskip("polars")
    read = {"csv": "read_csv", "json": "read_json", "parquet": "read_parquet", "arrow": "read_ipc"}[form]
    # By default polars takes the types of the first 100 rows, in which the forecast is unknown.
    options = {"infer_schema_length": None} if form in ("csv", "json") else {}
    frame = getattr(polars, read)(exported(form), **options)
    check(*(frame[name].to_list() for name in COLUMNS))


@pytest.mark.parametrize("form", ["csv", "json", "parquet"])
def test_duckdb_reads_each_format_that_it_knows(place: Path, form: str) -> None:
    duckdb = pytest.importorskip("duckdb")
    rows = duckdb.sql(f"SELECT {', '.join(COLUMNS)} FROM '{exported(form)}'").fetchall()
    check(*map(list, zip(*rows, strict=True)))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("table", TABLES)
def test_each_table_has_its_columns_in_each_format(place: Path, table: str, form: str) -> None:
    path, names = exported(form, table), [column.name for column in TABLES[table].columns]
    if form == "csv":
        assert path.read_text().splitlines()[0].split(",") == names
    elif form == "json":
        assert list(json.loads(path.read_text())[0]) == names
    else:
        from pyarrow import ipc, parquet

        schema = ipc.open_file(path).schema if form == "arrow" else parquet.read_schema(path)
        assert schema.names == names
        assert schema.field("step").metadata[b"description"] == b"optimizer step"


def test_standard_output_is_csv_of_the_latest_run(place: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert main(["export"]) == 0
    told = capfdbinary.readouterr()
    assert told.err == b""
    assert len(told.out.splitlines()) == 104
    assert told.out.startswith(b"run,launch,step,")


def test_json_has_null_for_a_number_that_is_not_finite(place: Path) -> None:
    rows = json.loads(exported("json").read_text())
    assert rows[-1]["loss"] is None
    assert rows[-1]["non_finite"] is True


@pytest.mark.parametrize("form", FORMATS)
def test_no_row_at_all_is_still_a_file(form: str) -> None:
    if form in table_writers.BINARY:
        pytest.importorskip("pyarrow")
    out = io.BytesIO()
    table_writers.FORMATS[form](TABLES["commands"], [], out)
    text = out.getvalue()
    if form == "json":
        assert json.loads(text) == []
    elif form == "csv":
        assert len(text.splitlines()) == 1
    else:
        from pyarrow import BufferReader, ipc, parquet

        read = ipc.open_file if form == "arrow" else parquet.read_table
        found = read(BufferReader(text))
        assert found.schema.names == [column.name for column in TABLES["commands"].columns]


@pytest.mark.parametrize("form", FORMATS)
def test_rows_are_written_in_batches(form: str) -> None:
    """The rows are not read ahead of what is written by more than one batch."""
    if form in table_writers.BINARY:
        pytest.importorskip("pyarrow")
    table, ahead = TABLES["commands"], 0

    class Out(io.BytesIO):
        written = 0

        def write(self, data: Any) -> int:
            type(self).written = taken
            return super().write(data)

    taken = 0

    def rows() -> Any:
        nonlocal taken, ahead
        for taken in range(1, 3 * table_writers.BATCH_ROWS):
            ahead = max(ahead, taken - Out.written)
            yield ["mine", "0123abcd", taken, 1.0, "k", "c", "r", 0.5, 0.5, None, None, "applied", 1, ""]

    Out.written = 0
    table_writers.FORMATS[form](table, rows(), Out())
    assert 0 < ahead <= table_writers.BATCH_ROWS + 1


def test_a_failure_leaves_the_old_file(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = place / "x.csv"
    out.write_text("old")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(table_writers.FORMATS, "csv", fail)  # type: ignore[arg-type]
    assert main(["export", "mine", "--out", str(out)]) == 1
    assert out.read_text() == "old"
    assert [path.name for path in place.iterdir() if path.name.startswith(".x")] == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nobody"], "run 'nobody': not in"),
        (["mine", "--format", "xls"], "--format 'xls': allowed are csv, json, parquet, arrow"),
        (["mine", "--table", "weights"], "--table 'weights': allowed are snapshots, layers, commands"),
        (["mine", "--out", "none/x.csv"], "--out none/x.csv: cannot be written: No such file or directory"),
        (["mine", "--store", "none.sqlite3"], "store none.sqlite3: no such file"),
    ],
)
def test_bad_input_is_one_line(place: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    assert main(["export", *words]) in (1, 2)
    told = capsys.readouterr()
    assert says in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""


@pytest.mark.parametrize("form", table_writers.BINARY)
def test_without_pyarrow_one_line_has_the_remedy(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(["export", "mine", "--format", form, "--out", "x"]) == 2
    assert capsys.readouterr().err == (
        f"koopmon: --format {form} needs pyarrow, which is not installed: pip install 'koopmon[export]'\n"
    )
    assert not Path("x").exists()


@pytest.mark.parametrize("form", table_writers.BINARY)
def test_binary_data_does_not_go_to_a_terminal(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(table_writers, "require_pyarrow", lambda form: None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(["export", "mine", "--format", form]) == 2
    assert "is binary: name a file with --out" in capsys.readouterr().err
