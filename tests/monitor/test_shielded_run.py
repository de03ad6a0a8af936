"""A mixture of experts from end to end: a real monitor decides, a real agent refuses KSS, and back-offs continue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import koopmon
from tests.adapters.family_zoo import L, mixtral

torch.set_num_threads(1)


def test_kss_and_back_off_guard_a_mixture_as_back_off_alone(
    start_monitor: Callable[..., Any], until: Callable[..., Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("KOOPMON_ENDPOINT", "KOOPMON_RUN", "KOOPMON_CONFIG", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    # Every snapshot is an alarm, so the policy would request KSS beside each back-off.
    policy = {"name": "kss+lr", "act_risk": 1e-9, "severe_risk": 2e-9, "release_risk": 0.0, "cooldown_steps": 1}
    monitor = start_monitor(
        bind=f"ipc://{tmp_path}/m/control",
        policy=policy,
        kss={"method": "published"},
        monitor={"svd_rank": 4, "heartbeat_seconds": 0.1},
    )
    refused = 'commands_settled_total{kind="set_kss",outcome="%s",run="job"}'
    torch.manual_seed(0)
    model, args, kwargs = mixtral()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    cadence = {"warmup_steps": 1000, "initial_credit_seconds": 1000.0}
    config = {"cadence": cadence, "sampling": {"num_samples": 18}}
    with koopmon.attach(model, optimizer, endpoint=monitor.addresses.endpoint, run="job", config=config) as agent:
        until(lambda: agent.status()["connected"])

        def trains_until_the_least_rate() -> bool:
            optimizer.zero_grad()
            model(*args, **kwargs).loss.backward()
            optimizer.step()
            seen = 'snapshots_received_total{run="job"}'
            until(lambda: monitor.samples().get(seen, 0) == agent.status()["sent"])
            return agent.status()["applied"]["lr_scale"] == 0.125 and monitor.samples()[refused % "refused"] == 1

        until(trains_until_the_least_rate)
        for _ in range(5):  # alarms continue without a further command
            trains_until_the_least_rate()
        status = agent.status()
        assert status["enabled"]
        assert status["applied"]["kss"]["alpha"] == 0.0
        entropy = 'observable_router_entropy{layer="0",run="job"}'
        samples = until(lambda: (found := monitor.samples()).get(entropy) and found)
    assert (
        samples['commands_issued_total{kind="set_kss",run="job"}'],
        samples[refused % "refused"],
        samples[refused % "applied"],
    ) == (1, 1, 0)
    metrics = [key.partition("{")[0] for key in samples if key.startswith("observable_")]
    named = {name.removeprefix("observable_") for name in metrics}
    assert named == {"router_entropy", "load_imbalance", "top_expert_share"}
    monitor.stop()
    with monitor.history() as history:
        profiles = list(history.profiles("job"))
        rows = [row for decision in history.decisions("job") for row in decision.commands]
    assert all(set(row.observables) == named for row in profiles)
    assert all(len(values) == L for row in profiles for values in row.observables.values())
    (kss,) = [row for row in rows if row.command.kind == "set_kss"]
    assert kss.outcome == "refused"
    assert "through_shielded" in (kss.detail or "")
    cuts = [row for row in rows if row.command.kind == "set_lr_scale"]
    assert [row.outcome for row in cuts] == ["applied"] * len(cuts)
