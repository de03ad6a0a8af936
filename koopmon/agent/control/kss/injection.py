"""Koopman Spectral Shaping (eqs. 14-15) inside the user's own backward pass, through the residual stream alone.

Behind a tapped block the stream passes through an autograd function that changes no value. On the way back it adds a
gradient to the sampled rows of the block's output and input: that of alpha x mean over sampled layers of L_KSS. The
gradient has a closed form at forward time, so that no operation is differentiated twice. It enters once per forward:
with a weight of alpha / microbatches x the GradScaler's scale it equals `(loss + alpha * kss).backward()`.

Shapes: a state is (..., T, D); N sampled rows, x and y (N, D).
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from koopmon.agent.circuit_breaker import CircuitBreaker
from koopmon.agent.control.action import NextForwards
from koopmon.agent.control.kss.grad_scaler import ScalerFinder
from koopmon.agent.stats import AgentStats, AsyncScalar
from koopmon.spectral import kss_basis, kss_gradient
from koopmon.token_sampling import align_mask, order_rows, take_rows
from koopmon.wire.messages import KssSettings

_LOSS_FIELDS = ("temperature", "tau_u", "tau_l", "gamma", "beta")


@torch.library.custom_op("koopmon::kss_gradient", mutates_args=())
def kss_gradient_op(
    x: Tensor, y: Tensor, svd_rank: int, seed: int, loss_settings: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients (N, D) of L_KSS in the rows x and y (N, D), at the basis of x, and a 0-d boolean.

    The boolean is True if the gradients can be trusted; otherwise they are zero. The basis is a constant of the loss.
    `loss_settings` are in the order of _LOSS_FIELDS. Compilers treat the operation as opaque.
    """
    settings = dict(zip(_LOSS_FIELDS, loss_settings, strict=True))
    gradient = kss_gradient(x, y, kss_basis(x, svd_rank, seed), **settings)
    return gradient.grad_x, gradient.grad_y, gradient.ok


@kss_gradient_op.register_fake
def _(x: Tensor, y: Tensor, svd_rank: int, seed: int, loss_settings: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(y), x.new_empty((), dtype=torch.bool)


class _Rows(torch.autograd.Function):
    """Copies rows of a state. A gradient in the copy flows back to those rows.

    It saves no tensor for the backward pass, because activation checkpointing would have to recompute it in the same
    order. It returns a copy, because blocks may write into their input.
    """

    @staticmethod
    def forward(ctx: Any, state: Tensor, rows: Tensor, breaker: CircuitBreaker) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.rows, ctx.breaker = state.shape, rows, breaker
        return take_rows(state, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None]:
        if grad is None:
            return None, None, None
        try:
            full = grad.new_zeros(ctx.shape)
            full.view(-1, ctx.shape[-1]).index_add_(0, ctx.rows, grad)
        except Exception as error:
            ctx.breaker.trip("KSS backward", error)
            return None, None, None
        return full, None, None


class _Inject(torch.autograd.Function):
    """Returns a block's output unchanged.

    On the way back the KSS gradient is added, once, at its rows and at the input's.

    The output is a copy, because the code after the block may write into it.
    """

    @staticmethod
    def forward(
        ctx: Any, state: Tensor, x: Tensor | None, rows: Tensor, grad_x: Tensor, grad_y: Tensor, breaker: CircuitBreaker
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.rows, ctx.grad_x, ctx.grad_y, ctx.breaker = rows, grad_x, grad_y, breaker
        ctx.x_dtype = None if x is None else x.dtype
        return state.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, grad_x, grad_y = ctx.rows, ctx.grad_x, ctx.grad_y
        # The user controls a second backward through one graph, and a backward that is differentiated: no gradient is
        # added.
        if grad is None or rows is None or ctx.breaker.tripped or torch.is_grad_enabled():
            return grad, None, None, None, None, None
        ctx.rows = ctx.grad_x = ctx.grad_y = None
        try:
            flat = grad.reshape(-1, grad.shape[-1]).index_add(0, rows, grad_y.to(grad.dtype))
            through = None if ctx.x_dtype is None else grad_x.to(ctx.x_dtype)
        except Exception as error:
            ctx.breaker.trip("KSS backward", error)
            return grad, None, None, None, None, None
        return flat.view(grad.shape), through, None, None, None, None


class KssInjection:
    """The KSS injection of one agent. `latch` sets at each step edge the settings for the next step.

    The layers and the tokens are a pure function of (seed, step, data-parallel rank). A forward that activation
    checkpointing repeats then builds the same graph.
    """

    # `latch` and the first forward after it set these before they are read.
    _settings: KssSettings
    _step: int
    _data_rank: int
    _weight: float
    _leading: torch.Size

    def __init__(self, seed: int, stats: AgentStats, breaker: CircuitBreaker) -> None:
        self.active = False
        """True while this step's training forwards are injected into."""
        self.skipped = AsyncScalar()
        """Layers with an untrusted gradient, since the start."""
        self._seed = seed
        self._stats = stats
        self._breaker = breaker
        self._layers: frozenset[int] = frozenset()
        self._scaler = ScalerFinder()
        self._entered: dict[int, Tensor] = {}
        self._mask: Tensor | None = None
        self._rows: Tensor | None = None
        self._num_skipped: Tensor | None = None

    def latch(self, step: int, settings: KssSettings, forwards: NextForwards) -> None:
        """Set the next step's weight and layers. `step` optimizer steps are done; `settings` hold its alpha."""
        self.end()
        num_layers = forwards.num_layers
        self.active = settings.alpha > 0.0 and num_layers > 0 and step % settings.every == 0
        if self.active:
            self._settings, self._step, self._data_rank = settings, step, forwards.data_rank
            num_sampled = max(1, round(settings.layer_fraction * num_layers))
            # Equal on all ranks. It needs no cryptographic randomness.
            chosen = random.Random(self._seed * 1_000_003 + step).sample(range(num_layers), num_sampled)  # noqa: S311
            self._layers = frozenset(chosen)
            self._weight = settings.alpha / (num_sampled * max(forwards.num_microbatches, 1))

    def end(self) -> None:
        """Inject nothing more, and publish the number of layers that were skipped. Idempotent."""
        if self.active and self._num_skipped is not None:
            self.skipped.put(self._num_skipped)
        self.active = False
        self._entered.clear()
        self._rows = self._mask = None

    def find_scaler(self, optimizer: Optimizer) -> None:
        """Find the GradScaler, if any, that scales the loss of `optimizer`.

        Call it from inside the optimizer's step().
        """
        self._scaler.find(optimizer)

    def enter(self, layer: int, state: Tensor, mask: Tensor | None) -> None:
        """Keep the sampled rows of `state`, the input of block `layer`."""
        if layer not in self._layers or not torch.is_grad_enabled():
            return
        started = time.perf_counter()
        rows = self._choose(state, mask)
        if rows is not None:
            self._entered[layer] = _Rows.apply(state, rows, self._breaker)  # type: ignore[no-untyped-call]
        self._stats.action_seconds += time.perf_counter() - started

    def leave(self, layer: int, state: Tensor) -> Tensor | None:
        """Return the state that replaces `state`, the output of block `layer`; None to keep it."""
        x = self._entered.pop(layer, None)
        if x is None or self._rows is None or not state.requires_grad or state.shape[:-1] != self._leading:
            return None
        started = time.perf_counter()
        with torch.no_grad():
            y = take_rows(state.detach(), self._rows)
            grad_x, grad_y = self._gradients(_wide(x.detach()), _wide(y))
        changed: Tensor = _Inject.apply(  # type: ignore[no-untyped-call]
            state, x if x.requires_grad else None, self._rows, grad_x, grad_y, self._breaker
        )
        self._stats.action_seconds += time.perf_counter() - started
        return changed

    def _gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        settings = self._settings
        loss_settings = [getattr(settings, name) for name in _LOSS_FIELDS]
        grad_x, grad_y, trusted = kss_gradient_op(x, y, settings.svd_rank, self._seed, loss_settings)
        if self._num_skipped is None or self._num_skipped.device != trusted.device:
            self._num_skipped = torch.zeros((), dtype=torch.float32, device=trusted.device)
        self._num_skipped += ~trusted
        scaler = self._scaler.known()
        scale = None if scaler is None else scaler._scale
        if scale is None:
            return grad_x * self._weight, grad_y * self._weight
        weight = scale.to(grad_x.device, grad_x.dtype) * self._weight
        return grad_x * weight, grad_y * weight

    def _choose(self, state: Tensor, mask: Tensor | None) -> Tensor | None:
        """Return the rows of this forward, the same at every layer. A new shape or mask causes a new choice."""
        leading = state.shape[:-1]
        if self._rows is None or leading != self._leading or mask is not self._mask:
            self._leading, self._mask = leading, mask
            aligned = align_mask(mask, leading)
            rows, num_valid = order_rows(
                leading.numel(),
                self._settings.num_samples,
                seed=self._seed,
                step=self._step,
                data_rank=self._data_rank,
                mask=aligned,
                device=state.device,
            )
            if aligned is not None:  # repeat tokens that count, because no shape may vary
                rows = rows[torch.arange(len(rows), device=rows.device) % num_valid.clamp(min=1)]
            self._rows = rows
        return self._rows


def _wide(rows: Tensor) -> Tensor:
    return rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
