"""Completeness of the generated reference, and quoted figures in the pages."""

from __future__ import annotations

import inspect
import re

import msgspec
import pytest

import koopmon
from koopmon import errors
from manual import command_line, configuration, python_api
from tests.docs.pages import PAGES, ROOT, blocks

CLI, CONFIGURATION, PYTHON = command_line.page(), configuration.page(), python_api.page()
INTERNAL = {
    "KOOPMON_ATTACHED_PID",  # passed between processes of a rank
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
