"""The models of an optimizer, found among the live objects."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from koopmon.agent.model_roots import RootNotFoundError, join, models_of, root_module
from tests.agent.models import build


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


def test_the_root_is_the_outermost_wrapper() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    outer = Wrapper(Wrapper(model))
    assert root_module(torch.optim.SGD(model.parameters(), lr=0.1)) is outer
    assert root_module(torch.optim.SGD(model[0].parameters(), lr=0.1)) is outer, "a part of the parameters will do"


def test_a_copy_is_not_the_root() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    average = Wrapper(copy.deepcopy(model))
    assert root_module(torch.optim.SGD(model.parameters(), lr=0.1)) is model
    assert root_module(torch.optim.SGD(average.parameters(), lr=0.1)) is average


def test_two_wrappers_of_one_model_share_it_as_the_root() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    views = [Wrapper(model), Wrapper(Wrapper(model))]
    assert root_module(torch.optim.SGD(model.parameters(), lr=0.1)) is model
    del views


def test_parameters_of_two_models_have_no_root() -> None:
    models = [nn.Linear(2, 2), nn.Linear(2, 2)]
    optimizer = torch.optim.SGD([p for model in models for p in model.parameters()], lr=0.1)
    with pytest.raises(RootNotFoundError, match="no one model owns all"):
        root_module(optimizer)


def test_models_that_share_an_optimizer_get_one_root_in_its_order() -> None:
    encoder, decoder, head = build(), build(), nn.Linear(2, 2)

    def models(*modules: nn.Module) -> list[nn.Module]:
        return models_of(AdamW([each for module in modules for each in module.parameters()]))

    assert models(decoder, encoder) == [decoder, encoder]
    assert models(encoder, head) == [encoder], "one without blocks is beside the model"
    views = [Wrapper(encoder), Wrapper(encoder)]
    assert models(encoder, decoder) == [decoder], "two views of a model are no models"
    del views
    root, name = join([decoder, encoder]), type(decoder).__name__
    assert dict(root.named_children()) == {name: decoder, f"{name}2": encoder}
    assert type(root).__name__ == f"{name}+{name}2"
    assert root_module(AdamW([*decoder.parameters(), *encoder.parameters()])) is root
