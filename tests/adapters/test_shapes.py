"""Models of many shapes: what their blocks hold, take and return, and where the blocks are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import koopmon
from koopmon.api import StackForm

B, T, D, L = 2, 16, 32, 4
Loop = Callable[["Shaped", Tensor], Tensor]


def norm(x: Tensor) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(functional.scaled_dot_product_attention(q, k, v))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(x)))


class PreNorm(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(D), inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.norm(x))


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Called(nn.Module):
    """Attention and a feed-forward layer, with functional norms; `form` says what is taken and returned."""

    def __init__(self, form: Callable[..., Any] = lambda f, x: f(x)) -> None:
        super().__init__()
        self.attention, self.ff, self.form = Attention(), FeedForward(), form

    def f(self, x: Tensor) -> Tensor:
        x = x + self.attention(norm(x))
        return x + self.ff(norm(x))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.form(self.f, *args, **kwargs)


class Parallel(Called):
    def f(self, x: Tensor) -> Tensor:
        return x + self.attention(norm(x)) + self.ff(norm(x))


class PostNorm(Called):
    def f(self, x: Tensor) -> Tensor:
        x = norm(x + self.attention(x))
        return norm(x + self.ff(x))


class JointBlock(nn.Module):
    """Two streams of different lengths with one attention over both, as in MMDiT."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.image, self.text = Attention(), FeedForward(), FeedForward()

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        joint = torch.cat([text, image], 1)
        text, image = (joint + self.attention(norm(joint))).split([text.shape[1], image.shape[1]], 1)
        return image + self.image(norm(image)), text + self.text(norm(text))


class Latent(nn.Module):
    """Latents attend to data, as in Perceiver; `data_first` gives the order of the arguments."""

    def __init__(self, data_first: bool) -> None:
        super().__init__()
        self.query, self.kv, self.ff, self.data_first = nn.Linear(D, D), nn.Linear(D, 2 * D), FeedForward(), data_first

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        data, latents = (one, two) if self.data_first else (two, one)
        k, v = self.kv(norm(data)).chunk(2, -1)
        latents = latents + functional.scaled_dot_product_attention(self.query(norm(latents)), k, v)
        return latents + self.ff(norm(latents))


class Shaped(nn.Module):
    def __init__(self, loop: Loop, blocks: Callable[[], Any], extra: Callable[[], nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.embedding, self.extra, self.loop = nn.Linear(D, D), extra(), loop
        self.blocks = blocks()
        if isinstance(self.blocks, list):
            for block, name in zip(self.blocks, "abcd", strict=True):
                self.add_module(f"layer_{name}", block)

    def forward(self, x: Tensor) -> Tensor:
        return self.loop(self, self.embedding(x))


def some(make: Callable[[], nn.Module]) -> Callable[[], nn.ModuleList]:
    return lambda: nn.ModuleList(make() for _ in range(L))


def in_turn(model: Shaped, x: Tensor) -> Tensor:
    for block in model.blocks:
        x = block(x)
    return x


def by_name(model: Shaped, x: Tensor) -> Tensor:
    for block in model.blocks.values():
        x = block(x)
    return x


def tokens_first(model: Shaped, x: Tensor) -> Tensor:
    return in_turn(model, x.transpose(0, 1)).transpose(0, 1)


def packed(model: Shaped, x: Tensor) -> Tensor:
    return in_turn(model, x.flatten(0, 1))


def windows(model: Shaped, x: Tensor) -> Tensor:
    return in_turn(model, x.reshape(B, 4, 4, D))


def with_cache(model: Shaped, x: Tensor) -> Tensor:
    for block in model.blocks:
        x, _, _ = block(x)
    return x


def loss_first(model: Shaped, x: Tensor) -> Tensor:
    for block in model.blocks:
        _, x = block(x)
    return x


def joint(model: Shaped, x: Tensor) -> Tensor:
    text = x[:, :7]
    for block in model.blocks:
        x, text = block(x, text)
    return x


def latents(data_first: bool) -> Loop:
    def loop(model: Shaped, x: Tensor) -> Tensor:
        state = model.extra.weight.expand(B, -1, -1)
        for block in model.blocks:
            state = block(x, state) if data_first else block(state, x)
        return state

    return loop


def pairs_of_parts(model: Shaped, x: Tensor) -> Tensor:
    """vit-pytorch."""
    for attention, ff in model.blocks:
        x = attention(x) + x
        x = ff(x) + x
    return x


def rows_with_norms(model: Shaped, x: Tensor) -> Tensor:
    for first, attention, second, ff in model.blocks:
        x = x + attention(first(x))
        x = x + ff(second(x))
    return x


def rows_by_name(model: Shaped, x: Tensor) -> Tensor:
    for row in model.blocks:
        x = x + row["attention"](row["first"](x))
        x = x + 0.5 * row["ff"](row["second"](x))
    return x


def residual_parts(model: Shaped, x: Tensor) -> Tensor:
    for attention, ff in model.blocks:
        x = ff(attention(x))
    return x


def two_lists_of_parts(model: Shaped, x: Tensor) -> Tensor:
    for attention, ff in zip(model.blocks, model.extra, strict=True):
        x = x + attention(norm(x))
        x = x + ff(norm(x))
    return x


def row() -> nn.Module:
    return nn.ModuleList([PreNorm(Attention()), PreNorm(FeedForward())])


def row_of_four() -> nn.Module:
    return nn.ModuleList([nn.LayerNorm(D), Attention(), nn.LayerNorm(D), FeedForward()])


def row_of_names() -> nn.Module:
    return nn.ModuleDict(dict(zip(("first", "attention", "second", "ff"), row_of_four(), strict=True)))


def row_of_residuals() -> nn.Module:
    return nn.ModuleList([Residual(PreNorm(Attention())), Residual(PreNorm(FeedForward()))])


CASES: dict[str, tuple[Callable[[], nn.Module], str, StackForm, int]] = {
    "functional norms": (lambda: Shaped(in_turn, some(Called)), "blocks", "chain", L),
    "attention beside the feed-forward layer": (lambda: Shaped(in_turn, some(Parallel)), "blocks", "chain", L),
    "norms behind": (lambda: Shaped(in_turn, some(PostNorm)), "blocks", "chain", L),
    "tokens first": (lambda: Shaped(tokens_first, some(Called)), "blocks", "chain", L),
    "packed tokens": (lambda: Shaped(packed, some(Called)), "blocks", "chain", L),
    "windows": (lambda: Shaped(windows, some(lambda: Called(in_rows))), "blocks", "chain", L),
    "state, cache, loss": (
        lambda: Shaped(with_cache, some(lambda: Called(lambda f, x: (f(x), [x[:1]], x.mean())))),
        "blocks",
        "chain",
        L,
    ),
    "loss, state": (
        lambda: Shaped(loss_first, some(lambda: Called(lambda f, x: (x.mean(), f(x))))),
        "blocks",
        "chain",
        L,
    ),
    "two streams": (lambda: Shaped(joint, some(JointBlock)), "blocks", "chain", L),
    "latents first": (
        lambda: Shaped(latents(False), some(lambda: Latent(False)), lambda: nn.Embedding(8, D)),
        "blocks",
        "chain",
        L,
    ),
    "data first": (
        lambda: Shaped(latents(True), some(lambda: Latent(True)), lambda: nn.Embedding(8, D)),
        "blocks",
        "chain",
        L,
    ),
    "named blocks": (
        lambda: Shaped(by_name, lambda: nn.ModuleDict({f"layer {index}": Called() for index in range(L)})),
        "blocks",
        "chain",
        L,
    ),
    "a Python list": (lambda: Shaped(in_turn, lambda: [Called() for _ in range(L)]), "blocks", "chain", L),
    "rows": (lambda: Shaped(pairs_of_parts, some(row)), "blocks", "entries", L - 1),
    "rows with norms": (lambda: Shaped(rows_with_norms, some(row_of_four)), "blocks", "entries", L - 1),
    "rows by name": (lambda: Shaped(rows_by_name, some(row_of_names)), "blocks", "entries", L - 1),
    "rows of residual parts": (lambda: Shaped(residual_parts, some(row_of_residuals)), "blocks", "chain", L),
    "two lists of parts": (
        lambda: Shaped(two_lists_of_parts, some(Attention), some(FeedForward)),
        "blocks",
        "entries",
        L - 1,
    ),
}


def in_rows(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return f(x.flatten(1, 2)).reshape(x.shape)


@pytest.mark.parametrize("case", CASES)
def test_the_stack_is_found_whatever_its_shape(case: str) -> None:
    make, name, form, num_layers = CASES[case]
    torch.manual_seed(0)
    model, x = make(), torch.randn(B, T, D)
    found = koopmon.discover(model, x)
    assert (found.stack.name, found.stack.form, found.stack.num_layers) == (name, form, num_layers)
    assert koopmon.profile(model, x, num_samples=64, svd_rank=4).num_layers == num_layers


class OwnMethod(nn.Module):
    """A stack whose blocks are called by another method than forward: their hooks are not called."""

    def __init__(self, kind: Callable[[], nn.Module] = Called) -> None:
        super().__init__()
        self.blocks = some(kind)()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block.f(x)
        return x


class Wrapped(Called):
    """Both layers are in a list, which is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([self.attention, self.ff])
        del self.attention, self.ff

    def f(self, x: Tensor) -> Tensor:
        x = x + self.parts[0](norm(x))
        return x + self.parts[1](norm(x))


def test_blocks_that_are_not_called_themselves_are_read_at_their_first_layers() -> None:
    torch.manual_seed(0)
    found = koopmon.discover(OwnMethod(), torch.randn(B, T, D))
    num_transitions = len(found.points) - 1
    assert (found.stack.name, found.stack.form, found.stack.num_layers) == (
        *("blocks.*.attention", "entries"),
        num_transitions,
    )


def test_blocks_without_a_first_layer_are_refused_with_the_reason() -> None:
    with pytest.raises(koopmon.DiscoveryError, match="blocks: none of its blocks was called"):
        koopmon.discover(OwnMethod(Wrapped), torch.randn(B, T, D))


def test_a_python_list_of_listed_blocks_is_no_second_stack() -> None:
    model = Shaped(in_turn, some(Called))
    model.same = list(model.blocks)
    assert koopmon.discover(model, torch.randn(B, T, D)).rejected == {}
