"""Completeness of the generated reference, and quoted figures in the pages."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

import koopmon
from koopmon import errors
from manual import command_line, configuration, python_api
from tests.docs.pages import PAGES, ROOT, blocks

CLI, CONFIGURATION, PYTHON = command_line.page(), configuration.page(), python_api.page()
INTERNAL = {
    "KOOPMON_ATTACHED_PID",  # passed between processes of a rank
    "KOOPMON_READY_FILE",  # passes a file of `koopmon run` to the agents
    "KOOPMON_KEPT_SETTINGS",  # passes a directory of `koopmon run` to the agents
    "KOOPMON_INSECURE_PLAINTEXT_TCP",  # passes the option of `koopmon run` to the agents
}


@pytest.mark.parametrize(("name", "command"), list(command_line.verbs()), ids=lambda value: str(value)[:40])
def test_every_verb_and_option_is_in_the_reference(name: str, command: object) -> None:
    if name == "koopmon":
        return
    _, _, rest = CLI.partition(f"# {name}\n")
    told = re.split(r"\n#+ ", rest)[0]
    for parameter in command.params:  # type: ignore[attr-defined]
        hidden = getattr(parameter, "hidden", False) or "--help" in parameter.opts
        if parameter.param_type_name == "option":
            assert (f"`{parameter.opts[0]}`" in told) is not hidden, f"{name} {parameter.opts}"
            assert hidden or parameter.help or parameter.name in ("seed",), f"{name} {parameter.opts} has no help"
    assert command_line.example(command) in told


def test_every_exit_status_and_variable_is_in_the_reference() -> None:
    classes = [value for value in vars(errors).values() if inspect.isclass(value)]
    for error in (each for each in classes if issubclass(each, errors.KoopmonError)):
        (row,) = re.findall(rf"^\| {error.exit_status} \|.*$", CLI, re.MULTILINE)
        assert f"`{error.__name__}`" in row
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "koopmon").rglob("*.py"))
    read = set(re.findall(r"""["'](KOOPMON_[A-Z_]*[A-Z])["']""", sources))
    read |= set(re.findall(r'xdg_directory\("(XDG_\w+)"', sources))
    assert read - INTERNAL == command_line.VARIABLES.keys() - {"KOOPMON_TABLE__KEY"}  # the code has its pattern
    assert all(f"| `{name}` |" in CLI for name in command_line.VARIABLES)


def test_every_key_is_in_the_reference_with_its_bounds() -> None:
    for name, table in configuration.tables():
        _, _, rest = CONFIGURATION.partition(f"## [{name}]\n")
        told = rest.partition("\n## ")[0]
        for field in msgspec.structs.fields(table):
            assert f"\n| `{field.name}` |" in told, f"{name}.{field.name}"
    assert (
        "| `min_lr_scale` | `0.125` | number ≥ 0.05 ≤ 1 | Lower bound on the learning-rate scale of the policy. |"
        in CONFIGURATION
    )
    assert '| `name` | `"auto"` | `"auto"`, `"lr"`, `"kss"`, `"kss+lr"`, `"observe"` |' in CONFIGURATION
    assert "| `retry_seconds` | `2` | number > 0 ≤ 3600 |" in CONFIGURATION


MENTION = re.compile(r"`\[(\w+)\](?: (\w+))?`")
"""Table of the configuration, or one of its keys, in a page."""


def test_every_key_that_a_page_names_is_a_key() -> None:
    keys = {name: {field.name for field in msgspec.structs.fields(table)} for name, table in configuration.tables()}
    sources = [*PAGES, ROOT / "koopmon" / "telemetry" / "alerts.yml"]
    found = [(page.name, *match.groups()) for page in sources for match in MENTION.finditer(page.read_text("utf-8"))]
    assert len(found) > 100
    assert [each for each in found if each[1] not in keys or (each[2] and each[2] not in keys[each[1]])] == []


def rows_of(text: str) -> Iterator[list[str]]:
    """Return the rows of each table outside of code blocks."""
    plain, table = re.sub(r"^ *(```+).*?^ *\1", "", text, flags=re.DOTALL | re.MULTILINE), list[str]()
    for line in [*plain.split("\n"), ""]:
        if line.startswith("|"):
            table.append(line)
        elif table:
            yield table
            table = []


def test_every_row_of_a_table_has_the_cells_of_its_heading() -> None:
    """A bar in the text of a cell would cut it: it is escaped, or in code."""
    texts = {page.name: page.read_text("utf-8") for page in PAGES}
    texts |= {"cli": CLI, "configuration": CONFIGURATION, "python": PYTHON}
    tables = [(name, table) for name, text in texts.items() for table in rows_of(text)]
    assert len(tables) > 50
    for name, table in tables:
        bars = [len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", row))) for row in table]
        wrong = [row for row, count in zip(table, bars, strict=True) if count != bars[0]]
        assert wrong == [], name


@pytest.mark.parametrize("name", sorted(set(koopmon.__all__) - {"__version__"}))
def test_every_public_name_is_in_the_reference(name: str) -> None:
    _, _, rest = PYTHON.partition(f"\n### koopmon.{name}\n")
    assert len(rest.partition("\n### ")[0]) > 40


def test_the_signatures_are_python() -> None:
    assert "koopmon.attach(\n    model: nn.Module,\n    optimizer: Optimizer | Iterable[Optimizer],\n    *,\n" in PYTHON
    for block in re.findall(r"```python\n(.*?)```", PYTHON, re.DOTALL):
        compile(f"def {block.replace('koopmon.', '').replace('= ...', '= None').strip()}: ...", "reference", "exec")


def test_python_in_the_pages_compiles() -> None:
    found = [block for page in PAGES for block in blocks(page) if block.language == "python"]
    assert found
    for block in found:
        compile(block.text, block.place, "exec")


def test_toml_in_the_pages_is_a_configuration() -> None:
    import tomllib

    from koopmon.config import from_mapping

    for block in (block for page in PAGES for block in blocks(page) if block.language == "toml"):
        told = tomllib.loads(block.text)
        if not told.keys() & {"project", "tool", "build-system"}:
            from_mapping(told, source=block.place)


def test_the_concepts_quote_the_evidence() -> None:
    """The rows of the table in risk.md have cells of the table of the fresh runs."""
    evidence = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    fresh = evidence.partition("<!-- results: fresh -->")[2].partition("<!-- end")[0]
    rows = {cells[0]: cells for cells in map(cells_of, fresh.split("\n")) if len(cells) == 6}
    told = (ROOT / "docs" / "concepts" / "risk.md").read_text(encoding="utf-8")
    names = {
        "risk": "koopmon risk",
        "forecast, loss known": "koopmon forecast, loss logged",
        "forecast, no loss known": "koopmon forecast",
        "for comparison: z-score of the loss": "loss z-score",
    }
    for name, detector in names.items():
        (quoted,) = (cells for cells in map(cells_of, told.split("\n")) if cells[:1] == [name])
        _, _, warned, lead, _, alarms = rows[detector]
        assert quoted[1:3] == [warned, lead]
        assert float(quoted[3]) == pytest.approx(float(alarms), abs=0.0501)


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []


SPIKE = "rate halved at a loss spike"


def test_the_comparison_quotes_the_evidence() -> None:
    """Sensitivities, losses of other remedies and counts of diverged runs in comparison.md are those of evidence.md."""
    evidence = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    rows = [cells_of(line) for line in evidence.split("\n")]
    page, _, after = (ROOT / "docs" / "comparison.md").read_text("utf-8").partition("Other remedies beside clipping")
    remedies, _, bare = after.partition("\n## ")
    told = {cells[0]: cells[1:] for cells in map(cells_of, (page + bare).split("\n")) if cells}
    arms = {"clipping": "clipping at 1.0", "clipping and QK-norm": "clipping and QK-norm (another model)"}
    for arm in ("clipping", "clipping and QK-norm", "clipping and koopmon"):
        measured = [cells[-1] for cells in rows if cells[:1] == [arms.get(arm, arm)] and "[" in cells[-1]]
        assert told[arm] == [each.partition(" ")[0] for each in measured]
    losses = "\n".join(each.partition("\n\n")[0] for each in evidence.split("remedy | 0.01 | 0.03 | 0.1 |")[1:])
    quoted = [cells for cells in map(cells_of, remedies.split("\n")) if cells[:1] not in ([], ["arm"], ["---"])]
    assert len(quoted) == 6
    for arm, *cells in quoted:
        words = {"clipping": "clipping at 1.0"}.get(arm, arm.replace("a spike of the loss halves the rate", SPIKE))
        assert cells == [", ".join(row[1:]) for row in map(cells_of, losses.split("\n")) if row[:1] == [words]]
    names = {"a spike of the loss halves the rate": "loss spike halves the rate", "koopmon, policy `lr`": "lr"}
    guarded = evidence.partition("<!-- results: guarded -->")[2].partition("<!-- end")[0]
    measured_rows = {cells[0]: cells for cells in map(cells_of, guarded.split("\n")) if cells}
    for arm in ("nothing", "clipping at 1.0", "clipping at 0.5", *names):
        cells = measured_rows[names.get(arm, arm)]
        lost = sum(int(each.split("/")[0]) for each in cells[2:6])
        assert told[arm] == [f"{lost} of 24", cells[6]]


def test_the_script_of_the_quick_start_is_a_file() -> None:
    (shown,) = (block for block in blocks(ROOT / "docs" / "quickstart.md") if block.title == "train.py")
    assert (ROOT / "docs" / "train.py").read_text(encoding="utf-8") == shown.text


def test_the_costs_follow_from_the_measurements() -> None:
    """Figures of costs.md for 32 blocks of width 4,096 with 20 s between snapshots."""
    told = (ROOT / "docs" / "costs.md").read_text(encoding="utf-8")

    def result(name: str) -> Any:
        return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))

    (per_layer,) = (row["cpu_ms_per_layer"] for row in result("spectral_floor")["rows"] if row["width"] == 4096)
    seconds = 32 * per_layer / 1000
    load, size = result("monitor_load"), result("history_size")["sizes"]["48"]["now"]
    snapshot = 512 * 33 * 4096 * 2 / 1e6
    for figure in (
        f"{per_layer:.1f} ms for each layer",
        f"{seconds:.1f} s for each snapshot, {seconds / 20:.0%} of a core",
        f"{snapshot:.0f} MB, {snapshot / 8:.0f} MB from each",
        f"{snapshot / 20:.1f} MB/s",
        f"{load['ranks']['share']:.1%} of a core",
        f"{load['metrics']['sent_bytes'] / 100 / 1000:.0f} kB",
        f"{size:.1f} MB for 1,000 snapshots",
        f"{size / 1000 * 32 / 48 * 86400 / 20:.0f} MB a day",
        f"{3 * 12 * 8e9 / 1000 / 1e9:.1f} GB",
    ):
        assert figure in told, figure
