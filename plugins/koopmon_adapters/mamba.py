"""Selective state spaces: blocks that carry a state along the tokens by a diagonal recurrence.

They are recognised by structure: the logarithm `A_log` of the recurrence's rates, a computed step size dt, and a short
convolution along the tokens before both. The tapped chain is the residual stream over depth, as in every family.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from koopmon import ArchitectureAdapter, ExampleModel, Observable, Stack, hookimpl, lists_holding, parts_of

MAX_TOKENS = 1024
"""Tokens of a batch at which the recurrence is read: as many whole sequences as fit, or the start of the first."""
TAU = 0.1
"""Half the width of the near-unit band."""


class MambaAdapter(ArchitectureAdapter):
    """Blocks with selective state spaces (Mamba-1 and Mamba-2), also among blocks of other kinds.

    Flags: "hybrid" if some blocks of the stack hold no state space, as in stacks that alternate with attention.
    Normalised state spaces train best at three times the rate of transformers, and their update ratios change faster
    there (`benchmarks.proving_ground`). The thresholds for normalised layers are higher for that. KSS settings are the
    general ones.

    The observables are of the state path's own spectrum, the discretised diagonal recurrence exp(dt * A). The step
    sizes dt are recomputed from the mixer's input, because fused kernels do not expose them.
    """

    name = "mamba"
    measures: ClassVar[Mapping[str, str]] = {
        "state_radius": "Largest eigenvalue of the discretised recurrence exp(dt A) over tokens and channels.",
        "state_near_unit_mass": "Share of those eigenvalues with modulus in [0.9, 1.1].",
    }

    def specificity(self, model: nn.Module) -> int:
        return 20 if self.stacks(model) else 0

    def stacks(self, model: nn.Module) -> list[Stack]:
        return [blocks.stack(residual=True) for blocks in lists_holding(model, _is_state_space)]

    def flags(self, model: nn.Module) -> frozenset[str]:
        points = [point for stack in self.stacks(model) for point in stack.points]
        hybrid = any(not parts_of(point.module, _is_state_space) for point in points)
        return frozenset({"hybrid"} if hybrid else ())

    def observables(self, stack: Stack) -> Sequence[Observable]:
        found = []
        for point in stack.points:
            for mixer in parts_of(point.module, _is_state_space):
                found.append(Observable("state_radius", point.layer, mixer, self._radius))
                found.append(Observable("state_near_unit_mass", point.layer, mixer, self._near_unit_mass))
        return found

    def thresholds(self) -> Mapping[str, float]:
        return {"normalized_critical_rate": 1.5, "normalized_scale": 0.84}

    def _radius(self, mixer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Tensor | None:
        hidden = self._hidden(mixer, args, kwargs)
        if hidden is None:
            return None
        slowest = _step_sizes(mixer, hidden).amin(0) * _rates(mixer).amin(-1)
        return (-slowest).exp().max()

    def _near_unit_mass(
        self, mixer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> Tensor | None:
        hidden = self._hidden(mixer, args, kwargs)
        if hidden is None:
            return None
        steps, rates = _step_sizes(mixer, hidden), _rates(mixer)
        # |lambda| = exp(-dt * rate) never exceeds 1. One state at a time, because all at once need many times the
        # memory of dt.
        slow = [(steps * rate <= -math.log(1 - TAU)).float().mean() for rate in rates.unbind(-1)]
        return torch.stack(slow).mean()

    def _hidden(self, mixer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """Return the mixer's input, (B, T, D); None if it has another form, or is sharded over ranks."""
        hidden = self.block_input(mixer, args, kwargs)
        return hidden if hidden is not None and hidden.dim() == 3 and not hasattr(hidden, "to_local") else None


@hookimpl
def koopmon_architecture_adapters() -> list[ArchitectureAdapter]:
    return [MambaAdapter()]


@hookimpl
def koopmon_example_models() -> list[ExampleModel]:
    offers = {"transformers": ("mamba2", _mamba2), "mambapy": ("mambapy", _mambapy)}
    return [
        ExampleModel(name, MambaAdapter.name, build)
        for package, (name, build) in offers.items()
        if find_spec(package) is not None
    ]


def _mamba2(seed: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A Mamba-2 language model, with padding."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=50,
        hidden_size=16,
        state_size=4,
        num_hidden_layers=2,
        num_heads=4,
        head_dim=8,
        n_groups=1,
        chunk_size=4,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    tokens = torch.randint(50, (4, 12))
    mask = torch.arange(12) < torch.tensor([[12], [12], [12], [8]])
    model = Mamba2ForCausalLM(config)
    return model, {"input_ids": tokens, "attention_mask": mask.long(), "labels": tokens.masked_fill(~mask, -100)}


def _mambapy(seed: int) -> tuple[nn.Module, Tensor]:
    """A Mamba-1 model on states."""
    from mambapy.mamba import Mamba, MambaConfig

    return Mamba(MambaConfig(d_model=16, n_layers=3, d_state=4)), torch.randn(4, 12, 16)


def _is_state_space(module: nn.Module) -> bool:
    return (
        "A_log" in module._parameters
        and any(isinstance(child, nn.Conv1d) for child in module.children())
        and any(name.startswith("dt") for name in (*module._modules.keys(), *module._parameters.keys()))
    )


def _rates(mixer: nn.Module) -> Tensor:
    """Return -A, shape (channels, states); (heads, 1) for Mamba-2."""
    rates = mixer.get_parameter("A_log").float().exp()
    return rates if rates.dim() == 2 else rates[:, None]


def _step_sizes(mixer: nn.Module, hidden: Tensor) -> Tensor:
    """Return dt, float32 of shape (tokens, channels), for at most MAX_TOKENS tokens of the mixer's input (B, T, D).

    Mamba-1: the first half of the input projection, convolved along the tokens, gives dt's low-rank form. Mamba-2: the
    last columns of the input projection are dt.
    """
    length = min(hidden.shape[1], MAX_TOKENS)
    hidden = hidden[: max(1, MAX_TOKENS // length), :length]
    bias: Tensor | None = getattr(mixer.in_proj, "bias", None)
    weight: Tensor = mixer.get_parameter("in_proj.weight")
    rates = mixer.get_parameter("A_log")
    num_channels = rates.shape[0]
    hidden = hidden.to(weight.dtype)
    if "dt_bias" in mixer._parameters:
        raw = functional.linear(hidden, weight[-num_channels:], None if bias is None else bias[-num_channels:])
        steps = functional.softplus(raw.float() + mixer.get_parameter("dt_bias").float())
        least, most = getattr(mixer, "time_step_limit", None) or getattr(mixer, "dt_limit", None) or (0.0, math.inf)
        return steps.clamp(least, most).flatten(0, -2)
    convolution = next(child for child in mixer.children() if isinstance(child, nn.Conv1d))
    inner = functional.linear(hidden, weight[:num_channels], None if bias is None else bias[:num_channels])
    inner = functional.conv1d(
        inner.transpose(1, 2),
        convolution.weight,
        convolution.bias,
        padding=convolution.kernel_size[0] - 1,
        groups=num_channels,
    )[..., :length]
    to_channels = mixer.get_parameter("dt_proj.weight")
    low_rank = functional.linear(functional.silu(inner).transpose(1, 2), mixer.get_parameter("x_proj.weight"))
    low_rank = low_rank[..., : to_channels.shape[1]]
    normalise = getattr(mixer, "dt_layernorm", None)
    if normalise is not None:
        low_rank = normalise.forward(low_rank)
    raw = functional.linear(low_rank, to_channels).float()
    offset = getattr(mixer.dt_proj, "bias", None)
    return functional.softplus(raw if offset is None else raw + offset.float()).flatten(0, -2)
