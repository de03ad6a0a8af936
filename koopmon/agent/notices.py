"""Lines of rank 0 for the person who started the job: attached, each change of the training, refusals, and the end.

They are news and no faults, so that they are logged at INFO. A job that shows no log of that level gets them on
standard error. KOOPMON_NOTICES selects the lines: `all`, `changes` without the closing line, or `none`.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from koopmon.agent.control.command_judge import CommandResult
from koopmon.agent.stats import AgentStats
from koopmon.block_finder import class_name
from koopmon.errors import one_line
from koopmon.logs import tell
from koopmon.wire.messages import Applied

logger = logging.getLogger("koopmon.agent")

VARIABLE = "KOOPMON_NOTICES"
"""`koopmon run` sets it: the launcher prints the closing lines itself."""
_SILENT_KINDS = ("set_cadence", "rewind")
"""Kinds of commands without a line: one changes nothing, and the action of the other logs the step it returned to."""


MAX_REFUSALS = 3
"""Reasons of refused commands with a line."""


class Notices:
    """The lines of one attached training. `rank` is None until the ranks are known."""

    def __init__(self, stats: AgentStats) -> None:
        self._stats = stats
        self._selected = os.environ.get(VARIABLE) or "all"
        self._pid = os.getpid()
        self._rank: int | None = None
        self._run = ""
        self._num_changes = 0
        self._refusals: set[str] = set()
        self._closed = False

    def silence(self) -> None:
        """Print nothing, as KOOPMON_NOTICES=none."""
        self._selected = "none"

    def meet(self, rank: int) -> None:
        """Note this process's rank. Only rank 0 prints lines."""
        self._rank = rank

    def attached(
        self,
        run: str,
        model: nn.Module,
        optimizers: Iterable[Optimizer],
        *,
        stack: str,
        num_layers: int,
        width: int,
        num_ranks: int,
        acts: bool,
        reason: str,
    ) -> None:
        """Print once what is watched. `reason` is the reason why the agent does not act, or acts in this layout."""
        if self._run:
            return
        self._run = run
        blocks = f"{num_layers} blocks of width {width}" + (f" in {stack}" if stack else "")
        ranks = "1 rank" if num_ranks == 1 else f"{num_ranks} ranks"
        role = "commands are applied" if acts else f"only watched: {reason}" if reason else "only watched"
        self._tell(f"run {run}: attached to {class_name(model)}: {blocks}; {ranks}; {_names(optimizers)}; {role}")

    def changed(self, result: CommandResult) -> None:
        """Print a command that is in force on all ranks, or one that is refused for a new reason. Called on rank 0."""
        is_new = result.detail not in {"", *self._refusals}
        if result.outcome == "refused" and is_new and len(self._refusals) < MAX_REFUSALS:
            self._refusals.add(result.detail)
            self._tell(f"step {result.step}: a command is refused: {one_line(result.detail, 300)}")
        if result.outcome != "applied" or result.kind in _SILENT_KINDS or result.corrects:
            return
        self._num_changes += 1
        # The detector's measurements follow the action and the causes. Page and report show them.
        reason, _, _ = one_line(result.reason, 300).partition("; unsteadiness ")
        detail = f" ({one_line(result.detail, 200)})" if result.detail else ""
        self._tell(f"step {result.step}: {reason or result.kind}{detail}")

    def closed(self, applied: Applied, why_disabled: str) -> None:
        """Print the end of this training, once."""
        if self._closed or self._selected != "all" or self._rank is None:
            return
        self._closed = True
        stats = self._stats
        if not self._run:
            reason = why_disabled or "no monitor took a snapshot, or no training forward was seen"
            self._tell(f"nothing was seen of the training in {_steps(stats.step)}: {reason}")
            return
        seen = "1 snapshot" if stats.sent == 1 else f"{stats.sent} snapshots"
        done = "nothing was done to the training"
        if self._num_changes or applied != Applied():  # an earlier launch may have left it
            times = "1 change" if self._num_changes == 1 else f"{self._num_changes or 'no'} changes"
            done = f"{times} of the training, learning rate x {applied.lr_scale:.3g} at the end"
            done += "" if applied.max_rate is None else f", at most {applied.max_rate:.3g}"
            bound = len(applied.rate_shares)
            done += f", parameter groups with a bound on their rate: {bound}" if bound else ""
        loss = stats.measured["loss"].get()
        broken = not stats.finite or (loss is not None and not math.isfinite(loss))
        finite = "NOT FINITE at the end" if broken else "finite"
        self._tell(f"run {self._run}: {seen} in {_steps(stats.step)}; {finite}; {done}; `koopmon report {self._run}`")

    def _tell(self, text: str) -> None:
        if self._selected != "none" and os.getpid() == self._pid:
            tell(logger, text, rank=self._rank)


def _names(optimizers: Iterable[Optimizer]) -> str:
    counts = Counter(type(each).__name__ for each in optimizers)
    return " and ".join(name if count == 1 else f"{count} x {name}" for name, count in counts.items())


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"
