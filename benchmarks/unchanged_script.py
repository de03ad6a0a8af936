"""The guard on an unchanged script, and on a healthy one: `python -m benchmarks.unchanged_script`.

It runs tests/scripts/train_prose.py with two gloo ranks under torchrun, one run after the other. The monitor shares the
two cores with them. Each learning rate and seed runs unguarded (it must diverge between steps 25 and 120) and under
`koopmon run` with default settings. A run counts as saved if it finishes, its final loss is below that at the start and
within 10% of the same seed at the best fixed rate, and its learning-rate scale never falls below 1/8. At the safe rate,
the same model and one with Pre-LN run plain and guarded. Without an action, such a run must end with bit-identical
parameters. Losses are nats per byte; the final loss is the mean of the last 20 steps.

The work folder keeps finished runs, so an interrupted campaign continues with the others.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import campaign
from benchmarks.provenance import provenance
from koopmon.history.reader import HistoryReader

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tests" / "scripts" / "train_prose.py"
RESULT = Path(__file__).parent / "results" / "unchanged_script.json"
DIES_BETWEEN = (25, 120)
LAST = 20
MARGIN = 1.10
LOWEST_SCALE = 1 / 8
TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One training. `guarded` runs it under `koopmon run` with default settings."""

    lr: float
    seed: int
    steps: int
    norm: bool = False
    guarded: bool = False
    policy: str = ""
    """Policy of a guarded run; empty for the default."""

    @property
    def name(self) -> str:
        kind = "pre-ln" if self.norm else "no-norm"
        how = ("guarded" + (f"-{self.policy}" if self.policy else "")) if self.guarded else "plain"
        return f"{kind}-{self.lr:g}-{self.seed}-{self.steps}-{how}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Result of a training. `num_actions` and `min_lr_scale` belong to the guard; `died_at` is a step or None."""

    case: Case
    died_at: int | None
    first_loss: float
    final_loss: float
    digests: tuple[str, ...]
    num_actions: int
    min_lr_scale: float
    max_risk: float | None
    max_latency_steps: int | None
    """Steps from a command's snapshot to the step that applied it, for the slowest command of the run."""
    seconds_per_step: float


def run(case: Case, folder: Path, *, processes: int = 2) -> Result:
    """Run one training in real processes, or read its result from `folder`."""
    log, summary = folder / f"{case.name}.jsonl", folder / f"{case.name}.json"
    if not _finished(log):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        command = [*torchrun, "--nproc-per-node", str(processes), str(SCRIPT)]
        command += ["--lr", f"{case.lr:g}", "--seed", str(case.seed), "--steps", str(case.steps), "--out", str(log)]
        command += ["--norm"] if case.norm else []
        if case.guarded:
            store = folder / f"{case.name}.sqlite3"
            guard = [sys.executable, "-m", "koopmon", "run", "--summary", str(summary), "--store", str(store)]
            guard += ["--policy", case.policy] if case.policy else []
            command = [*guard, "--", *command]
        told = {**os.environ, "KOOPMON_KSS__METHOD": "published"}  # of the policy "kss+lr"
        done = subprocess.run(command, capture_output=True, timeout=TIMEOUT_SECONDS, check=False, cwd=ROOT, env=told)
        if not _finished(log):
            raise RuntimeError(f"{case.name}: exit status {done.returncode}: {done.stderr.decode()[-2000:]}")
    return _read(case, log, summary)


def _finished(log: Path) -> bool:
    return log.exists() and '"end"' in log.read_text().rsplit("\n", 2)[-2:][0]


def _read(case: Case, log: Path, summary: Path) -> Result:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    steps, end = lines[:-1], lines[-1]
    told = json.loads(summary.read_text()) if case.guarded else {}
    last = [line["loss"] for line in steps[-LAST:]]
    return Result(
        case=case,
        died_at=steps[-1]["step"] if end["end"] == "diverged" else None,
        first_loss=steps[0]["loss"],
        final_loss=statistics.fmean(last) if end["end"] == "finished" else math.inf,
        digests=tuple(end["digests"]),
        num_actions=told.get("num_backoffs", 0) + told.get("num_kss", 0),
        min_lr_scale=told.get("min_lr_scale", 1.0),
        max_risk=told.get("max_risk"),
        max_latency_steps=_latency(log.with_suffix(".sqlite3")) if case.guarded else None,
        seconds_per_step=steps[-1]["seconds"] / max(1, len(steps) - 1),
    )


def _latency(store: Path) -> int | None:
    with HistoryReader.open(store) as history:
        decisions = [decision for run in history.runs() for decision in history.decisions(run)]
    waits = [
        row.acked_step - decision.step
        for decision in decisions
        for row in decision.commands
        if row.acked_step is not None and row.outcome == "applied"
    ]
    return max(waits, default=None)


def saved(guarded: Result, best: float) -> tuple[bool, str]:
    """Return True if a guarded run was saved; `best` is the final loss of the same seed at its best fixed rate."""
    if guarded.died_at is not None:
        return False, f"died at {guarded.died_at}"
    if guarded.final_loss >= guarded.first_loss:
        return False, "learned nothing"
    if guarded.min_lr_scale < LOWEST_SCALE:
        return False, f"scale {guarded.min_lr_scale:.3g}"
    if guarded.final_loss > MARGIN * best:
        return False, f"loss {guarded.final_loss / best:.2f} x best"
    return True, f"loss {guarded.final_loss / best:.2f} x best"


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Return every training of the campaign."""
    for seed in args.seeds:
        for lr in args.lrs:
            yield Case(lr=lr, seed=seed, steps=args.steps)
            for policy in ("", *args.policies):
                yield Case(lr=lr, seed=seed, steps=args.steps, guarded=True, policy=policy)
        for lr in args.fixed:
            yield Case(lr=lr, seed=seed, steps=args.steps)
    for seed in args.safe_seeds:
        for norm in (False, True):
            for guarded in (False, True):
                case = Case(lr=args.safe_lr, seed=seed, steps=args.steps, norm=norm, guarded=guarded)
                if norm or guarded or not (seed in args.seeds and args.safe_lr in args.fixed):
                    yield case


def report(results: dict[str, Result], args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Print the tables; return the values for the JSON."""

    def of(lr: float, seed: int, **more: Any) -> Result:
        return results[Case(lr=lr, seed=seed, steps=args.steps, **more).name]

    table = Table("policy", "lr", "seed", "unguarded", "guarded", "actions", "least scale", "verdict")
    table.title = "Rates that kill"
    rows = []
    for policy, lr, seed in itertools.product(("", *args.policies), args.lrs, args.seeds):
        plain, guarded = of(lr, seed), of(lr, seed, guarded=True, policy=policy)
        best = min(of(rate, seed).final_loss for rate in args.fixed)
        good, why = saved(guarded, best)
        fair = plain.died_at is not None and DIES_BETWEEN[0] <= plain.died_at <= DIES_BETWEEN[1]
        end = "lives" if plain.died_at is None else f"dies at {plain.died_at}"
        loss = "-" if guarded.died_at is not None else f"{guarded.final_loss:.2f}"
        verdict = f"{'saved' if good else 'lost'}: {why}"
        shown = (policy or "default", f"{lr:g}", str(seed), end, loss, str(guarded.num_actions))
        table.add_row(*shown, f"{guarded.min_lr_scale:.3g}", verdict)
        row = {"policy": policy, "lr": lr, "seed": seed, "died_at": plain.died_at, "fair": fair}
        rows.append({**row, "saved": good, "why": why, "final_loss": _finite(guarded.final_loss), "best_fixed": best})
    console.print(table)
    safe = Table("model", "seed", "acted on", "highest risk", "bit-identical", title=f"Left alone at {args.safe_lr:g}")
    healthy = []
    for norm in (False, True):
        for seed in args.safe_seeds:
            plain, guarded = of(args.safe_lr, seed, norm=norm), of(args.safe_lr, seed, norm=norm, guarded=True)
            same = plain.digests == guarded.digests
            model = "Pre-LN" if norm else "No-Norm"
            acted = guarded.num_actions > 0
            safe.add_row(model, str(seed), "yes" if acted else "no", f"{guarded.max_risk:.2f}", "yes" if same else "no")
            healthy.append(
                {"model": model, "seed": seed, "acted": acted, "identical": same, "max_risk": guarded.max_risk}
            )
    console.print(safe)
    totals = {
        "saved": sum(bool(row["saved"]) for row in rows if not row["policy"]),
        "saved_by_policy": {name: sum(bool(r["saved"]) for r in rows if r["policy"] == name) for name in args.policies},
        "diverge_unguarded": sum(bool(row["fair"]) for row in rows if not row["policy"]),
        "runs": len(args.lrs) * len(args.seeds),
        "acted_no_norm": sum(bool(row["acted"]) for row in healthy if row["model"] == "No-Norm"),
        "acted_pre_ln": sum(bool(row["acted"]) for row in healthy if row["model"] == "Pre-LN"),
        "identical_when_left_alone": all(row["identical"] for row in healthy if not row["acted"]),
        "replicas_identical": all(len(set(result.digests)) == 1 for result in results.values()),
        "healthy_runs": len(healthy) // 2,
        "max_latency_steps": max((r.max_latency_steps or 0 for r in results.values()), default=0),
    }
    console.print(totals)
    return {"totals": totals, "rows": rows, "healthy": healthy}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.unchanged_script", description=__doc__.split("\n\n")[0])
    parser.add_argument("--lrs", type=float, nargs="+", default=[0.005, 0.006, 0.008])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fixed", type=float, nargs="+", default=[0.001, 0.002, 0.003])
    parser.add_argument("--safe-lr", type=float, default=0.001)
    parser.add_argument("--safe-seeds", type=int, nargs="+", default=list(range(9)))
    parser.add_argument("--policies", nargs="*", default=["kss+lr"], help="policies to compare with the default one")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--work", type=Path, help="folder of finished runs; default: a fresh one")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args(argv)
    console = campaign.console()
    work = args.work or Path(tempfile.mkdtemp(prefix="koopmon-unchanged-"))
    work.mkdir(parents=True, exist_ok=True)
    results: dict[str, Result] = {}
    todo = list(cases(args))
    with Progress(console=console) as progress:
        task = progress.add_task("trainings", total=len(todo))
        for case in todo:
            progress.update(task, description=case.name)
            results[case.name] = run(case, work)
            progress.advance(task)
    said = report(results, args, console)
    settings = {key: value for key, value in vars(args).items() if key not in ("work", "out")}
    plain = {name: asdict(result) for name, result in results.items()}
    for result in plain.values():
        result["final_loss"] = _finite(result["final_loss"])
    document = {"provenance": provenance(args.seeds[0]), "settings": settings, **said, "results": plain}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    totals = said["totals"]
    good = (
        totals["saved"] >= totals["runs"] - 1
        and totals["diverge_unguarded"] == totals["runs"]
        and totals["acted_pre_ln"] == 0
        and totals["acted_no_norm"] <= 1
        and totals["identical_when_left_alone"]
        and totals["replicas_identical"]
    )
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
