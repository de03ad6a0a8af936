"""Mutation run over the decision core: `python -m benchmarks.mutants`, or `make mutants`.

Each mutant is one small change of the code (`benchmarks.mutants.operators`); a mutant that no test of its group notices
survives. The run passes when at least 90% of the mutants die and every survivor has a reason in `survivors.toml`.
About an hour on 2 idle cores. `--sample 60` tries a few, chosen by `--seed`; it passes when all of them die or have a
reason. mutmut 3 leaves out decorated methods and code outside functions, which here are rules and bounds; cosmic-ray
starts an interpreter, and so imports torch, for each mutant.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # forks share no threads

import hypothesis  # noqa: F401  # imported here and in no fork
import msgspec  # noqa: F401
import numpy  # noqa: F401
import scipy.linalg  # noqa: F401
import starlette  # noqa: F401
import torch
import zmq  # noqa: F401

from benchmarks.markdown import table
from benchmarks.mutants.operators import Mutant
from benchmarks.mutants.workers import ROOT, SURVIVED, TIMEOUT, Group, Verdict, try_group

RESULT = ROOT / "benchmarks" / "results" / "mutants.json"
REASONS = Path(__file__).parent / "survivors.toml"
PASSING_SHARE = 0.9

GROUPS = (
    Group(("koopmon/policy.py",), ("tests/test_policy.py",)),
    Group(
        (
            "koopmon/risk/calibration.py",
            "koopmon/risk/initial_score.py",
            "koopmon/risk/loss_zscore.py",
            "koopmon/risk/normalization.py",
            "koopmon/risk/online_detector.py",
        ),
        ("tests/risk",),
    ),
    Group(
        (
            "koopmon/spectral/_linalg.py",
            "koopmon/spectral/dmd.py",
            "koopmon/spectral/kss.py",
            "koopmon/spectral/nonnormality.py",
            "koopmon/spectral/profile.py",
            "koopmon/spectral/profiles.py",
            "koopmon/spectral/resolvent.py",
            "koopmon/spectral/update_exponent.py",
            "koopmon/spectral/whitening.py",
        ),
        ("tests/spectral",),
    ),
    Group(("koopmon/monitor/run_controller.py",), ("tests/monitor/test_run_controller.py",)),
    Group(("koopmon/monitor/assembler.py",), ("tests/monitor/test_assembler.py",)),
    Group(("koopmon/monitor/registry.py",), ("tests/monitor/test_registry.py",)),
    Group(("koopmon/agent/capture/schedule.py",), ("tests/agent/capture/test_schedule.py",)),
    Group(
        (
            "koopmon/agent/control/actuator.py",
            "koopmon/agent/control/kss_injection.py",
            "koopmon/agent/control/lr_backoff.py",
            "koopmon/agent/control/rank_group.py",
            "koopmon/agent/control/state.py",
        ),
        ("tests/agent/control",),
    ),
)


def main(arguments: list[str] | None = None) -> int:
    """Run, print a table, and keep the figures of a whole run; the exit status tells whether it passes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutants", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="FILE", help="modules or parts of their paths; default all")
    parser.add_argument("--match", metavar="TEXT", help="only mutants whose name contains this")
    parser.add_argument("--sample", type=int, metavar="N", help="only N mutants; nothing is kept")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes at a time")
    chosen = parser.parse_args(arguments)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    reasons: dict[str, dict[str, str]] = tomllib.loads(REASONS.read_text(encoding="utf-8"))
    groups = [group for group in GROUPS if not chosen.only or _wanted(group.modules, chosen.only)]
    started = time.monotonic()
    verdicts: list[Verdict] = []
    for group in groups:
        group = Group(tuple(m for m in group.modules if not chosen.only or _wanted((m,), chosen.only)), group.tests)
        verdicts += try_group(group, _pick(chosen.match, chosen.sample, chosen.seed, groups), chosen.jobs)
        if not chosen.match and chosen.sample is None:
            _keep(verdicts, reasons)
    minutes = (time.monotonic() - started) / 60
    for line in _table(verdicts):
        print(line)
    survivors = [one for one in verdicts if one.status == SURVIVED]
    for one in survivors:
        print(f"survived {one.module} {one.name}: {_reason(one, reasons) or 'NO REASON'}")
    share = 1 - len(survivors) / max(1, len(verdicts))
    print(f"{share:.1%} of {len(verdicts)} mutants killed in {minutes:.1f} minutes")
    unexplained = [one for one in survivors if not _reason(one, reasons)]
    return 0 if not unexplained and (share >= PASSING_SHARE or chosen.sample is not None) else 1


def _wanted(modules: tuple[str, ...], only: list[str]) -> bool:
    return any(part in module for module in modules for part in only)


def _pick(
    match: str | None, sample: int | None, seed: int, groups: list[Group]
) -> Callable[[str, list[Mutant]], list[int]]:
    """How a group chooses among the mutants of a module; a sample takes a like share of each module."""
    total = sum((ROOT / module).stat().st_size for group in groups for module in group.modules)

    def pick(module: str, found: list[Mutant]) -> list[int]:
        indexes = [index for index, mutant in enumerate(found) if not match or match in mutant.name]
        if sample is None:
            return indexes
        wanted = max(1, round(sample * (ROOT / module).stat().st_size / total))
        return sorted(random.Random(f"{seed} {module}").sample(indexes, min(wanted, len(indexes))))

    return pick


def _reason(one: Verdict, reasons: dict[str, dict[str, str]]) -> str:
    return reasons.get(one.module, {}).get(one.name, "")


def _keep(verdicts: list[Verdict], reasons: dict[str, dict[str, str]]) -> None:
    """Write the figures of the modules that were tried; those of other modules stay."""
    kept: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for module in dict.fromkeys(one.module for one in verdicts):
        mine = [one for one in verdicts if one.module == module]
        counts = Counter(one.status for one in mine)
        kept[module] = {
            "mutants": len(mine),
            "killed": len(mine) - counts[SURVIVED],
            "of these by the time limit": counts[TIMEOUT],
            "survived": {one.name: _reason(one, reasons) for one in mine if one.status == SURVIVED},
        }
    RESULT.write_text(json.dumps(dict(sorted(kept.items())), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _table(verdicts: list[Verdict]) -> list[str]:
    rows = []
    for module in dict.fromkeys(one.module for one in verdicts):
        mine = [one for one in verdicts if one.module == module]
        survived = sum(one.status == SURVIVED for one in mine)
        rows.append((module, str(len(mine)), f"{1 - survived / len(mine):.1%}", str(survived)))
    return table(("module", "mutants", "killed", "survived"), rows)


if __name__ == "__main__":
    sys.exit(main())
