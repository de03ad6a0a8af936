"""Checks of the fault campaign: differing losses or replicas, and lost or doubled decisions.

Three sources are compared. The log of each rank has the training. The audit log (the monitor's store, or the acks at a
scripted monitor) has the commands and their acknowledgements. `training.follow` repeats the training with only the
commands of the audit log, at the steps of their acks.
"""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.fault_campaign.machine import Job
from benchmarks.fault_campaign.training import RATE, Line, Stretch, follow, read_lines
from koopmon.agent.circuit_breaker import CircuitBreaker
from koopmon.agent.control.all_actions import make_actions
from koopmon.agent.stats import AgentStats
from koopmon.config import Config

NUM_RESTORED = len(make_actions(Config(), AgentStats(), CircuitBreaker("the campaign")))
"""Changes that a rank counts as the settings of an earlier launch come in force: one for each kind of action."""
DYING_STEPS = 3
"""Steps before the kill of a rank in which an applied command may lack an ack, because no rank could send it."""
DECIDED = re.compile(r"run (\S+) step (\d+): (?:calm|alert|acting|backed_off|recovering): ")


@dataclass(frozen=True, slots=True)
class Entry:
    """A command in the audit log. `applied_at` has the steps of its acks, at most one of which is right.

    `scale` is its factor on the rate, None for other kinds.
    """

    command_id: str
    outcome: str
    applied_at: tuple[int, ...]
    scale: float | None


@dataclass(frozen=True, slots=True)
class Chapter:
    """Audit log of one launch of a run: the entries of the process `pid`."""

    run: str
    pid: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem at a time of the monotonic clock. `kind`: training, replicas, lost, doubled."""

    kind: str
    at: float
    what: str


@dataclass(slots=True)
class Examination:
    """Results from the logs of one job."""

    problems: list[Problem] = field(default_factory=list)
    edges: list[float] = field(default_factory=list)
    """End of each step."""
    num_steps: int = 0
    num_applied: int = 0
    num_restored: int = 0
    num_dying: int = 0


def read_store(path: Path) -> list[Chapter]:
    """Return every incarnation in a closed store."""
    chapters = []
    with contextlib.closing(sqlite3.connect(path)) as database:
        rows = database.execute("SELECT i.id, name, hello FROM incarnations AS i JOIN runs ON runs.id = run_id")
        for row, run, hello in rows.fetchall():
            found = database.execute(
                "SELECT c.id, c.command, c.outcome FROM commands AS c JOIN decisions AS d ON d.id = decision_id"
                " WHERE incarnation_id = ? ORDER BY c.rowid",
                (row,),
            )
            entries = []
            for command_id, command, outcome in found.fetchall():
                steps = database.execute(
                    "SELECT DISTINCT step FROM acks WHERE command_id = ? AND outcome = 'applied'", (command_id,)
                )
                scale = json.loads(command).get("lr_scale")
                entries.append(Entry(command_id, outcome, tuple(step for (step,) in steps), scale))
            chapters.append(Chapter(run, json.loads(hello)["pid"] if hello else 0, tuple(entries)))
    return chapters


MADE_UP = "extreme-"
"""Prefix of the names of runs without a training."""


def doubted_decisions(path: Path, said: Iterable[str]) -> list[str]:
    """Return decisions that are in the monitors' log and not in the store, and decisions that the store has twice."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        rows = database.execute(
            "SELECT name, step, incarnation_id, phase, reason FROM decisions AS d"
            " JOIN incarnations AS i ON i.id = incarnation_id JOIN runs ON runs.id = run_id"
        ).fetchall()
    stored = Counter((run, step) for run, step, *_ in rows)
    logged = Counter((match[1], int(match[2])) for line in said if (match := DECIDED.search(line)))
    found = [f"lost: run {run} step {step}" for (run, step), count in logged.items() if count > stored[run, step]]
    # A made-up run may go back to an earlier step and get a second decision there.
    doubled = [each for each, count in Counter(rows).items() if count > 1 and not each[0].startswith(MADE_UP)]
    return found + [f"doubled: run {run} step {step}: {reason}" for run, step, _, _, reason in doubled]


def examine(job: Job, chapters: Sequence[Chapter], runs: Mapping[str, str] | None = None) -> Examination:
    """Compare the logs of `job` with the audit log and with the training repeated without koopmon.

    `runs` has the run of each stretch if they differ.
    """
    found = Examination()
    poisons = _poisons(Path(f"{job.out}.orders"))
    stretches, logs = [], []
    before: tuple[float, ...] = ()
    names = [name for name in job.stretches() if read_lines(job.log(name, 0))]
    for number, name in enumerate(names):
        world = job.worlds.get(name.partition("-")[0], job.world)
        lines = [read_lines(job.log(name, rank)) for rank in range(world)]
        run = job.run if runs is None else runs[name]
        mine = [chapter for chapter in chapters if (chapter.run, chapter.pid) == (run, job.pid(0, name))]
        entries = [entry for chapter in mine for entry in chapter.entries]
        restorable = before if number and runs is None else ()
        num_dying = found.num_dying
        # Rank 0 may be killed before it writes the line of a step that another rank has written.
        others = max(lines, key=lambda each: each[-1].step if each else -1)
        written = [*lines[0], *(line for line in others if line.step > lines[0][-1].step)]
        scales = _account(found, written, entries, restorable, dies=name != names[-1])
        first, last = lines[0][0].step, max(each[-1].step for each in lines if each)
        stretches.append(Stretch(first=first, last=last, world=world, scales=scales, poisons=poisons))
        logs.append(lines)
        # If the ack of the last command was lost with its rank, the settings of the command before return.
        known = 2 if found.num_dying > num_dying else 1
        before = tuple(scales[step] for step in sorted(scales)[-known:]) or before
        # A rank may be killed after it has put a command in force, and before its ack and before the line of that step.
        before += tuple(entry.scale for entry in entries if not entry.applied_at and entry.scale is not None)
        found.edges += [line.at for line in lines[0]]
        found.num_steps += len(lines[0])
    for lines, expected in zip(logs, follow(stretches), strict=True):
        leader = {line.step: line for line in lines[0]}
        for rank, each in enumerate(lines):
            for line in each:
                wanted = expected[line.step]
                if line.loss != wanted.losses[rank] or (line.digest and line.digest != wanted.digest):
                    text = f"{job.run} rank {rank} step {line.step}: loss {line.loss}, expected {wanted.losses[rank]}"
                    found.problems.append(Problem("training", line.at, text))
                    break
            for line in each:
                beside = leader.get(line.step, line)
                if (line.digest, line.rate, line.version) != (beside.digest, beside.rate, beside.version):
                    text = f"{job.run} step {line.step}: rank {rank} has {line}, rank 0 {beside}"
                    found.problems.append(Problem("replicas", line.at, text))
                    break
    return found


def _poisons(orders: Path) -> dict[int, str]:
    lines = orders.read_text().splitlines() if orders.exists() else []
    return {order["step"]: order["value"] for order in map(json.loads, lines) if order["do"] == "poison"}


def _account(
    found: Examination, lines: Sequence[Line], entries: Sequence[Entry], restorable: Sequence[float], *, dies: bool
) -> dict[int, float]:
    """Match the changes in one stretch with the audit log; return the scale on the rate by its first step."""
    first = lines[0].step
    due: dict[int, list[Entry]] = {}
    for entry in entries:
        for step in entry.applied_at:
            due.setdefault(first + step, []).append(entry)
        if len(entry.applied_at) > 1 or (entry.applied_at and entry.outcome != "applied"):
            text = f"command {entry.command_id}: {entry.outcome}, applied at {entry.applied_at}"
            found.problems.append(Problem("doubled", lines[-1].at, text))
    unanswered = {entry.scale for entry in entries if not entry.applied_at}
    scales: dict[int, float] = {}
    scale, version = 1.0, 0
    for line in lines:
        now = due.get(line.step, [])
        found.num_applied += len(now)
        for entry in now:
            scale = scale if entry.scale is None else entry.scale
        changes = len(now)
        if line.rate != (RATE * scale).hex() or (line.version >= 0 and line.version - version > changes):
            # The audit log has no explanation. The settings may come from an earlier launch...
            restored = _scale_of(line, restorable)
            took_place = changes + NUM_RESTORED if line.version < 0 else line.version - version
            if restored is not None and line.rate != (RATE * scale).hex() and took_place == changes + NUM_RESTORED:
                scale, restorable = restored, ()
                changes += NUM_RESTORED
                found.num_restored += 1
            elif restorable and now and line.rate == (RATE * scale).hex() and took_place == changes + NUM_RESTORED:
                # ...which came into force together with the next command...
                restorable = ()
                changes += NUM_RESTORED
                found.num_restored += 1
            elif dies and line.step > lines[-1].step - DYING_STEPS and _scale_of(line, unanswered) is not None:
                # ...or from a command whose rank was killed.
                scale = _scale_of(line, unanswered) or scale
                changes = line.version - version
                found.num_dying += 1
            else:
                text = f"step {line.step}: rate {float.fromhex(line.rate):g}, change {line.version}, unexplained"
                found.problems.append(Problem("lost", line.at, text))
                scale, changes = float.fromhex(line.rate) / RATE, line.version - version
        if line.version >= 0:
            if line.version - version < changes:
                text = f"step {line.step}: the audit log has {changes} changes, {line.version - version} took place"
                found.problems.append(Problem("doubled", line.at, text))
            version = line.version
        if scale != (scales[max(scales)] if scales else 1.0):
            scales[line.step] = scale
    for step in sorted(due):
        # The command was applied and acknowledged, and the rank was killed before it wrote that step.
        if dies and lines[-1].step < step <= lines[-1].step + DYING_STEPS:
            found.num_applied += len(due[step])
            for entry in due[step]:
                scales[step] = scales.get(step, scale) if entry.scale is None else entry.scale
    return scales


def _scale_of(line: Line, candidates: Iterable[float | None]) -> float | None:
    return next((scale for scale in candidates if scale is not None and line.rate == (RATE * scale).hex()), None)
