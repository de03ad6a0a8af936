"""The parts of the agent, connected to one model and one optimizer."""

from __future__ import annotations

import logging
import os
import time
import weakref
from dataclasses import replace
from typing import Any

import msgspec
from torch import nn
from torch.optim import Optimizer

from koopmon.agent.capture.sampler import RankSnapshot, Sampler
from koopmon.agent.capture.schedule import OverheadBudget
from koopmon.agent.capture.taps import ResidualTaps
from koopmon.agent.circuit_breaker import CircuitBreaker
from koopmon.agent.comms.control_channel import CommandResult, RankInfo
from koopmon.agent.comms.io_thread import IOThread
from koopmon.agent.control.actuator import Actuator
from koopmon.agent.control.kss_injection import KssInjection
from koopmon.agent.control.lr_backoff import LrBackoff, largest_rate, rate_sized_steps
from koopmon.agent.control.rank_group import RankGroup, ReplicaFingerprint
from koopmon.agent.parallelism import UNKNOWN, DataRanks, ParallelLayout, data_ranks, inspect_layout, kss_refusal
from koopmon.agent.rank_identity import (
    RankContext,
    RunRendezvous,
    current_context,
    default_run_name,
    store_prefix,
)
from koopmon.agent.stats import AgentStats
from koopmon.api import Stack
from koopmon.config import Config, KssConfig
from koopmon.logs import announced, log_for_job
from koopmon.plugins import Selection, source
from koopmon.wire.auth_policy import AuthPolicy
from koopmon.wire.messages import KssSettings

logger = logging.getLogger("koopmon.agent")


class AgentRuntime:
    """All hooks and threads of one attached training. `close` detaches them. The hooks keep it alive.

    The ranks may become known only after the model was built. Until then the parts that depend on them are None.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        selection: Selection,
        config: Config,
        endpoint: str,
        run: str | None,
        trust: AuthPolicy | None = None,
        *,
        io_thread: type[IOThread] = IOThread,
    ) -> None:
        self.stats = AgentStats()
        self.breaker = CircuitBreaker("the agent", _weakly(self.stand_down))
        self.adapter = selection.adapter
        self.endpoint = endpoint
        self.closed = False
        self.width = 0
        self.world: RankContext | None = None
        self.layout: ParallelLayout | None = None
        self._ranks = DataRanks(0, 1)
        self._fingerprint = 0
        self.actuator: Actuator | None = None
        self.io_thread: IOThread | None = None
        self._model = weakref.ref(model)
        self._config = config
        self._run = run
        self._trust = trust
        self._make_io_thread = io_thread
        self._pid = os.getpid()
        self._place = store_prefix(model, run)
        self._budget = OverheadBudget(config.cadence)
        self._injection = KssInjection(config.sampling.seed, self.stats, self.breaker)
        self._rates = LrBackoff()
        self._rate_sized_steps = rate_sized_steps(optimizer)
        self._rates_breaker = CircuitBreaker("learning-rate back-off")
        self._num_steps = 0
        self._num_microbatches = 1
        self._last_edge: float | None = None
        self._charged_seconds = 0.0
        self._kss_refusal = self._refuse_kss(model, selection)
        self._closables: list[IOThread | RankGroup] = []
        self._finalizer = weakref.finalize(self, _shut_down, self._pid, self._closables)
        self._handles: list[Any] = []
        self.taps = ResidualTaps(model, selection, self.breaker, self.stats, self._injection, self)
        try:
            hook, rate_hook = self.breaker.hook, self._rates_breaker.hook
            self._handles += [
                optimizer.register_step_pre_hook(hook(self._before_step)),
                optimizer.register_step_pre_hook(rate_hook(self._scale_rates)),
                optimizer.register_step_post_hook(rate_hook(self._restore_rates)),
                optimizer.register_step_post_hook(hook(self._after_step)),
            ]
            world = current_context()
            if world is not None:
                self._start(world)
        except BaseException:
            self.close("")
            raise

    @property
    def present(self) -> bool:
        """True while this training is attached: not closed, and not inherited by a forked child."""
        return not self.closed and os.getpid() == self._pid

    # Start, once the ranks are known.

    def _start(self, world: RankContext) -> None:
        config = self._config
        model = self._model()
        self._ranks = ranks = DataRanks(world.rank, world.size) if model is None else data_ranks(model, world)
        num_senders = min(ranks.size, config.sampling.max_senders)
        self.world = world
        self.actuator = Actuator(
            config,
            self.stats,
            self._budget,
            rank0=world.rank == 0,
            alone=world.size == 1,
            report=_weakly(self._report),
        )
        self.actuator.shielded = self._kss_refusal
        self._injection.data_rank = ranks.rank
        if ranks.leads and ranks.rank < num_senders:
            share = -(-config.sampling.num_samples // num_senders)
            self.taps.sampler = Sampler(config.sampling, ranks.rank, share, self.stats)
            self.io_thread = self._make_io_thread(
                self.endpoint,
                config.control,
                self.stats,
                self.breaker,
                self.actuator,
                RunRendezvous(world, self._run, self._place).resolve,
                self._description(world, num_senders),
                self._trust,
            )
            self._closables.append(self.io_thread)
        self._learn_layout(last_word=False)
        if self.io_thread is not None:
            self.io_thread.start()

    def _description(self, world: RankContext, num_senders: int) -> RankInfo:
        return RankInfo(
            process_rank=world.rank,
            world_size=world.size,
            num_senders=num_senders,
            rate_sized_steps=self._rate_sized_steps,
            **self._family(),
        )

    def _family(self) -> dict[str, Any]:
        """Return the adapter's part of hello."""
        overrides, kss = self.adapter.kss_settings(), None
        if overrides:
            known = {**msgspec.structs.asdict(KssConfig()), **overrides}
            try:
                kss = msgspec.convert(
                    {name: known[name] for name in KssSettings.__struct_fields__ if name in known}, KssSettings
                )
            except msgspec.ValidationError as error:
                logger.warning("koopmon: the KSS settings of %s are left out: %s", source(self.adapter), error)
        return {"adapter": self.adapter.name, "thresholds": dict(self.adapter.thresholds()), "kss": kss}

    def _refuse_kss(self, model: nn.Module, selection: Selection) -> str:
        return "" if self._config.kss.through_shielded else kss_refusal(model, selection)

    def _learn_layout(self, *, last_word: bool) -> None:
        """Set the layout and, from it, whether koopmon acts. Some layouts are known only in the first forward."""
        model, world, actuator = self._model(), self.world, self.actuator
        if model is None or world is None or actuator is None:
            return
        if world.size > self._ranks.size and not last_word:
            return  # only the first forward shows if ranks that share a model also share its tokens
        found = inspect_layout(model, world) or (UNKNOWN if last_word else None)
        if found is not None and found.refused:
            self.layout, actuator.acts = found, False
            self._withdraw(found.caution)
            return
        if self.layout is not None or found is None:
            return
        self.layout = found
        asked = self._config.limits.act
        actuator.acts = asked == "always" or (asked == "auto" and self.layout.proven)
        if asked == "auto" and not self.layout.proven:
            log_for_job(
                logger, f"watch-only: {self.layout.caution}; [limits] act = 'always' acts all the same", rank=world.rank
            )
        if actuator.acts and world.size > 1:
            share = ReplicaFingerprint(self._ranks.rank, self._fingerprint) if world.size > self._ranks.size else None
            actuator.group = RankGroup(world, self._config.control, self.stats, self._place, share)
            self._closables.append(actuator.group)
        self._describe(acts=actuator.acts)

    def _describe(self, **changes: Any) -> None:
        if self.io_thread is not None:
            self.io_thread.describe(replace(self.io_thread.description, **changes))

    def _report(self, result: CommandResult) -> None:
        if self.io_thread is not None:
            self.io_thread.post(result)

    # Events of the taps.

    def on_forward(self) -> None:
        if self.world is None:
            # The launcher may have announced ranks, but none were initialized: this process trains alone.
            rank, world = announced()[0], current_context()
            if world is None:
                self._run, world = f"{self._run or default_run_name()}-rank{rank}", RankContext()
            self._start(world)
        if self._rates.stranded:  # schedulers must not see the scaled rates
            self._rates.restore_rates()

    def on_chain_verified(self, stack: Stack, width: int, update_exponent: float | None, fingerprint: int) -> None:
        self.width, self._fingerprint = width, fingerprint
        self._learn_layout(last_word=True)
        if self.taps.failure:
            return
        self._describe(num_layers=len(stack.points), width=width, update_exponent=update_exponent)
        blocks = f"{len(stack.points)} blocks of {stack.name or 'the model'}"
        logger.info("koopmon: taps %s, found by %s", blocks, source(self.adapter))

    def adapter_replaced(self, selection: Selection) -> None:
        self.adapter = selection.adapter
        model = self._model()
        self._kss_refusal = "" if model is None else self._refuse_kss(model, selection)
        if self.actuator is not None:
            self.actuator.shielded = self._kss_refusal
        self._describe(**self._family())

    def on_snapshot_ready(self, snapshot: RankSnapshot) -> None:
        if self.io_thread is not None:
            self.io_thread.post(snapshot)
            self._budget.spend(0.0, snapshot.states.nbytes)

    # Hooks of the optimizer.

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        started = time.perf_counter()
        actuator, step = self.actuator, self.stats.step
        self.stats.measured["learning_rate"].put(largest_rate(optimizer))
        self.taps.forward_over()
        if actuator is not None:
            actuator.before_step(step)
            if actuator.state.kss_alpha(step + 1) > 0.0:
                self._injection.find_scaler(optimizer)
        self.stats.hook_seconds += time.perf_counter() - started

    def _scale_rates(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        scale = 1.0 if self.actuator is None else self.actuator.state.lr_scale(self._num_steps)
        self._rates.scale_rates(optimizer, scale)
        return self._rates.watch_closure(args, kwargs)

    def _restore_rates(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._rates.restore_rates()
        self._num_steps += 1

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        started = time.perf_counter()
        stats, actuator = self.stats, self.actuator
        elapsed = 0.0 if self._last_edge is None else started - self._last_edge
        self._last_edge = started
        stats.tick(elapsed)
        self._budget.earn(elapsed)
        # Only snapshots are charged, because fewer of them make nothing else cheaper.
        self._budget.spend(stats.capture_seconds - self._charged_seconds)
        self._charged_seconds = stats.capture_seconds
        if actuator is not None:
            step = stats.step
            due = actuator.after_step(step) and self.io_thread is not None and self.taps.stack is not None
            if due and self.io_thread is not None and not self.io_thread.connected:
                stats.drop("monitor_away")
                due = False
            self._num_microbatches = self.taps.num_forwards or self._num_microbatches
            self.taps.step_edge(actuator.applied().at_step(step) if due else None)
            stack = self.taps.stack
            self._injection.latch(
                step,
                actuator.state.kss_alpha(step),
                actuator.state.kss,
                0 if stack is None else len(stack.points),
                self._num_microbatches,
            )
        stats.hook_seconds += time.perf_counter() - started

    # Closing.

    def _withdraw(self, reason: str) -> None:
        """Stop watching this training: remove the taps, refuse commands, log one line."""
        self.taps.remove(reason)
        self.stand_down(reason)
        if self.world is not None:
            log_for_job(logger, f"not attached, training goes on: {reason}", rank=self.world.rank)

    def stand_down(self, reason: str) -> None:
        """End snapshots, commands and KSS after a failure. The learning-rate scale stays, equal on all ranks."""
        self._injection.active = False
        for closable in self._closables:
            closable.close(wait=False)

    def close(self, reason: str) -> None:
        """Remove every hook, restore the user's rates and send a goodbye. Waits less than a second. Idempotent."""
        self.closed = True
        for handle in self._handles:
            handle.remove()
        self._injection.active = False
        self.taps.remove()
        self._rates.restore_rates()
        if self.io_thread is not None:
            self.io_thread.goodbye_reason = reason
        if os.getpid() == self._pid:  # in a forked child the threads belong to the parent
            for closable in self._closables:
                closable.close(wait=isinstance(closable, IOThread))


def _shut_down(pid: int, closables: list[IOThread | RankGroup]) -> None:
    """End the threads with the model or the interpreter. They must not outlive it. No effect in a forked child."""
    if os.getpid() == pid:
        for closable in closables:
            closable.close(wait=True)


def _weakly(method: Any) -> Any:
    """Return a call of `method` that does not keep its object alive."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> None:
        alive = reference()
        if alive is not None:
            alive(*args)

    return call
