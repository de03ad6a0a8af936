"""Koopman Spectral Shaping inside a small training, in several forms.

- published: eqs. 14-15 with both terms, through the backward pass and the optimizer.
- unstable, target: one of the two terms alone.
- decoupled: the gradient of the unstable penalty takes a separate step after the optimizer's, outside its moments, of
  `alpha` times the length of the optimizer's step.
- branch, projected: no gradient. If a layer's radius exceeds tau_u, the weights with which its sublayers write into the
  stream shrink, similar to clipping of attention logits by shrinking queries and keys. branch shrinks them by the share
  alpha x (radius / tau_u - 1), at most alpha. projected shrinks them to the point where a linear layer's radius would
  be tau_u, by at most alpha.

`delay` steps model a monitor. The gradient is explicit autograd; tests compare the product's injection with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.models import Decoder
from koopmon.spectral import kss_loss, profile_states

Form = Literal["", "published", "unstable", "target", "decoupled", "branch", "projected"]
WITHOUT_GRADIENT = ("branch", "projected")
NUM_SAMPLES = 128


class Shaping:
    """Penalty of one model. `alpha` is its present weight, 0 for off; `tau_u` is the modulus at which it starts."""

    def __init__(
        self, model: Decoder, form: Form, *, alpha: float, every: int, svd_rank: int, fraction: float, delay: int = 0
    ) -> None:
        self.form = form
        self.alpha = alpha
        self.tau_u = 1.05
        self.every = every
        self.svd_rank = svd_rank
        self._fraction = fraction
        self._delay = delay
        self._due: list[tuple[int, list[float]]] = []
        """Steps after which factors on the branches of each layer apply."""
        self._step = 0
        self._model = model
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._states: list[Tensor] = []
        self._gradients: list[Tensor | None] = []
        self._before: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(0)

    @contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Context of a forward pass that keeps the states with their graph at shaped steps."""
        self._states, self._step = [], step
        if not self.form or self.alpha <= 0 or step % self.every:
            yield
            return
        blocks = self._model.blocks
        handles: list[Any] = [blocks[0].register_forward_pre_hook(lambda _, args: self._states.append(args[0]))]
        handles += [block.register_forward_hook(lambda _, __, y: self._states.append(y)) for block in blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def penalty(self) -> Tensor | None:
        """Return the mean of L_KSS over the chosen layers; None at other steps, or without finite states."""
        if not self._states or not all(bool(state.isfinite().all()) for state in self._states):
            return None
        if self.form in WITHOUT_GRADIENT:
            return None
        num_layers = len(self._states) - 1
        chosen = torch.randperm(num_layers, generator=self._generator)[: max(1, round(self._fraction * num_layers))]
        rows = torch.randperm(self._states[0].shape[:2].numel(), generator=self._generator)[:NUM_SAMPLES]
        beta = 0.0 if self.form in ("unstable", "decoupled") else 1.0
        tau_u = 1e6 if self.form == "target" else self.tau_u
        flat = [state.flatten(0, 1)[rows] for state in self._states]
        losses = [
            kss_loss(flat[layer], flat[layer + 1], svd_rank=self.svd_rank, tau_u=tau_u, beta=beta)
            for layer in chosen.tolist()
        ]
        return torch.stack(losses).mean()

    def before_step(self, penalty: Tensor | None) -> None:
        """Decoupled: compute the gradient of the penalty, before the loss's backward pass frees the graph."""
        self._gradients = []
        if self.form == "decoupled" and penalty is not None and penalty.item() > 0:
            found = torch.autograd.grad(penalty, self._parameters, retain_graph=True, allow_unused=True)
            if all(g is None or bool(g.isfinite().all()) for g in found):
                self._gradients = list(found)
                self._before = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def after_step(self) -> None:
        """Decoupled, branch and projected: take the step outside the optimizer's moments."""
        if self.form in WITHOUT_GRADIENT:
            self._shrink()
        if not self._gradients:
            return
        length = _norm([p - old for p, old in zip(self._parameters, self._before, strict=True)])
        slope = _norm([g for g in self._gradients if g is not None])
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            if gradient is not None and slope > 0:
                parameter.sub_(gradient * (self.alpha * length / slope))

    def _shrink(self) -> None:
        states = [state.detach().flatten(0, 1)[: 2 * NUM_SAMPLES] for state in self._states]
        if states and all(bool(state.isfinite().all()) for state in states):
            profile = profile_states(states, svd_rank=self.svd_rank, kreiss="never")
            radii = [layer.spectral_radius if layer.informative else 0.0 for layer in profile.layers]
            self._due.append((self._step + self._delay, [self.factor(radius) for radius in radii]))
        while self._due and self._due[0][0] <= self._step:
            for block, factor in zip(self._model.blocks, self._due.pop(0)[1], strict=True):
                for name, parameter in block.named_parameters():
                    if ".project." in name:
                        parameter.mul_(factor)

    def factor(self, radius: float) -> float:
        """Return the factor on the branches of a layer with this spectral radius; 1 up to tau_u."""
        if radius <= self.tau_u:
            return 1.0
        if self.form == "projected":  # for a linear layer, radius - 1 is proportional to the branch
            return max(1.0 - self.alpha, (self.tau_u - 1.0) / (radius - 1.0))
        return 1.0 - self.alpha * min(1.0, radius / self.tau_u - 1.0)


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return nn.utils.get_total_norm(tensors)
