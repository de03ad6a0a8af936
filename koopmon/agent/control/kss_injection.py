"""Koopman Spectral Shaping (eqs. 14-15) inside the user's own backward pass, by way of the residual stream alone.

Behind a tapped block the stream passes through an autograd function that changes no value and, on the way back, adds
the gradient of alpha x mean over sampled layers of L_KSS to the sampled rows of the block's output and of its input.
The gradient is known in closed form at forward time, so that nothing is differentiated twice, and enters once per
forward: with a weight of alpha / microbatches x the GradScaler's scale it equals `(loss + alpha * kss).backward()`.

Shapes: a state is (..., T, D); N sampled rows, x and y (N, D).
"""

from __future__ import annotations

import gc
import random
import sys
import time
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from koopmon.agent.circuit_breaker import CircuitBreaker
from koopmon.agent.stats import AgentStats
from koopmon.spectral import kss_basis, kss_gradient
from koopmon.token_sampling import align_mask, order_rows, take_rows
from koopmon.wire.messages import KssSettings

_MAX_FRAMES = 32


@torch.library.custom_op("koopmon::kss_gradient", mutates_args=())
def kss_gradient_op(
    x: Tensor,
    y: Tensor,
    svd_rank: int,
    seed: int,
    temperature: float,
    tau_u: float,
    tau_l: float,
    gamma: float,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (N, D) of L_KSS in the rows x and y (N, D), at the basis of x, and a 0-d boolean: they can be trusted.

    Opaque to compilers. The basis is a constant of the loss. Untrusted gradients are zero.
    """
    basis = kss_basis(x, svd_rank, seed)
    gradient = kss_gradient(x, y, basis, temperature=temperature, tau_u=tau_u, tau_l=tau_l, gamma=gamma, beta=beta)
    return gradient.grad_x, gradient.grad_y, gradient.ok


@kss_gradient_op.register_fake
def _(
    x: Tensor,
    y: Tensor,
    svd_rank: int,
    seed: int,
    temperature: float,
    tau_u: float,
    tau_l: float,
    gamma: float,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(y), x.new_empty((), dtype=torch.bool)


class _Rows(torch.autograd.Function):
    """Copies rows of a state; a gradient in the copy flows back to those rows.

    Nothing is saved for the backward pass: under activation checkpointing, what is saved has to be made again in the
    same order. A copy, because blocks may write into their input.
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
    """A block's output, unchanged; on the way back the KSS gradient joins, once, at its rows and at the input's.

    The output is a copy: what comes after the block may write into it.
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
        # Twice through one graph, or a backward that is itself to be differentiated, is the user's own business.
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
    """The injection of one agent, told at each step edge what is in force until the next.

    Which layers and which tokens take part is a pure function of (seed, step, data-parallel rank), so that a forward
    that activation checkpointing repeats builds the same graph.
    """

    def __init__(self, seed: int, stats: AgentStats, breaker: CircuitBreaker) -> None:
        self.active = False
        """This step's training forwards are injected into."""
        self.data_rank = 0
        self._seed = seed
        self._stats = stats
        self._breaker = breaker
        self._settings = KssSettings()
        self._step = 0
        self._layers: frozenset[int] = frozenset()
        self._weight = 0.0
        self._scaler: Callable[[], torch.amp.GradScaler | None] = _no_scaler
        self._scanned = False
        self._entered: dict[int, Tensor] = {}
        self._leading = torch.Size()
        self._mask: Tensor | None = None
        self._rows: Tensor | None = None
        self._skipped: Tensor | None = None

    def latch(self, step: int, alpha: float, settings: KssSettings, num_layers: int, num_forwards: int) -> None:
        """After `step` optimizer steps: what holds for the next one, given the microbatches of the last."""
        if self.active and self._skipped is not None:
            self._stats.kss_skipped.put(self._skipped)
        self._entered.clear()
        self._rows = self._mask = None
        self.active = alpha > 0.0 and num_layers > 0 and step % settings.every == 0
        if self.active:
            self._settings, self._step = settings, step
            num_sampled = max(1, round(settings.layer_fraction * num_layers))
            # Equal on all ranks, and no secret.
            chosen = random.Random(self._seed * 1_000_003 + step).sample(range(num_layers), num_sampled)  # noqa: S311
            self._layers = frozenset(chosen)
            self._weight = alpha / (num_sampled * max(num_forwards, 1))

    def find_scaler(self, optimizer: Optimizer) -> None:
        """Learn which GradScaler, if any, scales the loss of `optimizer`: called from inside its step()."""
        scaler = _calling_scaler()
        if scaler is None and not self._scanned:
            self._scanned = True
            scaler = next((each for each in gc.get_objects() if _has_unscaled(each, optimizer)), None)
        if scaler is not None:
            self._scaler = weakref.ref(scaler)

    def enter(self, layer: int, state: Tensor, mask: Tensor | None) -> None:
        """Block `layer` is about to run on `state`: keep the sampled rows of its input."""
        if layer not in self._layers or not torch.is_grad_enabled():
            return
        started = time.perf_counter()
        rows = self._choose(state, mask)
        if rows is not None:
            self._entered[layer] = _Rows.apply(state, rows, self._breaker)  # type: ignore[no-untyped-call]
        self._stats.kss_seconds += time.perf_counter() - started

    def leave(self, layer: int, state: Tensor) -> Tensor | None:
        """Block `layer` returned `state`: the state to go on with, or None to leave it alone."""
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
        self._stats.kss_seconds += time.perf_counter() - started
        return changed

    def _gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        settings = self._settings
        grad_x, grad_y, trusted = kss_gradient_op(
            x,
            y,
            settings.svd_rank,
            self._seed,
            settings.temperature,
            settings.tau_u,
            settings.tau_l,
            settings.gamma,
            settings.beta,
        )
        if self._skipped is None or self._skipped.device != trusted.device:
            self._skipped = torch.zeros((), dtype=torch.float32, device=trusted.device)
        self._skipped += ~trusted
        scaler = self._scaler()
        scale = None if scaler is None else scaler._scale
        if scale is None:
            return grad_x * self._weight, grad_y * self._weight
        weight = scale.to(grad_x.device, grad_x.dtype) * self._weight
        return grad_x * weight, grad_y * weight

    def _choose(self, state: Tensor, mask: Tensor | None) -> Tensor | None:
        """The rows of this forward, the same at every layer; chosen anew when the shape or the mask is another."""
        leading = state.shape[:-1]
        if self._rows is None or leading != self._leading or mask is not self._mask:
            self._leading, self._mask = leading, mask
            aligned = align_mask(mask, leading)
            rows, num_valid = order_rows(
                leading.numel(),
                self._settings.num_samples,
                seed=self._seed,
                step=self._step,
                data_rank=self.data_rank,
                mask=aligned,
                device=state.device,
            )
            if aligned is not None:  # fill up with tokens that count, of which some then count twice: no shape may vary
                rows = rows[torch.arange(len(rows), device=rows.device) % num_valid.clamp(min=1)]
            self._rows = rows
        return self._rows


def _wide(rows: Tensor) -> Tensor:
    return rows if rows.dtype in (torch.float32, torch.float64) else rows.float()


def _no_scaler() -> None:
    return None


def _calling_scaler() -> torch.amp.GradScaler | None:
    """The enabled GradScaler out of whose step() this is being called."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(_MAX_FRAMES):
        if frame is None:
            return None
        if frame.f_code.co_name in ("step", "_maybe_opt_step"):
            caller = frame.f_locals.get("self")
            if isinstance(caller, torch.amp.GradScaler) and caller.is_enabled():
                return caller
        frame = frame.f_back
    return None


def _has_unscaled(candidate: object, optimizer: Optimizer) -> bool:
    """Whether `candidate` is a GradScaler that has taken its scale off the gradients of `optimizer` in this step."""
    if not issubclass(type(candidate), torch.amp.GradScaler):  # isinstance would ask proxies, which may answer back
        return False
    scaler: Any = candidate
    return scaler.is_enabled() and id(optimizer) in scaler._per_optimizer_states
