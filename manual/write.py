"""Write the generated files of the repository: `python -m manual.write`.

The dashboards and the pages of metrics and alerts are data of the package. `grafana/` and two pages in `docs/` are the
output of `koopmon grafana export`. The manifest of the Prometheus operator has the same rules. A
further page in `docs/` has the columns of `koopmon export`. Two files have a copy of the version.
"""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

from koopmon import __version__
from koopmon.cli import main as koopmon
from koopmon.grafana.files import write
from manual import dashboards, export_columns, metrics_and_alerts

SOURCE = ROOT = Path(__file__).resolve().parent.parent
"""The repository. The files are written below ROOT."""
RULES, MANIFEST = "grafana/prometheus/koopmon.rules.yml", "deploy/kubernetes/base/prometheusrule.yaml"
EXPORT = "docs/export.md"
VERSIONED = ("CITATION.cff", "deploy/helm/koopmon/Chart.yaml")
MANIFEST_HEAD = """\
# The alerts of grafana/prometheus/koopmon.rules.yml, for the Prometheus operator. Written by `python -m manual.write`.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: koopmon
spec:
"""


def package_data() -> dict[str, str]:
    """Return the text of each generated file of the package by its path in the repository."""
    boards = {f"dashboards/{each['uid']}.json": json.dumps(each, indent=2) + "\n" for each in dashboards.make()}
    pages = {f"pages/{name}": text for name, text in metrics_and_alerts.pages().items()}
    return {f"koopmon/grafana/{name}": text for name, text in (boards | pages).items()}


def with_version(text: str) -> str:
    """Return `text` with this version in its lines `version:` and `appVersion:`."""
    return re.sub(r"^(version|appVersion): .*$", rf"\g<1>: {__version__}", text, flags=re.MULTILINE)


def main() -> int:
    write(ROOT, package_data())
    write(ROOT, {EXPORT: export_columns.page()})
    status = koopmon(["grafana", "export", str(ROOT / "grafana"), "--docs", str(ROOT / "docs")])
    write(ROOT, {MANIFEST: MANIFEST_HEAD + textwrap.indent((ROOT / RULES).read_text(encoding="utf-8"), "  ")})
    write(ROOT, {name: with_version((SOURCE / name).read_text(encoding="utf-8")) for name in VERSIONED})
    return status


if __name__ == "__main__":
    raise SystemExit(main())
