"""The guest never harms the host: `python -m benchmarks.fault_campaign [--seed N]` breaks everything around trainings.

Real processes and sockets: a monitor, jobs of one rank and of two under torchrun and gloo, many steps a second. A scene
is one long run, or a few, into which faults of one kind are injected one after the other at random times. The policy of
these monitors is made restless on purpose, so that commands are under way whenever something breaks.

After the scene each job's log is held against the same training repeated without koopmon: losses and parameters must be
equal in every bit where no command was due, and equal to the training with the audit log's commands at the steps of
their acks where they were. Every change of the rate must be in the audit log once, every command that it calls
applied must have changed the training once; replicas must be equal at every step. Recovery is the time from the end
of the fault until a snapshot taken after it is in the store, for each job; under a scripted monitor, until a command is
applied.

Finished scenes are kept in the work folder: an interrupted campaign goes on where it was with --work.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import campaign
from benchmarks.fault_campaign import kinds, scripts
from benchmarks.fault_campaign.machine import Link, missing, small_disk
from benchmarks.fault_campaign.stages import Found, Watched, inject
from benchmarks.provenance import provenance

RESULT = Path(__file__).parents[1] / "results" / "fault_campaign.json"
STALL_SECONDS = 5.0
"""A step longer than this is no step that a fault outside of the ranks may cause."""
GOAL_SECONDS = 5.0
"""Within which 95% of recoveries must be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of fault. `scenes` long runs of `count` injections; `own` says that the ranks themselves are broken, so
    that they may well stand still; `needs` names what the machine must let us do."""

    play: Callable[[Path, random.Random, int], Found]
    scenes: int
    count: int
    own: bool = False
    needs: str = ""


def beside_monitor(
    fault: Callable[[Watched], str],
    *,
    renewed: bool = False,
    spare: bool = False,
    disk: bool = False,
    clock: bool = False,
    cable: bool = False,
    tcp: bool = False,
    quiet: bool = True,
    observe: bool = False,
    dense: bool = False,
    steered: Mapping[str, Any] | None = None,
) -> Callable[[Path, random.Random, int], Found]:
    """A scene in which `fault` is injected beside a monitor: a job that is steered, and a quiet one. With `spare` a
    second monitor waits for its turn."""

    def play(directory: Path, rng: random.Random, count: int) -> Found:
        with ExitStack() as stack:
            place = stack.enter_context(small_disk(directory / "disk")) if disk else None
            link = stack.enter_context(Link(os.getpid())) if cable else None
            changes: dict[str, Any] = dict(scripts.OBSERVE) if observe else {}
            if dense:
                changes["cadence"] = {"calm_every": 1, "dense_every": 1, "budget_ratio": 0.5}
            bind = f"tcp://{link.address}:9465" if link else f"tcp://127.0.0.1:{_free_port()}" if tcp else ""
            stage = Watched(
                directory,
                rng,
                bind=bind,
                changes=changes,
                store=place,
                clock=directory / "clock" if clock else None,
                link=link,
            )
            with stage:
                stage.steered(**(steered or {})).launch()
                if quiet:
                    stage.quiet().launch()
                if spare:
                    stage.monitor.prepare(stage.bind)
                return stage.conclude([inject(stage, fault, renewed=renewed) for _ in range(count)])

    return play


def _free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


def under_script(fault: Callable[[scripts.Scripted], str]) -> Callable[[Path, random.Random, int], Found]:
    return lambda directory, rng, count: scripts.scripted(fault, directory, rng, count)


RESUMES = {"options": ("--resume",)}
KINDS: Mapping[str, Kind] = {
    "monitor_killed": Kind(play=beside_monitor(kinds.monitor_killed, spare=True), scenes=2, count=18),
    "monitor_stopped": Kind(play=beside_monitor(kinds.monitor_stopped), scenes=2, count=18),
    "monitor_moved": Kind(play=beside_monitor(kinds.monitor_moved, spare=True, tcp=True), scenes=1, count=16),
    "partition": Kind(play=beside_monitor(kinds.partition, cable=True), scenes=2, count=16, needs="namespaces"),
    "slow_link": Kind(play=beside_monitor(kinds.slow_link, cable=True), scenes=1, count=24, needs="namespaces"),
    "disk_full": Kind(play=beside_monitor(kinds.disk_full, disk=True), scenes=2, count=16, needs="mounts"),
    "disk_read_only": Kind(play=beside_monitor(kinds.disk_read_only), scenes=2, count=16),
    "store_corrupted": Kind(play=beside_monitor(kinds.store_corrupted, spare=True, observe=True), scenes=1, count=20),
    "clock_jump": Kind(play=beside_monitor(kinds.clock_jump, clock=True), scenes=2, count=25),
    "sender_killed": Kind(play=beside_monitor(kinds.sender_killed), scenes=2, count=20),
    "rank_killed": Kind(
        play=beside_monitor(kinds.rank_killed, renewed=True, steered=RESUMES), scenes=2, count=12, own=True
    ),
    "rank_hung": Kind(play=beside_monitor(kinds.rank_hung), scenes=2, count=16, own=True),
    "resumed": Kind(
        play=beside_monitor(kinds.resumed, renewed=True, quiet=False, steered={**RESUMES, "guarded": "run"}),
        scenes=2,
        count=12,
        own=True,
    ),
    "last_step": Kind(play=scripts.last_step, scenes=1, count=30),
    "duplicate": Kind(play=under_script(scripts.duplicate), scenes=1, count=30),
    "reordered": Kind(play=under_script(scripts.reordered), scenes=1, count=25),
    "expired": Kind(play=under_script(scripts.expired), scenes=1, count=25),
    "conflicting": Kind(play=under_script(scripts.conflicting), scenes=1, count=25),
    "poisoned": Kind(play=beside_monitor(kinds.poisoned, dense=True), scenes=2, count=20),
    "adapter_raises": Kind(play=scripts.adapter_raises, scenes=1, count=30),
    "same_name": Kind(play=scripts.same_name, scenes=1, count=20),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One long run of one kind of fault."""

    kind: str
    number: int
    count: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.number}"


def play(scene: Scene) -> tuple[Mapping[str, Any], campaign.Arrays]:
    """One scene; a folder of a scene that found something is left for whoever wants to know."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    directory = Path(tempfile.mkdtemp(prefix="kf-"))
    rng = random.Random(f"{scene.seed} {scene.name}")
    began = time.monotonic()
    found = KINDS[scene.kind].play(directory, rng, scene.count)
    told = summary(found, own=KINDS[scene.kind].own)
    told["seconds"] = time.monotonic() - began
    if told["problems"]:
        told["kept"] = str(directory)
    else:
        shutil.rmtree(directory, ignore_errors=True)
    return told, {}


def summary(found: Found, *, own: bool) -> dict[str, Any]:
    """What a scene showed, problem by problem laid to the injection that came before it."""
    starts = [injection.started for injection in found.injections]
    problems = [problem for each in found.examinations for problem in each.problems]
    ends = [*starts[1:], float("inf")]
    rows = []
    for number, (injection, end) in enumerate(zip(found.injections, ends, strict=True)):
        since = starts[number] if number else 0.0
        mine = [problem for problem in problems if since <= problem.at < end]
        slowest = max((_slowest(each.edges, starts[number], end) for each in found.examinations), default=0.0)
        rows.append(
            {
                "detail": injection.detail,
                "seconds": injection.ended - injection.started,
                "recovery_seconds": injection.recovery,
                "slowest_step_seconds": slowest,
                "unaffected": not any(each.kind in ("training", "replicas") for each in mine)
                and (own or slowest < STALL_SECONDS),
                "lost": sum(each.kind == "lost" for each in mine),
                "doubled": sum(each.kind == "doubled" for each in mine),
            }
        )
    return {
        "injections": rows,
        "problems": [f"{problem.kind}: {problem.what}" for problem in problems] + found.doubts,
        "doubts": found.doubts,
        "num_steps": sum(each.num_steps for each in found.examinations),
        "num_commands": found.num_decisions,
        "num_applied": sum(each.num_applied for each in found.examinations),
        "num_restored": sum(each.num_restored for each in found.examinations),
        "num_dying": sum(each.num_dying for each in found.examinations),
    }


def _slowest(edges: Sequence[float], start: float, end: float) -> float:
    """The longest time between two steps of one launch; what lies between two launches is no step."""
    return max((b - a for a, b in pairwise(edges) if start <= b < end), default=0.0)


def scenes(args: argparse.Namespace) -> list[Scene]:
    lacking = missing()
    found = []
    for kind, plan in KINDS.items():
        if kind in args.kinds and plan.needs not in lacking:
            count = plan.count if args.count is None else args.count
            wanted = plan.scenes if args.count is None else 1
            found += [Scene(kind=kind, number=number, count=count, seed=args.seed) for number in range(wanted)]
    return found


def by_kind(kept: Sequence[campaign.Kept[Scene]]) -> list[dict[str, Any]]:
    """One row for each kind of fault."""
    rows = []
    for kind in dict.fromkeys(each.case.kind for each in kept):
        scalars = [each.scalars for each in kept if each.case.kind == kind]
        injections = [injection for each in scalars for injection in each["injections"]]
        recoveries = [each["recovery_seconds"] for each in injections if each["recovery_seconds"] is not None]
        doubts = [doubt.partition(":")[0] for each in scalars for doubt in each["doubts"]]
        rows.append(
            {
                "kind": kind,
                "injections": len(injections),
                "unaffected": sum(each["unaffected"] for each in injections),
                "lost": sum(each["lost"] for each in injections) + doubts.count("lost"),
                "doubled": sum(each["doubled"] for each in injections) + doubts.count("doubled"),
                "not_recovered": len(injections) - len(recoveries),
                "recovery_median_seconds": statistics.median(recoveries) if recoveries else None,
                "recovery_p95_seconds": percentile(recoveries, 0.95),
                "recovery_max_seconds": max(recoveries, default=None),
                "slowest_step_seconds": max(each["slowest_step_seconds"] for each in injections),
                "commands": sum(each["num_commands"] for each in scalars),
                "applied": sum(each["num_applied"] for each in scalars),
                "restored": sum(each["num_restored"] for each in scalars),
                "steps": sum(each["num_steps"] for each in scalars),
                "own": KINDS[kind].own,
            }
        )
    return rows


def percentile(values: Sequence[float], share: float) -> float | None:
    """The least of `values` that at least `share` of them do not exceed; None of none."""
    return sorted(values)[max(0, -int(-share * len(values) // 1) - 1)] if values else None


def report(rows: Sequence[Mapping[str, Any]], total: Mapping[str, Any], console: Console) -> None:
    table = Table(
        "fault", "injections", "unaffected", "lost", "doubled", "recovery: median", "95%", "most", "slowest step"
    )
    for row in rows:
        seconds = [row[f"recovery_{name}_seconds"] for name in ("median", "p95", "max")]
        cells = [row["injections"], row["unaffected"], row["lost"], row["doubled"]]
        shown = ["-" if each is None else f"{each:.1f} s" for each in seconds]
        table.add_row(row["kind"], *map(str, cells), *shown, f"{row['slowest_step_seconds']:.1f} s")
    console.print(table)
    console.print(
        f"{total['unaffected']} of {total['injections']} unaffected, {total['lost']} decisions lost, {total['doubled']}"
        f" doubled, {total['not_recovered']} not recovered; 95% recovered within {total['recovery_p95_seconds']:.1f} s"
        f" (goal {GOAL_SECONDS:.0f} s); {total['seconds'] / 60:.0f} minutes of scenes"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fault_campaign", description=__doc__.partition("\n")[0])
    campaign.options(parser, RESULT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="KIND")
    parser.add_argument("--count", type=int, help="injections of each kind, in one scene; default: the whole plan")
    args = parser.parse_args(arguments)
    console = campaign.console()
    for tool, words in missing().items():
        kinds = [kind for kind, plan in KINDS.items() if plan.needs == tool]
        console.print(f"[yellow]{words}: {', '.join(kinds)} are left out[/yellow]")
    kept = campaign.run(scenes(args), play, args.work, workers=args.workers, console=console)
    rows = by_kind(kept)
    recoveries = [
        injection["recovery_seconds"]
        for each in kept
        for injection in each.scalars["injections"]
        if injection["recovery_seconds"] is not None
    ]
    summed = (
        "injections",
        "unaffected",
        "lost",
        "doubled",
        "not_recovered",
        "commands",
        "applied",
        "restored",
        "steps",
    )
    total = {name: sum(row[name] for row in rows) for name in summed}
    total["recovery_p95_seconds"] = percentile(recoveries, 0.95)
    total["seconds"] = sum(each.scalars["seconds"] for each in kept)
    problems = [f"{each.case.name}: {problem}" for each in kept for problem in each.scalars["problems"]]
    result = {
        "provenance": provenance(args.seed),
        "settings": {"workers": args.workers, "goal_seconds": GOAL_SECONDS, "left_out": dict(missing())},
        "total": total,
        "kinds": rows,
        "problems": problems,
        "injections": {each.case.name: each.scalars["injections"] for each in kept},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    report(rows, total, console)
    for problem in problems[:20]:
        console.print(f"[red]{problem}[/red]")
    good = total["unaffected"] == total["injections"] and not problems and not total["not_recovered"]
    return 0 if good and (total["recovery_p95_seconds"] or 0.0) < GOAL_SECONDS else 1


if __name__ == "__main__":
    raise SystemExit(main())
