"""Write the figures of README.md and of pages in docs from the results: `python -m benchmarks.readme`.

With `--check` it only compares. Each section is between `<!-- results: NAME -->` and `<!-- end of results -->` and
comes from results/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.fuzz.page import WRITERS as FUZZ
from benchmarks.live_figures import WRITERS as LIVE
from benchmarks.matrix.page import WRITERS as MATRIX
from benchmarks.mutants.page import WRITERS as MUTANTS
from benchmarks.proving_ground.page import WRITERS as PROVING_GROUND
from benchmarks.sections import WRITERS as SECTIONS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ("deploy", "evidence", "failures", "grafana", "history", "live-page", "security", "support")
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs" / f"{name}.md" for name in DOCS))
WRITERS = {**SECTIONS, **MATRIX, **FUZZ, **LIVE, **MUTANTS, **PROVING_GROUND}
RESULTS = Path(__file__).parent / "results"
SECTION = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def rendered(text: str, results: Path = RESULTS) -> str:
    """Return `text` with every section written again. Raises ValueError for a section without a writer or a result."""

    def write(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        path = results / f"{name}.json"
        if name not in WRITERS:
            raise ValueError(f"results: {name}: allowed are {', '.join(WRITERS)}")
        if not path.is_file():
            raise ValueError(f"results: {name}: {path.name} is missing; run python -m benchmarks.{name}")
        return begin + "\n".join(WRITERS[name](json.loads(path.read_text(encoding="utf-8")))) + "\n" + end

    return SECTION.sub(write, text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 when a page is stale")
    options = parser.parse_args(arguments)
    stale = False
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        wanted = rendered(text)
        if options.check and text != wanted:
            sys.stderr.write(f"{page.name} is stale: run python -m benchmarks.readme\n")
            stale = True
        if not options.check:
            page.write_text(wanted, encoding="utf-8")
    return int(stale)


if __name__ == "__main__":
    raise SystemExit(main())
