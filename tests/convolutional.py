"""Models of convolutions: blocks over lines, planes and volumes, and stacks of several widths.

Each takes tokens (B, T) and returns logits (B, T, V), through a plane (B, D, 2, T / 2) or one of another dimension.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.agent.models import VOCABULARY, D, L

LINE, PLANE, VOLUME = (-1,), (2, -1), (2, 2, -1)


class Basic(nn.Module):
    """ResNet's block: relu(x + f(x)), in place."""

    def __init__(self, width: int, new: int | None = None, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        out = width if new is None else new
        self.first, self.norm1 = nn.Conv2d(width, out, 3, padding=1, bias=False), norm(out)
        self.second, self.norm2 = nn.Conv2d(out, out, 3, padding=1, bias=False), norm(out)
        self.down = nn.Conv2d(width, out, 1) if out != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.second(self.norm1(self.first(x)).relu_()))
        y += self.down(x)
        return y.relu_()


class PreActivation(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(2, width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(torch.relu(self.norm(x)))


class ConvNeXt(nn.Module):
    """A convolution over channels in dimension 1, then a normalisation and linear layers over channels at the end."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).movedim(1, -1))
        return x + (self.scale * self.down(torch.tanh(self.up(y)))).movedim(-1, 1)


class Inverted(nn.Module):
    """MobileNet's block: the state is the narrow end."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, 2 * width, 1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU6(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width),
            nn.Conv2d(2 * width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Dilated(nn.Module):
    """A temporal block over a line, with a second argument."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv1d(width, width, 3, padding=2, dilation=2), nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, None]:
        return x + scale * self.out(torch.tanh(self.conv(x))), None


class Volume(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv3d(width, width, 3, padding=1), nn.InstanceNorm3d(width, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.norm(self.conv(x)))


class LastChannels(nn.Module):
    """A convolution inside a block that keeps its channels at the end, as in a hierarchy of windows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.conv, self.out = nn.LayerNorm(width), nn.Conv2d(width, width, 1), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.norm(x).movedim(-1, 1)).movedim(1, -1)
        return x + self.out(torch.tanh(y))


class Tokens(nn.Module):
    """A convolution over a plane inside a block of tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.conv, self.out = nn.LayerNorm(width), nn.Conv2d(width, width, 1), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        plane = self.norm(x).mT.unflatten(-1, PLANE)
        return x + self.out(torch.tanh(self.conv(plane).flatten(2).mT))


class Plain(nn.Module):
    """A layer of VGG: nothing is added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


class Convolutional(nn.Module):
    """Blocks of `kind`, of `widths`. `states` holds the input of the first block of each call and all outputs."""

    def __init__(
        self,
        kind: Callable[..., nn.Module],
        plane: tuple[int, ...] = PLANE,
        *,
        widths: tuple[int, ...] = (D,) * (L + 1),
        last: bool = False,
    ) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, widths[0]), nn.Linear(widths[-1], VOCABULARY)
        pairs = itertools.pairwise(widths)
        self.blocks = nn.Sequential(*(kind(one) if one == other else kind(one, other) for one, other in pairs))
        self.plane, self.last = plane, last
        self.states: list[Tensor] = []

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens).mT
        if self.plane:
            h = h.unflatten(-1, self.plane)
        if self.last:
            h = h.movedim(1, -1)
        states = [h.detach().clone()]
        for block in self.blocks:
            h = block(h)
            h = h[0] if isinstance(h, tuple) else h
            states.append(h.detach().clone())
        if not torch.compiler.is_compiling():
            self.states = states
        h = h.movedim(-1, 1) if self.last else h
        return self.head(h.flatten(2).mT if h.dim() > 2 else h)


def tokens_of(state: Tensor, *, last: bool) -> Tensor:
    """Return the rows of a state of the model, (tokens, D)."""
    return (state if last else state.movedim(1, -1)).flatten(0, -2)


WATCHED: dict[str, Callable[[], Convolutional]] = {
    "ResNet": lambda: Convolutional(Basic),
    "PreActivation": lambda: Convolutional(PreActivation),
    "ConvNeXt": lambda: Convolutional(ConvNeXt),
    "ConvNeXt, a plane as wide as its channels": lambda: Convolutional(ConvNeXt, (1, 8), widths=(8,) * (L + 1)),
    "MobileNet": lambda: Convolutional(Inverted),
    "a line": lambda: Convolutional(Dilated, LINE),
    "a volume": lambda: Convolutional(Volume, VOLUME),
    "channels at the end": lambda: Convolutional(LastChannels, last=True),
    "channels at the end, as many as places": lambda: Convolutional(
        LastChannels, (8, 1), widths=(8,) * (L + 1), last=True
    ),
    "tokens": lambda: Convolutional(Tokens, (), widths=(8,) * (L + 1), last=False),
}
"""Models of L blocks of one width."""
