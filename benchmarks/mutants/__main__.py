"""Mutation run over the decision core, which `make mutants` starts.

Each mutant is one small change of the code (`benchmarks.mutants.operators`); a mutant that no test of its group notices
survives. The run passes when at least 90% of the mutants die and every survivor has a reason in `survivors.toml`.
About an hour on 2 idle cores. `--sample 5` tries a few of each module, chosen by `--seed`; it passes when all of them
die or have a reason.

mutmut 3 leaves out properties, other decorated functions and code outside functions, which here are rules and bounds.
cosmic-ray starts an interpreter, and so imports torch, for each mutant.
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
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # forks share no threads

import hypothesis  # noqa: F401  # imported here and in no fork
import msgspec  # noqa: F401
import numpy  # noqa: F401
import scipy.linalg  # noqa: F401
import starlette  # noqa: F401
import torch
import torch._dynamo  # which the first optimizer of a process imports, in a second
import zmq  # noqa: F401

from benchmarks.mutants import page
from benchmarks.mutants.operators import Mutant
from benchmarks.mutants.workers import ROOT, SURVIVED, TIMEOUT, Source, Verdict, read_source, try_group
from benchmarks.provenance import provenance

RESULT = ROOT / "benchmarks" / "results" / "mutants.json"
REASONS = Path(__file__).parent / "survivors.toml"
PASSING_SHARE = 0.9

GROUPS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("koopmon/policy/[adkrs]*.py",), ("tests/policy/test_decide.py",)),
    (("koopmon/policy/projection.py",), ("tests/policy/test_projection.py",)),
    (("koopmon/risk/calibration.py",), ("tests/risk/test_calibration.py",)),
    (("koopmon/risk/[!c]*.py",), ("tests/risk/test_[!c]*.py", "tests/risk/test_causes.py")),
    (("koopmon/spectral/_linalg.py",), ("tests/spectral/test_linalg.py",)),
    (("koopmon/spectral/dmd.py",), ("tests/spectral/test_dmd.py", "tests/spectral/test_profile.py")),
    (("koopmon/spectral/kss.py",), ("tests/spectral/test_kss.py", "tests/spectral/test_properties.py")),
    (("koopmon/spectral/profile*.py",), ("tests/spectral/test_profile.py", "tests/spectral/test_properties.py")),
    (
        ("koopmon/spectral/nonnormality.py", "koopmon/spectral/resolvent.py"),
        ("tests/spectral/test_nonnormality.py", "tests/spectral/test_resolvent.py"),
    ),
    (("koopmon/spectral/update_exponent.py",), ("tests/spectral/test_update_exponent.py",)),
    (("koopmon/spectral/whitening.py",), ("tests/spectral/test_whitening.py", "tests/spectral/test_profile.py")),
    (
        ("koopmon/monitor/events.py", "koopmon/monitor/history_sink.py"),
        ("tests/monitor/test_events.py", "tests/monitor/test_sinks.py", "tests/monitor/test_golden_run.py"),
    ),
    (("koopmon/monitor/run_controller.py",), ("tests/monitor/test_run_controller.py",)),
    (("koopmon/monitor/pending_commands.py",), ("tests/monitor/test_pending_commands.py",)),
    (("koopmon/monitor/assembler.py",), ("tests/monitor/test_assembler.py",)),
    (
        ("koopmon/monitor/registry.py", "koopmon/monitor/run.py", "koopmon/monitor/turnover.py"),
        ("tests/monitor/test_registry.py", "tests/monitor/test_sinks.py", "tests/monitor/test_service.py"),
    ),
    (("koopmon/agent/capture/schedule.py",), ("tests/agent/capture/test_schedule.py",)),
    (("koopmon/agent/control/a*.py", "koopmon/agent/control/command_judge.py"), ("tests/agent/control/test_a*.py",)),
    (("koopmon/agent/control/ceilings.py",), ("tests/agent/control/test_ceilings.py",)),
    (("koopmon/agent/control/writing_weights.py",), ("tests/agent/control/test_writing_weights.py",)),
    (("koopmon/agent/control/kss/*.py",), ("tests/agent/control/kss/test_*.py",)),
    (("koopmon/agent/control/kept_settings.py",), ("tests/agent/control/test_kept_settings.py",)),
    (("koopmon/agent/control/loop_requests.py",), ("tests/agent/control/test_loop_requests.py",)),
    (("koopmon/agent/control/lr_backoff.py",), ("tests/agent/control/test_lr_backoff.py",)),
    (("koopmon/agent/control/optimizer_set.py",), ("tests/agent/control/test_optimizer_set.py",)),
    (("koopmon/agent/control/rank_group.py",), ("tests/agent/control/test_rank_group.py",)),
    (("koopmon/agent/control/rate_shares.py",), ("tests/agent/control/test_rate_shares.py",)),
    (("koopmon/agent/control/rewind.py",), ("tests/agent/control/test_rewind.py",)),
    (("koopmon/agent/control/scale_proof.py",), ("tests/agent/control/test_scale_proof.py",)),
    (("koopmon/agent/control/scaled_view.py",), ("tests/agent/control/test_scaled_view.py",)),
    (("koopmon/agent/control/state_copies.py",), ("tests/agent/control/test_state_copies.py",)),
    (
        ("koopmon/agent/control/state.py",),
        ("tests/agent/control/test_state.py", "tests/agent/control/test_actuator.py"),
    ),
    (("koopmon/agent/control/step_clock.py",), ("tests/agent/control/test_step_clock.py",)),
)
"""Modules of the decision core and the test files that must notice their mutants.

The publisher and the history are in it, because a decision is on disk before its command is sent. The other sinks show
decisions and make none.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run, print a table, and keep the figures of a whole run; return exit status 0 if it passes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutants", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="PART", help="modules, by parts of their paths; default all")
    parser.add_argument("--match", metavar="TEXT", help="mutants whose name contains this; nothing is kept")
    parser.add_argument("--survivors", action="store_true", help="the survivors of the last run, after a new test")
    parser.add_argument("--sample", type=int, metavar="N", help="N mutants of each module; nothing is kept")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes at a time")
    chosen = parser.parse_args(arguments)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    reasons: dict[str, dict[str, str]] = tomllib.loads(REASONS.read_text(encoding="utf-8"))
    kept = _kept()
    started = time.monotonic()
    verdicts: list[Verdict] = []
    for patterns, tests in GROUPS:
        modules = [path.relative_to(ROOT).as_posix() for part in patterns for path in sorted(ROOT.glob(part))]
        files = [path.relative_to(ROOT).as_posix() for part in tests for path in sorted(ROOT.glob(part))]
        sources = [
            replace(source, mutants=_pick(source, chosen, kept))
            for module in modules
            if not chosen.only or any(part in module for part in chosen.only)
            for source in [read_source(module)]
        ]
        if not any(source.mutants for source in sources):
            continue
        verdicts += try_group(sources, files, chosen.jobs)
        if not (chosen.match or chosen.sample):
            figures = _figures(verdicts, reasons)
            _keep(_after_retry(figures, kept) if chosen.survivors else figures)
    minutes = (time.monotonic() - started) / 60
    for line in page.lines({"modules": _figures(verdicts, reasons)}):
        print(line)
    survivors = [one for one in verdicts if one.status == SURVIVED]
    for one in survivors:
        print(f"survived {one.module} {one.name}: {_reason(one, reasons) or 'NO REASON'}")
    share = 1 - len(survivors) / max(1, len(verdicts))
    print(f"{share:.1%} of {len(verdicts)} mutants killed in {minutes:.1f} minutes")
    unexplained = [one for one in survivors if not _reason(one, reasons)]
    return 0 if not unexplained and (share >= PASSING_SHARE or chosen.sample or chosen.survivors) else 1


def _pick(source: Source, chosen: argparse.Namespace, kept: dict[str, Any]) -> list[Mutant]:
    """Choose among the mutants of a module, by the options."""
    found = [mutant for mutant in source.mutants if not chosen.match or chosen.match in mutant.name]
    if chosen.survivors:
        survived = kept.get(source.module, {}).get("survived", {})
        found = [mutant for mutant in found if mutant.name in survived]
    if chosen.sample:
        found = random.Random(f"{chosen.seed} {source.module}").sample(found, min(chosen.sample, len(found)))
    return found


def _reason(one: Verdict, reasons: dict[str, dict[str, str]]) -> str:
    """Look up the reason of a survivor: the longest key that its name begins with."""
    known = reasons.get(one.module, {})
    return known.get(max((key for key in known if one.name.startswith(key)), key=len, default=""), "")


def _figures(verdicts: list[Verdict], reasons: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Count by module, with the reason of each survivor."""
    figures = {}
    for module in dict.fromkeys(one.module for one in verdicts):
        mine = [one for one in verdicts if one.module == module]
        counts = Counter(one.status for one in mine)
        figures[module] = {
            "mutants": len(mine),
            "share_killed": 1 - counts[SURVIVED] / len(mine),
            "killed_by_time_limit": counts[TIMEOUT],
            "survived": {one.name: _reason(one, reasons) for one in mine if one.status == SURVIVED},
        }
    return figures


def _after_retry(figures: dict[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
    """Return the kept figures of modules whose survivors were tried again: the others are dead already."""
    return {
        module: {
            **kept[module],
            "share_killed": 1 - len(of["survived"]) / kept[module]["mutants"],
            "killed_by_time_limit": kept[module]["killed_by_time_limit"] + of["killed_by_time_limit"],
            "survived": of["survived"],
        }
        for module, of in figures.items()
        if kept[module]["mutants"] == len(read_source(module).mutants)
    }


def _kept() -> dict[str, Any]:
    """Read the figures of earlier runs."""
    modules: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8"))["modules"] if RESULT.exists() else {}
    return modules


def _keep(figures: dict[str, Any]) -> None:
    """Write the figures of the modules that were tried. Those of the others stay while the modules exist."""
    modules = {module: of for module, of in sorted({**_kept(), **figures}.items()) if (ROOT / module).exists()}
    result = {"provenance": provenance(seed=0), "modules": modules}
    RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
