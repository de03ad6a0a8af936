"""The files of `koopmon grafana export` equal those in grafana/ and docs/."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from koopmon.cli import main
from koopmon.grafana.files import DATASOURCE_UID, files, pages
from koopmon.telemetry.alerts import ALERTS
from koopmon.telemetry.metrics import TABLE

ROOT = Path(__file__).parents[2]


def test_the_committed_files_are_what_the_code_makes() -> None:
    # rglob does not enter grafana/dashboards, which is a link into the package.
    found = [*(ROOT / "grafana").rglob("*"), *(ROOT / "grafana" / "dashboards").iterdir()]
    committed = {str(path.relative_to(ROOT / "grafana")): path.read_text() for path in found if path.is_file()}
    assert committed == files(), "run python -m manual.write"


def test_export_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, docs = tmp_path / "new" / "dir", tmp_path / "docs"
    assert main(["grafana", "export", str(place), "--docs", str(docs), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    wanted = {str(place / name): text for name, text in files().items()}
    wanted |= {str(docs / name): text for name, text in pages().items()}
    assert told["files"] == sorted(wanted)
    assert {path: Path(path).read_text() for path in wanted} == wanted
    assert main(["grafana", "export", str(place)]) == 0
    assert f"{len(files())} files in" in capsys.readouterr().err


@pytest.mark.process
def test_the_export_is_a_mixin(tmp_path: Path) -> None:
    """Jsonnet renders it, in a process of its own because it is a Go library, and another mixin adds to it."""
    if find_spec("_gojsonnet") is None:
        pytest.importorskip("_gojsonnet")
    assert main(["grafana", "export", str(tmp_path / "koopmon")]) == 0
    rules = tmp_path / "koopmon/prometheus/koopmon.rules.yml"
    groups = yaml.safe_load(rules.read_text())["groups"]
    recorded = {"name": "more", "rules": [{"record": "a:b", "expr": "c"}, {"alert": "D", "expr": "e"}]}
    rules.write_text(yaml.safe_dump({"groups": [*groups, recorded]}))
    (tmp_path / "mine.jsonnet").write_text("""
        local more = { prometheusAlerts+:: { groups+: [{ name: 'mine', rules: [] }] } };
        local all = (import 'koopmon/mixin.libsonnet') + more;
        { alerts: all.prometheusAlerts.groups, records: all.prometheusRules.groups, boards: all.grafanaDashboards }
    """)
    code = "import sys, _gojsonnet; print(_gojsonnet.evaluate_file(sys.argv[1]))"
    words = [sys.executable, "-c", code, str(tmp_path / "mine.jsonnet")]
    made = json.loads(subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout)
    (tmp_path / "mine.jsonnet").write_text("""
        local mixin = (import 'koopmon/mixin.libsonnet') + { _config+:: {
          docsUrl: 'https://docs.example.org/alerts/',
          disabled: ['KoopmonForecastHigh', 'D'],
          alerts: { KoopmonRiskHigh: { 'for': '5m', labels+: { team: 'research' } } },
        } };
        { alerts: mixin.prometheusAlerts.groups }
    """)
    own = json.loads(subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout)["alerts"]
    own_rules = {rule["alert"]: rule for group in own for rule in group["rules"]}
    assert "KoopmonForecastHigh" not in own_rules
    assert [group["name"] for group in own] == [group["name"] for group in groups[:3]], "no group is empty"
    high = own_rules["KoopmonRiskHigh"]
    assert (high["for"], high["labels"]) == ("5m", {"severity": "critical", "team": "research"})
    assert high["annotations"]["runbook_url"] == "https://docs.example.org/alerts/#KoopmonRiskHigh"
    assert own_rules["KoopmonRiskSpike"]["annotations"].keys() == {"summary", "description", "runbook_url"}
    alerts = [{**group, "rules": [rule for rule in group["rules"] if "alert" in rule]} for group in groups]
    assert made["alerts"][:-2] == [group for group in alerts if group["rules"]]
    assert made["alerts"][-2:] == [{"name": "more", "rules": recorded["rules"][1:]}, {"name": "mine", "rules": []}]
    assert made["records"][-1] == {"name": "more", "rules": recorded["rules"][:1]}
    boards = {path.name: json.loads(path.read_text()) for path in (tmp_path / "koopmon/dashboards").iterdir()}
    assert made["boards"] == boards


@pytest.mark.parametrize("name", pages())
def test_the_reference_in_the_docs_is_that_of_the_package(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == pages()[name], "run python -m manual.write"


def test_the_reference_has_every_row_of_the_tables() -> None:
    assert pages().keys() == {"alerts.md", "metrics.md"}
    for alert in ALERTS:
        assert f'<a id="{alert.name}"></a>' in pages()["alerts.md"]
    for series in TABLE:
        assert f"`koopmon_{series.name}" in pages()["metrics.md"]


def test_export_with_another_place_for_the_runbook_and_for_prometheus(tmp_path: Path) -> None:
    options = ["--docs-url", "https://docs.example.org/alerts/", "--prometheus-url", "http://elsewhere:9090"]
    assert main(["grafana", "export", str(tmp_path), *options]) == 0
    rules = (tmp_path / "prometheus" / "koopmon.rules.yml").read_text()
    assert "https://docs.example.org/alerts/#KoopmonRiskHigh" in rules
    assert "$labels.instance }}/alerts" not in rules
    (source,) = yaml.safe_load((tmp_path / "provisioning/datasources/koopmon.yml").read_text())["datasources"]
    assert source["url"] == "http://elsewhere:9090"
    assert source["uid"] == DATASOURCE_UID


def test_a_place_that_cannot_be_written_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["grafana", "export", str(tmp_path / "file")]) == 1
    said = capsys.readouterr().err
    assert "cannot be written: Not a directory" in said or "cannot be written: File exists" in said
    assert said.count("\n") == 1


@pytest.mark.process
@pytest.mark.needs("amtool")
def test_alertmanager_takes_its_configuration() -> None:
    command = ["amtool", "check-config", str(ROOT / "deploy" / "alertmanager.yml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 inhibit rules" in done.stdout
