"""Fuzzing of all targets for a while, with a table and JSON.

    python -m benchmarks.fuzz --target codec --executions 10000000 --seconds 3600
    python -m benchmarks.fuzz --target sockets --seconds 1800

Coverage (atheris) guides all targets except `sockets`. --keep keeps new inputs. The memory growth is the difference
between the memory at the end and after the warm-up. The exit status is 1 after a crash or too much growth.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import campaign
from benchmarks.fuzz import sockets
from benchmarks.provenance import provenance

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
RESULT = HERE.parent / "results" / "fuzz.json"
TARGETS = ("codec", "http", "config", "calibrator", "recording", "composition", "sockets")
MAX_INPUT_BYTES = 8192
MAX_GROWTH_BYTES = 50 << 20
GRACE_SECONDS = 120.0


def fuzz(target: str, seconds: float, executions: int, seed: int, keep: bool) -> dict[str, Any]:
    """Fuzz one target in its own process; return the results as plain values."""
    kept = CORPUS / target
    with tempfile.TemporaryDirectory(prefix="koopmon-fuzz-") as folder:
        found, log, stats = Path(folder, "found"), Path(folder, "log"), Path(folder, "stats")
        found.mkdir()
        command = [
            *(sys.executable, "-m", "benchmarks.fuzz.drive", target, str(stats)),
            *(f"-max_total_time={int(seconds)}", f"-runs={executions or -1}", f"-max_len={MAX_INPUT_BYTES}"),
            *(f"-seed={seed + 1}", "-mutate_depth=2", "-timeout=60", "-rss_limit_mb=4096", "-print_final_stats=1"),
            *(f"-artifact_prefix={folder}/", str(found), str(kept)),
        ]
        began = time.monotonic()
        with log.open("wb") as output:
            done = subprocess.run(
                command, stdout=output, stderr=output, cwd=HERE.parents[1], timeout=seconds + GRACE_SECONDS, check=False
            )
        said = log.read_text(encoding="utf-8", errors="replace")
        told: dict[str, Any] = (
            json.loads(stats.read_text()) if stats.exists() else {"growth_bytes": 0, "outcomes": {}, "seconds": 0.0}
        )
        crashes = [path for path in Path(folder).glob("*-*") if path.name.split("-")[0] in ("crash", "timeout", "oom")]
        if done.returncode or crashes:
            _show(said, crashes)
        if keep:
            _merge(target, found, kept)
        count = int(_stat(said, "number_of_executed_units") or told.get("executions", 0))
        taken = told["seconds"] or time.monotonic() - began
        return {
            "executions": count,
            "seconds": round(taken, 1),
            "executions_per_second": round(count / taken, 1),
            "corpus": len(list(kept.iterdir())),
            "new_corpus_entries": int(_stat(said, "new_units_added") or 0),
            "growth_bytes": told["growth_bytes"],
            "crashes": max(len(crashes), int(done.returncode != 0)),
            "outcomes": told["outcomes"],
        }


def _stat(said: str, name: str) -> str | None:
    found = re.search(rf"^stat::{name}:\s+(\d+)", said, re.MULTILINE)
    return found[1] if found else None


def _show(said: str, crashes: Sequence[Path]) -> None:
    print("\n".join(said.splitlines()[-40:]), file=sys.stderr)
    for path in crashes:
        shutil.copy(path, Path.cwd() / path.name)
        print(f"the input is kept as {path.name}", file=sys.stderr)


def _merge(target: str, found: Path, kept: Path) -> None:
    """Add inputs with new coverage to the kept corpus."""
    command = [sys.executable, "-m", "benchmarks.fuzz.drive", target, str(found / ".stats"), "-merge=1"]
    subprocess.run([*command, str(kept), str(found)], cwd=HERE.parents[1], capture_output=True, check=True)


def render(results: dict[str, dict[str, Any]]) -> Table:
    table = Table("target", "executions", "per second", "seconds", "corpus", "new", "growth, MB", "crashes")
    for target, row in results.items():
        table.add_row(
            target,
            f"{row['executions']:,}",
            f"{row['executions_per_second']:,.0f}",
            f"{row['seconds']:,.0f}",
            str(row["corpus"]),
            str(row["new_corpus_entries"]),
            f"{row['growth_bytes'] / (1 << 20):.1f}",
            str(row["crashes"]),
        )
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", choices=[*TARGETS, "all"], default="all", help="what to fuzz (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target, at most (default %(default)s)")
    parser.add_argument("--executions", type=int, default=0, help="for each target, at most; 0: no limit (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (default 0)")
    parser.add_argument("--keep", action="store_true", help="add to the corpus in the tree what is new")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes (default %(default)s)")
    options = parser.parse_args(arguments)
    if options.seconds < 1:
        parser.error(f"--seconds {options.seconds}: must be at least 1")
    if options.executions < 0:
        parser.error(f"--executions {options.executions}: must be at least 0")
    chosen = TARGETS if options.target == "all" else (options.target,)
    if chosen != ("sockets",) and importlib.util.find_spec("atheris") is None:
        print(f"{chosen[0]}: atheris is not installed: pip install atheris", file=sys.stderr)
        return 2
    results = {}
    try:
        with campaign.terminated_as_interrupted():
            for target in chosen:
                if target == "sockets":
                    results[target] = sockets.campaign(options.seconds, options.seed)
                else:
                    results[target] = fuzz(target, options.seconds, options.executions, options.seed, options.keep)
    except KeyboardInterrupt:
        print("interrupted: nothing is kept", file=sys.stderr)
        return 130
    Console(width=120).print(render(results))
    fine = all(not row["crashes"] and row["growth_bytes"] <= MAX_GROWTH_BYTES for row in results.values())
    print(f"goal zero crashes, and growth of at most {MAX_GROWTH_BYTES >> 20} MB: {'holds' if fine else 'FAILS'}")
    known = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {"targets": {}}
    for target, row in results.items():
        known["targets"][target] = {**row, "provenance": provenance(options.seed)}
    options.out.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    return 0 if fine else 1


if __name__ == "__main__":
    raise SystemExit(main())
