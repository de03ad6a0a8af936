"""Proof of a cell of the support matrix by three trainings: without koopmon, watched, and under commands.

Every check uses real runs of all ranks. A cell is *proven* if the agent acts by default and every check holds,
*untested* if it attaches watch-only with a reason, and *refused* if it takes no part and logs one line. It is *wrong*
if a check fails, whatever the agent reports. A combination that torch does not support is none of these.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import koopmon
from benchmarks.matrix.cells import PIPELINED, Cell
from benchmarks.matrix.model import L, T, tokens_at
from benchmarks.matrix.training import (
    LEARNING_RATE,
    State,
    Training,
    digest,
    flat,
    forget_compiled,
    gradients,
    states_at,
)
from koopmon.token_sampling import choose_rows
from koopmon.wire.messages import KssSettings
from tests.agent.models import record_rates
from tests.agent.scripted_monitor import ScriptedMonitor

STEPS = 5
NUM_SAMPLES = 24
"""Tokens of one snapshot, all ranks together."""
LR_SCALE = 0.25
KSS = KssSettings(alpha=1.0, svd_rank=4, num_samples=24, tau_u=0.8, beta=0.5)
MAX_STEPS = 600
STEER_SECONDS = 300.0
CHECKED_STEPS = 2
CONNECT_SECONDS = 20.0
TOLERANCE = {"fp32": 0.01, "bf16": 0.2, "scaler": 0.2}
"""Largest difference of the whole gradient from the explicit one, relative to KSS's part of it.

A missing microbatch, scaler or rank would give a difference of a half and more.
"""
STATE_TOLERANCE = {"fp32": 1e-4, "bf16": 0.06, "scaler": 0.02}
"""Largest difference of a sent state from the plain model's, relative to the states' size. Another token would give 1.
"""


class Lines(logging.Handler):
    """koopmon's messages to the user."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage().removeprefix("koopmon: "))


def prove(cell: Cell, rank: int, endpoint: str, monitor: ScriptedMonitor | None) -> dict[str, Any]:
    """Return the results of `cell` from rank 0; a collective. `monitor` belongs to rank 0."""
    try:
        losses, parameters = _train_alone(cell, rank)
    except Exception as error:
        failure = _first_failure(cell, error)
        if cell.parallel in PIPELINED:
            dist.destroy_process_group()  # the other stage would wait for this one until its time limit
        return {"state": "not in torch", "line": failure, "checks": {}}
    lines = Lines()
    logging.getLogger("koopmon.agent").addHandler(lines)
    try:
        status, checks = _watch(cell, rank, endpoint, monitor, losses, parameters)
        attached = _everywhere(bool(status["enabled"] and status["num_layers"]))
        acts = _everywhere(bool(status["acts"]))
        said = list(lines.said)
        no_kss = ""
        if attached:
            steered, no_kss = _steer(cell, rank, endpoint, monitor, always=not acts)
            checks |= steered
    finally:
        logging.getLogger("koopmon.agent").removeHandler(lines)
    held = all(checks.values())
    if not attached:
        state = "refused" if held and said else "wrong"
        return {"state": state, "line": (said or [status["reason"]])[0], "checks": checks, "layout": status["layout"]}
    state = "wrong" if not held else "proven" if acts else "untested"
    line = said[0] if said else ""
    return {"state": state, "line": line, "checks": checks, "layout": status["layout"], "kss_refused": no_kss}


def _train_alone(cell: Cell, rank: int) -> tuple[list[float], list[State]]:
    """Losses, and the parameters before each step and after the last."""
    forget_compiled()
    training = Training(cell, rank)
    losses, parameters = [], [training.parameters()]
    for step in range(STEPS):
        losses += training.step(step)
        parameters.append(training.parameters())
    return losses, parameters


def _watch(
    cell: Cell, rank: int, endpoint: str, monitor: ScriptedMonitor | None, losses: list[float], parameters: list[State]
) -> tuple[dict[str, Any], dict[str, bool]]:
    """Train with koopmon attached and no command: return the agent's status and the results of the checks."""
    forget_compiled()
    training = Training(cell, rank)
    agent = _attach(cell, training, endpoint, "watched", {})
    found: list[float] = []
    for step in range(STEPS):
        found += training.step(step)
        _settle(agent)
    status = agent.status()
    last = digest(training.parameters())
    agent.close()
    checks = {"losses": found == losses and last == digest(parameters[-1])}
    if _everywhere(bool(status["enabled"] and status["num_layers"])):
        checks["taps"] = status["taps_missing"] == 0 and not any(status["dropped"].values()) and status["errors"] == 0
        if monitor is not None:
            checks["tokens"] = _right_tokens(cell, monitor, parameters)
    return status, {name: _everywhere(held) for name, held in sorted(_with_tokens(checks).items())}


def _with_tokens(checks: dict[str, bool]) -> dict[str, bool]:
    """Only rank 0 has the shards, so the others use its result."""
    return checks | {"tokens": checks.get("tokens", True)} if "taps" in checks else checks


def _right_tokens(cell: Cell, monitor: ScriptedMonitor, parameters: Sequence[State]) -> bool:
    """Check that every sender sent each step's snapshot once, with every point once and the right tokens."""
    shards = [(header, states) for header, states in list(monitor.shards) if header.run == "watched"]
    senders = sorted({header.process_rank for header, _ in shards})
    num_senders = shards[0][0].num_senders if shards else 0
    if len(senders) != num_senders:
        return False
    for data_rank, sender in enumerate(senders):
        mine = [(header, states) for header, states in shards if header.process_rank == sender]
        if [header.step for header, _ in mine] != list(range(1, STEPS)):
            return False
        for header, states in mine:
            expected = torch.stack(states_at(cell, parameters[header.step], tokens_at(header.step, 0, data_rank)))
            if cell.parallel == "tp-sequence":  # the first rank's tokens
                expected = expected[:, :, : T // 2]
            share, expected = -(-NUM_SAMPLES // num_senders), expected.flatten(1, 2).float()
            if (header.first_point, header.num_points) != (0, L + 1) or states.shape[0] != L + 1:
                return False
            if cell.compile in (
                "whole",
                "fullgraph",
                "inner",
            ):  # the graph chooses by the number of tokens of an earlier forward
                rows = _nearest_tokens(states.float(), expected)
                if (
                    not share // 2 <= len(set(rows.tolist())) <= len(rows) <= share
                ):  # equal beginnings have equal states
                    return False
            else:
                rows = choose_rows(expected.shape[1], share, seed=0, step=header.step, data_rank=data_rank)
            wanted = expected[:, rows]
            if states.shape != wanted.shape:
                return False
            difference = float((states.float() - wanted).norm() / wanted.norm())
            if not difference < _tolerance(STATE_TOLERANCE, cell):
                return False
    return True


def _nearest_tokens(states: Tensor, expected: Tensor) -> Tensor:
    """Return the token of `expected` (L + 1, tokens, D) that is nearest to each one of `states` over all points."""
    found, all_tokens = (each.transpose(0, 1).flatten(1) for each in (states, expected))
    return torch.cdist(found, all_tokens).argmin(dim=1)


def _steer(
    cell: Cell, rank: int, endpoint: str, monitor: ScriptedMonitor | None, *, always: bool
) -> tuple[dict[str, bool], str]:
    """Train under commands: KSS, then a back-off. Return the checks, and the reason for a refusal of KSS."""
    forget_compiled()
    training = Training(cell, rank)
    agent = _attach(cell, training, endpoint, "steered", {"limits": {"act": "always"}} if always else {})
    seen: list[float] = []
    record_rates(training.optimizer, seen)
    script = _Script(agent, monitor)
    errors: list[float] = []
    scales: list[float] = []
    agreed, refused, deadline = True, False, time.monotonic() + STEER_SECONDS
    for step in range(MAX_STEPS):
        status = agent.status()
        alpha, updates = status["applied"]["kss"]["alpha"], status["step"]
        script.go_on(checked=len(errors) >= CHECKED_STEPS)
        refused = _anywhere(bool(script.refused))
        checks = (alpha > 0.0 or refused) and len(errors) < CHECKED_STEPS
        before = training.parameters() if checks else {}
        loss_scale = 1.0 if training.scaler is None else training.scaler.get_scale()
        training.step(step)
        skipped = training.scaler is not None and training.scaler.get_scale() < loss_scale
        scale = 1.0 if skipped else seen[-1] / LEARNING_RATE
        scales.append(scale)
        agreed = agreed and _agree([alpha, scale])
        if not agreed:
            break
        if checks and not skipped:
            task, kss = gradients(cell, before, KSS, step, updates, rank)
            moved = (flat(before) - flat(training.parameters())) / (LEARNING_RATE * scale)
            errors.append(float((moved - task - kss * (alpha > 0.0)).norm() / kss.norm()))
        done = scales.count(LR_SCALE) >= CHECKED_STEPS or not agent.enabled or time.monotonic() > deadline
        if _anywhere(done):
            break
    num_errors, replicas = agent.status()["errors"], _agree_on(digest(training.parameters()))
    agent.close()
    held = {
        "kss": len(errors) == CHECKED_STEPS and max(errors) < _tolerance(TOLERANCE, cell),
        "back_off": scales.count(LR_SCALE) >= CHECKED_STEPS,
        "one_step": agreed and num_errors == 0,
        "replicas": replicas,
    }
    return {name: _everywhere(each) for name, each in held.items()}, script.refused


class _Script:
    """Commands of the monitor at rank 0: KSS as soon as commands reach all ranks, a back-off after its check."""

    def __init__(self, agent: koopmon.Agent, monitor: ScriptedMonitor | None) -> None:
        self.refused = ""
        """Return the reason for the refusal of KSS."""
        self._agent = agent
        self._monitor = monitor
        self._sent: list[str] = []

    def go_on(self, *, checked: bool) -> None:
        monitor = self._monitor
        if monitor is None or not self._agent.status()["control_ready"]:
            return
        if not self._sent:
            self._sent.append(monitor.command("set_kss", "steered", kss=KSS))
        elif len(self._sent) == 1 and checked:
            self._sent.append(monitor.command("set_lr_scale", "steered", lr_scale=LR_SCALE))
        elif not self.refused and monitor.acked(self._sent[0]):
            ack = monitor.ack(self._sent[0])
            self.refused = ack.detail if ack.outcome == "refused" else ""


def _attach(cell: Cell, training: Training, endpoint: str, run: str, config: dict[str, Any]) -> koopmon.Agent:
    settings = {"sampling": {"num_samples": NUM_SAMPLES}, "cadence": {"dense_every": 1, "initial_credit_seconds": 60.0}}
    agent = koopmon.attach(training.model, training.optimizer, endpoint=endpoint, run=run, config=settings | config)
    # Stages of a pipeline do not communicate with each other: the message of the agent comes with the first forward.
    deadline = time.monotonic() + (1.0 if cell.parallel in PIPELINED else CONNECT_SECONDS)
    while _sends(agent) and not agent.status()["connected"] and time.monotonic() < deadline:
        time.sleep(0.005)
    if dist.is_initialized():
        dist.barrier()
    return agent


def _sends(agent: koopmon.Agent) -> bool:
    runtime = agent._runtime
    return agent.enabled and runtime is not None and runtime.io_thread is not None


def _settle(agent: koopmon.Agent) -> None:
    """Wait until the snapshot of this step was sent, so that later ones find a free buffer."""
    deadline = time.monotonic() + 5.0
    while _sends(agent) and time.monotonic() < deadline:
        status = agent.status()
        if not status["num_layers"] or status["sent"] + sum(status["dropped"].values()) >= status["step"] - 1:
            return
        time.sleep(0.001)


def _tolerance(table: dict[str, float], cell: Cell) -> float:
    return table["bf16" if cell.parallel == "fsdp2-mixed" else cell.precision]


# The ranks share these results.


def _first_failure(cell: Cell, error: Exception) -> str:
    """Return the failure of the first failed rank. The others may only have waited for it."""
    failure = (str(error).strip().splitlines() or [""])[0]
    said = f"{type(error).__name__}: {failure[:160]}"
    if not dist.is_initialized():
        return said
    return str(dist.distributed_c10d._get_default_store().compare_set(f"failed {cell.name}", "", said).decode())


def _reduced(value: float, operation: Any) -> float:
    if not dist.is_initialized():
        return value
    tensor = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(tensor, operation)
    return float(tensor)


def _everywhere(held: bool) -> bool:
    return bool(_reduced(float(held), dist.ReduceOp.MIN))


def _anywhere(held: bool) -> bool:
    return bool(_reduced(float(held), dist.ReduceOp.MAX))


def _agree(values: Sequence[float]) -> bool:
    """Return True if every rank has equal values."""
    return all(_reduced(each, dist.ReduceOp.MIN) == _reduced(each, dist.ReduceOp.MAX) for each in values)


def _agree_on(text: str) -> bool:
    return _agree([int(text[:6], 16), int(text[6:12], 16)])
