"""Scalars of the steps with a snapshot, without a call in the user's loop.

They are the loss, the gradient norm, the update RMS and the output's log-partition.

They are measured in these steps only. Nothing waits for a device: the I/O thread reads them with the snapshot.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from koopmon.agent.capture.backward_loss import BackwardLoss
from koopmon.agent.capture.gradient_norm import GradientNorm
from koopmon.agent.capture.log_partition import log_partition, vocabularies
from koopmon.agent.capture.slow_signals import SlowSignals
from koopmon.agent.capture.update_rms import UpdateRms
from koopmon.agent.circuit_breaker import CircuitBreaker, logger
from koopmon.agent.control.kss.grad_scaler import ScalerFinder, calling_scaler
from koopmon.agent.control.optimizer_set import OptimizerSet
from koopmon.agent.control.step_clock import has_closure
from koopmon.agent.parallelism import ParallelLayout
from koopmon.agent.stats import AgentStats
from koopmon.logs import log_for_job


class StepScalars:
    """Measures one step at a time: `begin`, `before_call` and `after_call` around each optimizer's step(), `end`."""

    def __init__(self, optimizers: OptimizerSet, stats: AgentStats) -> None:
        self._optimizers = optimizers
        self._stats = stats
        self._breaker = breaker = CircuitBreaker("the measurement of the loss", self._on_trip)
        self._loss = BackwardLoss(breaker, stats)
        self._norm = GradientNorm()
        self._signals = CircuitBreaker("the measurement of the update RMS and the log-partition")
        self._update = UpdateRms()
        self._vocabularies: frozenset[int] | None = None
        self._log_partition: Tensor | None = None
        self._slow = SlowSignals()
        self._measures_output = False
        self._scaler = ScalerFinder()
        self._threads: set[int] = set()
        """Threads of the training forwards since the last step that was measured."""
        self._told_threads = False
        self.active = False
        """True while a step is measured."""
        self._has_whole_gradients = False

    def begin(self, model: nn.Module, layout: ParallelLayout) -> None:
        """Measure the step that begins."""
        self._breaker.run(self._begin, model, layout)

    def before_call(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Note the gradients that `optimizer` is about to use. A closure computes them later."""
        if self.active:
            self._guarded(self._before_call, optimizer, has_closure(args, kwargs))

    def note_output(self, output: Any) -> None:
        """Note the output of the model in a training forward. The first one of the step counts."""
        self._threads.add(threading.get_ident())
        if self.active and self._measures_output and self._log_partition is None:
            self._guarded(self._note_output, output, breaker=self._signals)

    def after_call(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Note the gradients that `optimizer` has used, if a closure has computed them."""
        if self.active and has_closure(args, kwargs):
            self._guarded(self._add_gradients, optimizer)

    def end(self) -> None:
        """Store the values of the step. A value that was not seen becomes unknown."""
        if self.active:
            self._guarded(self._end)

    def close(self) -> None:
        """Remove every hook. Idempotent."""
        self.active = False
        self._loss.close()

    def _on_trip(self, reason: str) -> None:
        self.close()
        for name in ("loss", "grad_norm", "update_rms", "log_partition"):
            self._stats.measure(name, None)

    def _guarded(self, body: Callable[..., None], *args: Any, breaker: CircuitBreaker | None = None) -> None:
        started = time.perf_counter()
        (breaker or self._breaker).run(body, *args)
        # Like the snapshot itself, it costs nothing in the other steps.
        self._stats.capture_seconds += time.perf_counter() - started

    def _begin(self, model: nn.Module, layout: ParallelLayout) -> None:
        self.active = True
        self._norm.clear()
        self._update.end()
        self._log_partition, self._measures_output = None, self._slow.is_due(self._stats.step)
        if self._vocabularies is None:
            self._vocabularies = vocabularies(model)
        self._has_whole_gradients = layout.has_whole_gradients
        if "loss" not in self._stats.logged:
            parameters = [each for optimizer in self._optimizers for each in self._optimizers.updated_by(optimizer)]
            in_threads = not self._threads <= {threading.get_ident()}
            self._threads.clear()
            if in_threads and not self._told_threads:
                self._told_threads = True
                text = "forwards run in several threads: the loss may stay unmeasured; Agent.log(loss=...) sends it"
                log_for_job(logger, text, level=logging.INFO)
            self._loss.begin(parameters, model if layout.hides_parameters else None, in_threads=in_threads)

    def _before_call(self, optimizer: Optimizer, closure: bool) -> None:
        self._norm.last = {}
        scaler = calling_scaler()
        if scaler is None and self._loss.maybe_scaled:
            scaler = self._scaler.find(optimizer)
        self._loss.unscale(None if scaler is None else scaler._scale)
        if not closure:
            self._add_gradients(optimizer)
            self._signals.run(self._update.add, optimizer, self._norm.last)

    def _add_gradients(self, optimizer: Optimizer) -> None:
        if self._has_whole_gradients and "grad_norm" not in self._stats.logged:
            # A GradScaler leaves the gradients to an optimizer that unscales them itself, such as a fused one.
            scale = getattr(optimizer, "grad_scale", None)
            self._norm.add(self._optimizers.updated_by(optimizer), scale)

    def _note_output(self, output: Any) -> None:
        self._log_partition = log_partition(output, self._vocabularies or ())

    def _end(self) -> None:
        self.active = False
        self._stats.measure("loss", self._loss.end())
        self._stats.measure("grad_norm", self._norm.end())
        self._stats.measure("update_rms", self._signals.run(self._update.end))
        if self._measures_output:  # else the last value stays
            self._stats.measure("log_partition", self._log_partition)
            if self._log_partition is not None:
                self._slow.note(self._stats.step)
        self._log_partition = None
