"""Scenes of the campaign: kinds of faults, their numbers and stages, and the results of each scene."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import campaign
from benchmarks.fault_campaign import hostile, kinds, scripts
from benchmarks.fault_campaign.machine import Link, small_disk
from benchmarks.fault_campaign.stages import Found, Watched, inject

STALL_SECONDS = 5.0
"""Longest step that a fault outside of the ranks may cause."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of fault: `scenes` long runs of `count` injections.

    `own` is True for faults of the ranks themselves, which may stop them. `needs` has the required tools of the
    machine.
    """

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
    """Return a scene that injects `fault` beside a monitor with a guarded job and a watch-only one.

    With `spare`, a second monitor waits for its turn.
    """

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
    "agents_flood": Kind(play=beside_monitor(kinds.agents_flood), scenes=1, count=20),
    "monitor_floods": Kind(play=beside_monitor(kinds.monitor_floods, spare=True), scenes=1, count=20),
    "monitor_moved": Kind(play=beside_monitor(kinds.monitor_moved, spare=True, tcp=True), scenes=1, count=16),
    "partition": Kind(play=beside_monitor(kinds.partition, cable=True), scenes=2, count=16, needs="namespaces"),
    "slow_link": Kind(play=beside_monitor(kinds.slow_link, cable=True), scenes=1, count=24, needs="namespaces"),
    "disk_full": Kind(play=beside_monitor(kinds.disk_full, disk=True), scenes=2, count=16, needs="mounts"),
    "disk_read_only": Kind(play=beside_monitor(kinds.disk_read_only), scenes=2, count=16),
    "store_corrupted": Kind(play=beside_monitor(kinds.store_corrupted, spare=True, observe=True), scenes=1, count=20),
    "clock_jump": Kind(play=beside_monitor(kinds.clock_jump, clock=True), scenes=2, count=25),
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
    "extreme_numbers": Kind(play=beside_monitor(kinds.extreme_numbers), scenes=1, count=20),
    "adapter_raises": Kind(play=scripts.adapter_raises, scenes=1, count=30),
    "hostile_plugin": Kind(play=hostile.hostile_plugin, scenes=1, count=len(hostile.MANNERS)),
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
    """Run one scene. The folder of a scene with problems is kept."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # its exit ends all started processes
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
    """Return the results of a scene, with each problem assigned to the injection before it."""
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
    """Return the longest time between two steps of one launch. The time between two launches does not count."""
    return max((b - a for a, b in pairwise(edges) if start <= b < end), default=0.0)
