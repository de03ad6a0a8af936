"""Runs of the live page without a daemon. A registry, a guard and real profiles feed it like the service."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from koopmon.config import Config, from_mapping
from koopmon.history.plain_profile import PlainProfile
from koopmon.monitor import events
from koopmon.monitor.http.live_state import LiveState
from koopmon.monitor.pending_commands import Answered
from koopmon.monitor.registry import RunRegistry
from koopmon.monitor.run import Run
from koopmon.monitor.run_controller import Assessment, RunController
from koopmon.spectral import SpectralProfile, profile_states
from koopmon.views.run_view import RunView
from koopmon.wire.messages import Ack, Applied, Command, TrainingStep
from tests import factories

NUM_LAYERS = 3


def profile(seed: int = 0, num_layers: int = NUM_LAYERS, scale: float = 0.5) -> SpectralProfile:
    """Profile a random residual stream, (L + 1, N, D) = (num_layers + 1, 64, 8)."""
    generator = torch.Generator().manual_seed(seed)
    updates = torch.randn((num_layers + 1, 64, 8), generator=generator)
    updates[1:] *= scale
    return profile_states(torch.cumsum(updates, dim=0), svd_rank=8)


class Fed:
    """One run of the page. `applied` has the settings in force of its rank 0."""

    def __init__(
        self, live_state: LiveState, config: Config, name: str, incarnation: str = "aaaaaaaa", **hello: Any
    ) -> None:
        self.live_state, self.config = live_state, config
        self.applied = Applied()
        self.words = {"run": name, "incarnation": incarnation}
        values = {"world_size": 2, "num_layers": NUM_LAYERS, "applied": self.applied, "hostname": "node-1"}
        said = factories.hello(**self.words, **{**values, **hello})
        self.registry = RunRegistry(config.monitor)
        self.controller = RunController(config, said, self.applied)
        self.run: Run = self.registry.admit(0.0, said, b"peer", lambda _: (self.controller, None)).run
        self.heard()

    def heard(self) -> None:
        self.tell(events.RunChanged(self.run))

    def tell(self, event: events.Event) -> None:
        self.live_state(0.0, event)

    def heartbeat(self, step: int, **fields: Any) -> None:
        beat = factories.heartbeat(step, **self.words, applied=self.applied, **fields)
        self.registry.on_message(float(step), beat, b"peer")
        self.heard()

    def judge(self, step: int, found: SpectralProfile | None, **scalars: Any) -> Assessment:
        """Add one snapshot; None for states that are not finite."""
        values = {"learning_rate": 1e-3, "loss": 2.0, "grad_norm": None, "lr_scale": self.applied.lr_scale}
        training = TrainingStep(step=step, **{**values, **scalars})
        assessment = self.controller.assess(float(step), training, found, step=step)
        self.tell(events.Assessed(self.run, assessment, None if found is None else PlainProfile.of(found)))
        if assessment.remarkable:
            self.tell(events.Decided(self.run, assessment))
        return assessment

    def answer(self, command_id: str, outcome: Any, step: int, detail: str = "") -> None:
        ack = Ack(**self.words, command_id=command_id, outcome=outcome, step=step, detail=detail, applied=self.applied)
        self.controller.acknowledge(ack)
        self.tell(events.CommandAcked(self.run, ack, Answered("set_lr_scale", first=True, counts=True)))

    def give_up(self, command: Command) -> None:
        self.tell(events.CommandUnanswered(self.run, command))

    @property
    def view(self) -> RunView:
        found = self.live_state.view(self.run.name)
        assert found is not None
        return found


@pytest.fixture
def live_state() -> LiveState:
    return LiveState(clock=iter(range(1_000_000)).__next__, wall=lambda: 1_700_000_000.0)


@pytest.fixture
def feed(live_state: LiveState) -> Callable[..., Fed]:
    def start(name: str = "job", incarnation: str = "aaaaaaaa", *, tables: Any = None, **hello: Any) -> Fed:
        return Fed(live_state, from_mapping(tables or {}), name, incarnation, **hello)

    return start


@pytest.fixture
def make_profile() -> Callable[..., SpectralProfile]:
    return profile
