"""KSS with shielded modules: refused with one line, without a gradient at a router."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from koopmon.wire.messages import Applied, KssSettings
from tests.adapters.family_zoo import mixtral
from tests.agent.scripted_monitor import ScriptedMonitor

Attach = Callable[..., Any]
KSS = KssSettings(alpha=5.0, tau_u=1.0, svd_rank=4, num_samples=16)


def train(
    agents: Attach, monitor: ScriptedMonitor, *, through: bool, kss: KssSettings | None
) -> tuple[list[Tensor], Any]:
    """Train a few steps of a tiny Mixtral with a KSS command after the first; return the last router gradients and the
    ack.
    """
    torch.manual_seed(0)
    model, args, kwargs = mixtral()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    config = {"kss": {"through_shielded": through}, "limits": {"max_actions_per_hour": 1}}
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=config)
    monitor.wait(lambda: agent.status()["connected"])
    ack = None

    def train_step() -> None:
        optimizer.zero_grad()
        model(*args, **kwargs).loss.backward()
        optimizer.step()

    for step in range(6):
        train_step()
        if step == 1 and kss is not None:
            sent = monitor.command("set_kss", kss=kss)
            monitor.wait(lambda: agent._runtime.lifecycle.requests)
        if step == 2 and kss is not None:
            ack = monitor.ack(sent)
    status = agent.status()
    assert status["enabled"]
    gradients = [layer.mlp.gate.weight.grad.clone() for layer in model.model.layers]
    if kss is not None and not through:
        cut = monitor.command("set_lr_scale", lr_scale=0.5)
        monitor.wait(lambda: agent._runtime.lifecycle.requests)
        train_step()
        assert monitor.ack(cut).outcome == "applied", "what was refused took nothing of the hour's one action"
        again = monitor.command("set_lr_scale", lr_scale=0.25)
        monitor.wait(lambda: agent._runtime.lifecycle.requests)
        train_step()
        spent = monitor.ack(again)
        assert (spent.outcome, spent.permanent) == ("refused", False), "the hour's one action is spent"
        off = monitor.command("set_kss", kss=KssSettings())
        monitor.wait(lambda: agent._runtime.lifecycle.requests)
        train_step()
        assert monitor.ack(off).outcome == "applied", "turning it off is always allowed"
    agent.close()
    return gradients, ack


def test_kss_is_refused_where_routers_are_shielded(agents: Attach, monitor: ScriptedMonitor) -> None:
    plain, _ = train(agents, monitor, through=False, kss=None)
    refused, ack = train(agents, monitor, through=False, kss=KSS)
    assert (ack.outcome, ack.permanent) == ("refused", True)
    assert ack.applied == Applied()
    assert "model.layers.0.mlp.gate and 3 more" in ack.detail
    assert "through_shielded = true" in ack.detail
    assert all(torch.equal(x, y) for x, y in zip(plain, refused, strict=True))


def test_kss_reaches_routers_where_that_is_allowed(agents: Attach, monitor: ScriptedMonitor) -> None:
    """The shield has an effect."""
    plain, _ = train(agents, monitor, through=True, kss=None)
    reached, ack = train(agents, monitor, through=True, kss=KSS)
    assert ack.outcome == "applied"
    assert any(not torch.equal(x, y) for x, y in zip(plain, reached, strict=True))


def test_what_an_earlier_incarnation_had_comes_back_without_kss(
    agents: Attach, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with ScriptedMonitor(tmp_path / "again", restore=Applied(lr_scale=0.5, kss=KSS)) as monitor:
        torch.manual_seed(0)
        model, args, kwargs = mixtral()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        agent = agents(model, optimizer, endpoint=monitor.endpoint)
        monitor.wait(lambda: agent.status()["connected"])
        for _ in range(2):
            model(*args, **kwargs).loss.backward()
            optimizer.step()
        applied = agent.status()["applied"]
        assert (applied["lr_scale"], applied["kss"]["alpha"]) == (0.5, 0.0)
