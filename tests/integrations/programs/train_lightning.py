"""Train with Lightning's Trainer once for each phase: `train_lightning.py OUT PHASES`, on every rank."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))
from trainings import BATCH, PACE_SECONDS, WARMUP, ByteModel, Prose, connected, digest, told, write

from koopmon.integrations.lightning import KoopmonCallback


class Training(LightningModule):
    def __init__(self, phase: dict[str, Any]) -> None:
        super().__init__()
        self.net = ByteModel(phase.get("seed", 0))
        self.phase = phase

    def training_step(self, batch: Any, index: int) -> Any:
        return self.net(batch["ids"])["loss"]

    def validation_step(self, batch: Any, index: int) -> None:
        self.net(batch["ids"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=self.phase["lr"])
        warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}


class Paced(Callback):
    """Record every loss; wait for the monitor before the first step, and shortly after each step."""

    def __init__(self, koopmon: KoopmonCallback | None, phase: dict[str, Any]) -> None:
        self.losses: list[float] = []
        self.status: dict[str, Any] = {}
        self._koopmon = koopmon
        self._pace = phase.get("pace", PACE_SECONDS)

    def on_train_batch_start(self, *_: Any) -> None:
        if self._koopmon is not None and self._koopmon.agent.enabled:
            connected(self._koopmon.agent)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, *_: Any) -> None:
        time.sleep(self._pace)
        loss = outputs["loss"].clone()
        dist.all_reduce(loss)
        self.losses.append(loss.item() / dist.get_world_size())
        if not self.losses[-1] < 50.0:
            trainer.should_stop = True
        if self._koopmon is not None:
            self.status = told(self._koopmon.agent)


def train(phase: dict[str, Any]) -> dict[str, Any]:
    accumulate, every = phase.get("accumulate", 1), phase.get("eval", 0)
    koopmon = KoopmonCallback(endpoint=phase.get("endpoint"), run=phase["run"]) if "run" in phase else None
    paced = Paced(koopmon, phase)
    callbacks: list[Callback] = [paced] if koopmon is None else [koopmon, paced]
    if "save" in phase:
        callbacks.append(ModelCheckpoint(phase["folder"], "{step}", every_n_train_steps=phase["save"], save_top_k=-1))
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        max_steps=phase["steps"],
        accumulate_grad_batches=accumulate,
        val_check_interval=every * accumulate if every else 1.0,
        limit_val_batches=1 if every else 0,
        num_sanity_val_steps=1 if every else 0,
        callbacks=callbacks,
        enable_checkpointing="save" in phase,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        default_root_dir=tempfile.mkdtemp(),
    )
    module = Training(phase)
    data = DataLoader(Prose(BATCH * accumulate * 2 * 100), BATCH, num_workers=phase.get("workers", 0))
    trainer.fit(module, data, DataLoader(Prose(8, seed=1), BATCH), ckpt_path=phase.get("resume"))
    return {
        "losses": paced.losses,
        "digest": digest(module.net),
        "status": paced.status,
        "joined": koopmon is not None and koopmon.agent.joined,
        "closed": None if koopmon is None else koopmon.agent.status()["reason"],
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    write([train(phase) for phase in json.loads(sys.argv[2])])
    time.sleep(0.1)  # gloo releases its last collective in a thread that needs the interpreter
    dist.destroy_process_group()
