"""Trainers of other libraries, unchanged: the reports have the losses that they train on, and their gradient norms."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import koopmon
from tests.agent.models import paced
from tests.agent.scripted_monitor import ScriptedMonitor
from tests.integrations.programs.trainings import ByteModel, Prose

pytestmark = pytest.mark.filterwarnings("ignore")  # the trainers raise their own warnings
STEPS = 5
PARTS = 2
"""Micro-batches of each step."""


class Noted(ByteModel):
    """Keeps the loss of each forward, and the gradient norm at each update, in the user's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.pace: Callable[[], None] = lambda: None

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        output = super().forward(ids)
        self.losses.append(float(output["loss"].detach()))
        return output

    def watched(self, agent: Any, optimizer: Any, monitor: ScriptedMonitor) -> None:
        monitor.wait(lambda: agent.status()["connected"])
        pace = paced(agent, monitor)

        def after_step(*_: Any) -> None:
            squares = [float(each.grad.double().pow(2).sum()) for each in self.parameters() if each.grad is not None]
            self.norms.append(math.sqrt(sum(squares)))

        getattr(optimizer, "optimizer", optimizer).register_step_post_hook(after_step)
        self.pace = pace


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    for name in ("KOOPMON_ENDPOINT", "KOOPMON_RUN", "KOOPMON_CONFIG", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def monitor() -> Iterator[ScriptedMonitor]:
    with tempfile.TemporaryDirectory() as directory, ScriptedMonitor(Path(directory) / "m") as scripted:
        yield scripted


def check(monitor: ScriptedMonitor, model: Noted, parts: int = PARTS) -> None:
    """Compare the reports with what the model has noted."""
    assert len(monitor.shards) >= 3
    assert len(model.losses) == parts * STEPS
    for shard, _ in monitor.shards:
        own = model.losses[parts * shard.step : parts * (shard.step + 1)]
        assert shard.training.loss == pytest.approx(sum(own) / parts, rel=1e-6), shard.step
        assert shard.training.grad_norm == pytest.approx(model.norms[shard.step], rel=1e-5)


EVERY_STEP = {"cadence": {"dense_every": 1}}


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_the_trainer_of_hugging_face(clip: float, monitor: ScriptedMonitor) -> None:
    pytest.importorskip("transformers")
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from koopmon.integrations.huggingface import KoopmonCallback

    model, callback = Noted(), KoopmonCallback(endpoint=monitor.endpoint, config=EVERY_STEP)

    class Paced(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
            model.watched(callback.agent, known["optimizer"], monitor)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            model.pace()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=PARTS,
            max_grad_norm=clip,
            use_cpu=True,
            report_to=[],
            logging_steps=2,
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = Trainer(model, arguments, train_dataset=Prose(2 * PARTS * STEPS), callbacks=[callback, Paced()])
        trainer.train()
    check(monitor, model)
    assert clip == 0.0 or max(model.norms) == pytest.approx(clip, rel=1e-3), "the norm is of the clipped gradients"


@pytest.mark.parametrize("automatic", [True, False])
def test_lightning(automatic: bool, monitor: ScriptedMonitor) -> None:
    pytest.importorskip("lightning")
    from lightning.pytorch import Callback, LightningModule, Trainer

    from koopmon.integrations.lightning import KoopmonCallback

    model, callback = Noted(), KoopmonCallback(endpoint=monitor.endpoint, config=EVERY_STEP)

    class Training(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model
            self.automatic_optimization = automatic

        def training_step(self, batch: Any, index: int) -> Any:
            loss = self.net(batch["ids"])["loss"]
            if not automatic:
                optimizer: Any = self.optimizers()
                self.manual_backward(loss / PARTS)
                if index % PARTS == PARTS - 1:
                    optimizer.step()
                    optimizer.zero_grad()
                return None
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    class Paced(Callback):
        def on_train_start(self, trainer: Any, _: Any) -> None:
            model.watched(callback.agent, trainer.optimizers[0], monitor)

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            if index % PARTS == PARTS - 1:
                model.pace()

    trainer = Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        callbacks=[callback, Paced()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
        **({"accumulate_grad_batches": PARTS} if automatic else {}),
    )
    trainer.fit(Training(), DataLoader(Prose(2 * PARTS * STEPS), 2))
    check(monitor, model)


def test_accelerate(monitor: ScriptedMonitor) -> None:
    pytest.importorskip("accelerate")
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=PARTS)
    model = Noted()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    prepared, stepping, loader = accelerator.prepare(model, optimizer, DataLoader(Prose(2 * PARTS * STEPS), 2))
    with koopmon.attach(prepared, stepping, endpoint=monitor.endpoint, config=EVERY_STEP) as agent:
        model.watched(agent, optimizer, monitor)
        for batch in loader:
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(batch["ids"])["loss"])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(prepared.parameters(), 0.1)
                stepping.step()
                stepping.zero_grad()
            if accelerator.sync_gradients:
                model.pace()
        check(monitor, model)
