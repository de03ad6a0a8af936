"""Known vulnerabilities of the pinned dependencies, by pip-audit.

Usage: audit.py [WORDS FOR pip-audit...]. Status: 0 when nothing is open, 1 when something is. Where no database can be
reached, one line says that nothing was checked, and the status is 0, or 1 where REQUIRE_ALL=1 forbids skipping.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PINS = Path(__file__).parent.parent / "constraints.txt"
# The pins themselves, each one distribution and its version: nothing is resolved or installed.
AUDIT = ("-m", "pip_audit", "--requirement", str(PINS), "--no-deps", "--disable-pip", "--format", "json")


def main(words: list[str]) -> int:
    done = subprocess.run([sys.executable, *AUDIT, *words], capture_output=True, text=True, check=False)
    try:
        dependencies = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        return nothing_checked((done.stderr.strip().splitlines() or ["pip-audit said nothing"])[-1])
    skipped = [each["name"] for each in dependencies if "skip_reason" in each]
    audited = [each for each in dependencies if "skip_reason" not in each]
    if not audited:
        return nothing_checked("the package index here has no database of vulnerabilities")
    findings = [(each, finding) for each in audited for finding in each["vulns"]]
    for each, finding in findings:
        fixed = ", ".join(finding["fix_versions"]) or "none yet"
        print(f"{each['name']} {each['version']}: {finding['id']}, fixed in: {fixed}")
    unknown = f"; not in the database: {', '.join(skipped)}" if skipped else ""
    print(f"koopmon: {len(audited)} pinned dependencies checked, {len(findings)} findings{unknown}")
    return 1 if findings else 0


def nothing_checked(why: str) -> int:
    print(f"koopmon: no dependency was checked: {why}", file=sys.stderr)
    return 1 if os.environ.get("REQUIRE_ALL") == "1" else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
