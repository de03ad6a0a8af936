"""Rewind: returns the training to a copy of its weights and optimizer state from before a fault.

Copies are taken at step edges, after an update and before the next forward: at the start, then in a slot that each copy
overwrites. Every fourth copy moves the content of that slot to a second slot first, which is therefore 1 to 5 intervals
old. All ranks take their copies at the same steps, and none of weights that are not finite. Rank 0 decides for all
which copy to return to.
"""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import msgspec
from torch import Tensor, nn

from koopmon.agent.control import rate_shares
from koopmon.agent.control.action import NEVER, Completion, ControlAction, RequestRefusedError, Target, Update
from koopmon.agent.control.lr_backoff import LrBackoff
from koopmon.agent.control.optimizer_set import OptimizerSet
from koopmon.agent.control.rate_shares import Shares
from koopmon.agent.control.state import ActionState, ControlState, Ramp
from koopmon.agent.control.state_copies import CannotCopyError, Key, StateCopy, TrainingState, copied_buffers
from koopmon.agent.stats import AgentStats
from koopmon.api import ArchitectureAdapter
from koopmon.config import LimitsConfig
from koopmon.plugins import Selection
from koopmon.wire.messages import MAX_SHARES, MAX_TEXT, Applied, Command

logger = logging.getLogger("koopmon.agent")

INTERVAL_STEPS = 16
"""First interval between two copies. It doubles while the copies cost more than MAX_COST, once the credit is spent."""
MAX_INTERVAL_STEPS = 1 << 16
SECOND_SLOT = 4
"""Number of copies between two moves to the second slot."""
START_COPY_STEPS = 2000
"""Step at which the copy of the start is freed."""
NUM_COPIES = 3
MAX_COST = 0.001
"""Largest share of the step time that copies may take over the long run."""
CREDIT = 0.5
"""Time of the first copies, over the credit of the first snapshots. Until it is spent, their cost changes nothing."""
TIMED_COPIES = 5
"""Number of copies whose median duration decides on the interval. The first ones allocate memory and are left out."""

_FAILURES = (CannotCopyError, RuntimeError, MemoryError)
"""Errors of a copy. They end rewinds and not the agent: nothing of the training has changed."""


class RewindAction(ControlAction):
    """Keeps copies of the training's state, and returns to one of them on command.

    Its parameters are the interval between copies, and of the last command the step at which it came in force
    (`at_step`) and the step of the copy (`copy_step`), and the bounds on single groups (`rate_shares`). Its strength is
    the exponent of their factors. `credit_seconds` is the time of copies that is left out of MAX_COST.
    """

    kind = "rewind"
    neutral = 0.0
    completes_at_edge = True

    def __init__(
        self, limits: LimitsConfig, stats: AgentStats, backoff: LrBackoff, *, credit_seconds: float = 0.0
    ) -> None:
        self._limits = limits
        self._credit_seconds = credit_seconds
        self._stats = stats
        self._backoff = backoff
        self._model: Callable[[], nn.Module | None] = lambda: None
        self._optimizers = OptimizerSet()
        self._start, self._recent, self._older = StateCopy(), StateCopy(), StateCopy()
        self._first_buffers: dict[Key, Tensor] | None = None
        """Copies of the buffers from before the first forward, until the copy of the start is taken."""
        self._refusal = "no step has run yet"
        self._final = ""
        """The reason why this training can never rewind; empty if there is none."""
        if limits.act == "never" or limits.max_rewinds == 0 or limits.rewind_max_bytes == 0:
            self._final = self._refusal = "the agent's limits allow no rewind"
        self._seconds: deque[float] = deque(maxlen=TIMED_COPIES)
        self._rates: tuple[float, ...] = ()
        """The rates of the groups in the update before the next copy, within the bounds on them."""
        self._no_bound = ""
        """The reason why the last rewind bounds no group more; empty if there is none."""
        self._num_copies = 0
        self._num_rewinds = 0
        self._run = self._reason = ""
        """The run and the reason of the command in force; empty on the ranks that do not decide."""

    # The decision, on rank 0.

    def target(self, request: Command | Applied, state: ControlState, step: int) -> Target:
        if isinstance(request, Applied):
            return self._restored(request, state)
        asked, most = request.rewind, self._limits.max_rewinds
        assert asked is not None
        if self._refusal:
            raise RequestRefusedError(f"no rewind: {self._refusal}")
        if self._num_rewinds >= most:
            raise RequestRefusedError(f"no rewind: {most} rewinds in this launch, the most allowed")
        if self.parameters(state).get("at_step") == step:
            raise RequestRefusedError("no rewind: another one comes in force at this step")
        if asked.unless_finite and self._has_finite_weights():
            raise RequestRefusedError("no rewind: the weights are finite")
        # The rate in force under a cap is a product that may exceed the cap by a rounding error.
        fitting = [
            copy
            for copy in (self._start, self._older, self._recent)
            if copy.step is not None
            and (copy.step == 0 or copy.step <= step - asked.min_age_steps)  # no update precedes step 0
            and copy.rate <= asked.max_rate * (1.0 + 1e-9)
        ]
        if not fitting:
            ages = ", ".join(f"step {copy.step} at rate {copy.rate:.3g}" for copy in self._held()) or "none"
            wanted = f"at least {asked.min_age_steps} steps old at a rate of at most {asked.max_rate:.3g}"
            raise RequestRefusedError(f"no rewind: no copy is {wanted}; copies: {ages}")
        self._run, self._reason = request.run, request.reason
        copy = max(fitting, key=lambda each: each.step or 0)
        before, found = self._shares(state), self._shares_from(copy, asked.max_rate, state)
        shares = rate_shares.as_parameters(found)
        if found.keys() > before.keys():
            shares[rate_shares.BOUNDED_AT] = step
        kept = {name: each for name, each in self.parameters(state).items() if not name.startswith(rate_shares.PREFIX)}
        return Target(1.0, {**kept, "at_step": step, "copy_step": copy.step or 0, **shares})

    def _has_finite_weights(self) -> bool:
        try:
            return self._training().is_finite
        except _FAILURES:
            return False  # the rewind itself then says why it cannot be

    def _restored(self, applied: Applied, state: ControlState) -> Target:
        """Return the target that has the bounds of an earlier launch. Its rewinds are not repeated."""
        shares, num_groups = applied.rate_shares, len(self._optimizers.rates())
        if shares and max(shares) >= num_groups:
            asked = f"no bound on parameter group {max(shares)}"
            raise RequestRefusedError(f"{asked}: the optimizer has {num_groups} groups with a rate that can be read")
        if refusal := self._backoff.refusal_of_bounds(shares):
            raise RequestRefusedError(f"no bound on a parameter group: {refusal}")
        parameters = {**self.parameters(state), **rate_shares.as_parameters(shares)}
        return Target(1.0 if shares else self.neutral, parameters, acts=False)

    def _shares(self, state: ControlState) -> Shares:
        """Return the bounds in force. They belong to a cap."""
        return rate_shares.in_force(state.actions.get(self.kind)) if self._backoff.parameters(state) else {}

    def _shares_from(self, copy: StateCopy, max_rate: float, state: ControlState) -> Shares:
        """Return the bounds after a rewind to `copy`: those in force, and of groups that have outgrown the others."""
        shares, self._no_bound = self._shares(state), ""
        groups = {*shares, *rate_shares.outgrown(copy.rates, self._optimizers.rates(), max_rate, shares)}
        if groups == shares.keys() or not self._backoff.parameters(state):
            return shares
        if len(groups) > MAX_SHARES:
            self._no_bound = f"at most {MAX_SHARES} groups can be bounded, not {len(groups)}"
        else:
            self._no_bound = self._backoff.refusal_of_bounds(groups)
        return shares if self._no_bound else {**shares, **rate_shares.shares_of(groups, copy.rates)}

    def tuned(self, state: ControlState) -> ControlState:
        seconds = self._stats.step_seconds
        if self._refusal or not seconds or len(self._seconds) < TIMED_COPIES or self._credit_seconds > 0.0:
            return state
        interval = tuned = self._interval(state)
        while median(self._seconds) > MAX_COST * tuned * seconds and tuned < MAX_INTERVAL_STEPS:
            tuned *= 2
        if tuned == interval:
            return state
        self._seconds.clear()
        part = state.actions.get(self.kind) or ActionState(ramp=Ramp())
        part = msgspec.structs.replace(part, parameters={**part.parameters, "interval": tuned})
        # Not a change by a command: the version stays.
        return msgspec.structs.replace(state, actions={**state.actions, self.kind: part})

    def _interval(self, state: ControlState) -> int:
        return int(self.parameters(state).get("interval", INTERVAL_STEPS))

    def applied(self, state: ControlState, step: int) -> Mapping[str, Any]:
        return {"rate_shares": self._shares(state)}

    # Facts.

    def hello(self, adapter: ArchitectureAdapter) -> Mapping[str, Any]:
        return {"rewinds": not self._refusal}

    def facts(self) -> Mapping[str, Any]:
        return {
            "rewinds": self._num_rewinds,
            "rewind_steps": sorted(copy.step for copy in self._held() if copy.step is not None),
            "rewind_refusal": self._refusal,
        }

    def _held(self) -> list[StateCopy]:
        return [copy for copy in (self._start, self._older, self._recent) if copy.step is not None]

    # The copies, on every rank.

    def inspect(self, model: nn.Module, optimizers: OptimizerSet, selection: Selection) -> None:
        self._model, self._optimizers = weakref.ref(model), optimizers

    def on_forward(self) -> None:
        # The first forward changes buffers. The weights can wait: under FSDP2 they are not sharded at this moment.
        model = self._model()
        if self._first_buffers is None and not self._final and self._stats.step == 0 and model is not None:
            try:
                self._first_buffers = {key: each.clone() for key, each in copied_buffers(model).items()}
            except _FAILURES as error:
                self._give_up(str(error)[:200])

    def apply(self, state: ControlState, step: int, update: Update) -> None:
        self._backoff.bound_groups(state, step)
        if not self._final and (step == 0 or (step + 1) % self._interval(state) == 0):
            self._rates = self._optimizers.rates()
            self._check_coverage()
        if not self._final and step == 0:
            try:
                self._copy_start()
            except _FAILURES as error:
                self._give_up(str(error)[:200])

    def _copy_start(self) -> None:
        """Copy the state from before the first update. The optimizer may have state already, if it was resumed."""
        training = self._training()
        if self._within_limit(training.nbytes):
            training.tensors |= self._first_buffers or {}
            self._start.take(training, 0, 0.0)
        self._first_buffers = {}

    def _within_limit(self, nbytes: int) -> bool:
        most = self._limits.rewind_max_bytes
        if nbytes > most:
            self._give_up(f"the copies take {nbytes} bytes, [limits] rewind_max_bytes is {most}")
        return nbytes <= most

    def _check_coverage(self) -> None:
        """Give up if parameters of the model receive gradients that another optimizer uses: its state has no copy."""
        updated, model = self._optimizers.parameters, self._model()
        parameters = () if model is None else model.parameters()
        if any(each.requires_grad and each.grad is not None and id(each) not in updated for each in parameters):
            self._give_up("the optimizer does not update all parameters that receive gradients")

    def end(self) -> None:
        self._give_up(self._final or "the agent applies no commands")

    def on_renumbered(self) -> None:
        for each in self._held():  # copies of other ranks with the same number are of another time
            each.clear()

    def next_work(self, state: ControlState, step: int) -> int:
        if self.parameters(state).get("at_step", -1) >= step:
            return step + 1
        interval = self._interval(state)
        return NEVER if self._final else (step // interval + 1) * interval

    def at_edge(self, state: ControlState, step: int, agree: Callable[[bool], bool]) -> Completion | None:
        parameters = self.parameters(state)
        if parameters.get("at_step") == step - 1:
            return self._rewind(int(parameters["copy_step"]), step, state, agree)
        if self._final:
            return None
        interval = self._interval(state)
        if step == 1 or step % interval == 0:
            try:
                self._copy(state, step, interval)
            except _FAILURES as error:
                self._give_up(str(error)[:200])
        if step >= START_COPY_STEPS and self._start.step is not None:
            self._start = StateCopy()
        return None

    def _copy(self, state: ControlState, step: int, interval: int) -> None:
        started = time.perf_counter()
        training = self._training()
        for each in self._held():
            if each.identity != training.identity:  # an optimizer or a parameter came or went
                each.clear()
        if not self._within_limit(self._start.nbytes + (NUM_COPIES - 1) * training.nbytes):
            return
        self._set_refusal("")
        if step % interval or not training.is_finite:
            return
        if step % (SECOND_SLOT * interval) == 0 and self._recent.step is not None:
            self._recent, self._older = self._older, self._recent
        rate = self._stats.measured["learning_rate"].get()
        scale = self._backoff.effective(state, step - 1)
        self._recent.take(training, step, math.inf if rate is None else rate * scale, self._rates)
        self._num_copies += 1
        if self._num_copies > SECOND_SLOT:  # both slots have their memory
            self._seconds.append(time.perf_counter() - started)
            self._credit_seconds -= self._seconds[-1]

    def _rewind(self, copy_step: int, step: int, state: ControlState, agree: Callable[[bool], bool]) -> Completion:
        copy = next((copy for copy in self._held() if copy.step == copy_step), None)
        training: TrainingState | None = None
        try:
            training = self._training()
        except _FAILURES as error:
            self._give_up(str(error)[:200])
        shares = self._shares(state)
        bounds = max(shares, default=-1) < len(self._optimizers.rates())
        ready = copy is not None and training is not None and copy.fits(training) and bounds
        if not agree(ready) or copy is None or training is None:
            if copy is not None:
                copy.clear()  # a rank without it would refuse it again
            return Completion("failed", f"the copy of step {copy_step} no longer fits the training on every rank")
        copy.restore(training)
        for each in self._held():
            if each.step is not None and each.step > copy_step:
                each.clear()
        self._num_rewinds += 1
        cap = self._backoff.parameters(state).get("max_rate")
        more = "" if cap is not None or not self._reason else f"; {self._reason}"
        bounded = f"; parameter groups with a bound on their rate: {len(shares)}" if shares else ""
        bounded += f"; no further bound: {self._no_bound}" if self._no_bound else ""
        logger.log(
            logging.WARNING if self._run else logging.DEBUG,
            "koopmon: %s: weights and optimizer state returned from step %d to step %d, %d steps are lost, %s%s",
            self._run or "this rank",
            step,
            copy_step,
            step - copy_step,
            "the learning rate is not capped" if cap is None else f"the learning rate is capped at {cap:.3g}",
            more + bounded,
        )
        return Completion("applied", f"returned to step {copy_step}{bounded}"[:MAX_TEXT])

    def _training(self) -> TrainingState:
        model = self._model()
        training = None if model is None else TrainingState(model, self._optimizers)
        if training is None or not training.optimizers:
            raise CannotCopyError("the model or the optimizer is gone")
        return training

    def _give_up(self, reason: str) -> None:
        self._final = reason
        self._first_buffers = {}
        self._start, self._recent, self._older = StateCopy(), StateCopy(), StateCopy()
        self._set_refusal(reason)

    def _set_refusal(self, reason: str) -> None:
        self.hello_changed |= bool(reason) != bool(self._refusal)
        self._refusal = reason
