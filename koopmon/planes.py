"""States of convolutions, (B, C, *plane): koopmon reads them as (B, *plane, C), with one token for each place."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from torch import Tensor, nn

CONVOLUTIONS: dict[type[nn.Module], int] = {
    nn.Conv1d: 3,
    nn.ConvTranspose1d: 3,
    nn.Conv2d: 4,
    nn.ConvTranspose2d: 4,
    nn.Conv3d: 5,
    nn.ConvTranspose3d: 5,
}
"""Dimensions of a batch for each kind of convolution."""
_ON_CHANNELS = (
    *CONVOLUTIONS,
    nn.modules.batchnorm._NormBase,  # also instance normalisation
    nn.GroupNorm,
)


@dataclass(frozen=True, slots=True)
class _Facts:
    """Facts about one block. `channels` holds (dimensions of a batch, channels) of its convolutions."""

    channels: frozenset[tuple[int, int]]
    features: frozenset[int]
    """Sizes of a last dimension that its other layers take."""
    begins_on_channels: bool


_known: weakref.WeakKeyDictionary[nn.Module, _Facts] = weakref.WeakKeyDictionary()


def has_channels_first(block: nn.Module, state: Tensor) -> bool:
    """Return True if the convolutions of `block` show that dimension 1 of `state` is its width."""
    if state.is_nested or state.dim() < 3:
        return False
    return is_plane(block, state.dim(), state.shape[1], state.shape[-1])


def is_plane(block: nn.Module, num_dims: int, channels: int, last: int) -> bool:
    """Return the same for a state with `num_dims` dimensions: `channels` is the size of number 1, `last` of the last.

    Where both may be the width, the first layer of the block decides.
    """
    facts = _known.get(block)
    if facts is None:
        facts = _known[block] = _facts(block)
    return (num_dims, channels) in facts.channels and (facts.begins_on_channels or last not in facts.features)


def channels_last(block: nn.Module, state: Tensor) -> Tensor:
    """Return a view of `state`, at the border of `block`, of shape (..., T, D)."""
    return state.movedim(1, -1) if has_channels_first(block, state) else state


def as_given(block: nn.Module, given: Tensor, state: Tensor) -> Tensor:
    """Return `state` (..., T, D) in the layout of `given`, the state that `block` has returned."""
    return state.movedim(-1, 1) if has_channels_first(block, given) else state


def _facts(block: nn.Module) -> _Facts:
    channels: set[tuple[int, int]] = set()
    features: set[int] = set()
    begins: bool | None = None
    for module in block.modules():
        for kind, num_dims in CONVOLUTIONS.items():
            if isinstance(module, kind):
                channels |= {(num_dims, int(size)) for size in (module.in_channels, module.out_channels)}  # type: ignore[arg-type]
        if isinstance(module, nn.Linear):
            features.add(module.in_features)
        elif isinstance(module, nn.LayerNorm):
            features.add(module.normalized_shape[-1])
        is_layer = next(module.children(), None) is None and next(module.parameters(), None) is not None
        if begins is None and is_layer:
            # Normalisations of planes are often subclasses of LayerNorm, such as LayerNorm2d.
            begins = isinstance(module, _ON_CHANNELS) or type(module).__name__.lower().endswith("2d")
    return _Facts(frozenset(channels), frozenset(features), bool(begins))
