"""Train with transformers' Trainer once for each phase: `train_huggingface.py OUT PHASES`, on every rank."""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from trainings import BATCH, PACE_SECONDS, WARMUP, ByteModel, Prose, connected, digest, told, write
from transformers import Trainer, TrainerCallback, TrainingArguments

from koopmon.integrations.huggingface import KoopmonCallback


class Paced(TrainerCallback):
    """Record every loss; wait for the monitor before the first step, and shortly after each step."""

    def __init__(self, koopmon: KoopmonCallback | None, phase: dict[str, Any]) -> None:
        self.losses: list[float] = []
        self.status: dict[str, Any] = {}
        self._koopmon = koopmon
        self._pace = phase.get("pace", PACE_SECONDS)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if self._koopmon is not None and self._koopmon.agent.enabled:
            connected(self._koopmon.agent)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        time.sleep(self._pace)
        if self._koopmon is not None:
            self.status = told(self._koopmon.agent)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])
            if not logs["loss"] < 50.0:
                control.should_training_stop = True


def train(phase: dict[str, Any]) -> dict[str, Any]:
    accumulate = phase.get("accumulate", 1)
    arguments = TrainingArguments(
        output_dir=phase.get("folder") or tempfile.mkdtemp(),
        max_steps=phase["steps"],
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=accumulate,
        learning_rate=phase["lr"],
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=WARMUP,
        max_grad_norm=0.0,
        optim="adamw_torch",
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if phase.get("eval") else "no",
        eval_steps=phase.get("eval", 500),
        save_strategy="steps" if phase.get("save") else "no",
        save_steps=phase.get("save", 500),
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo",
        remove_unused_columns=False,
        dataloader_num_workers=phase.get("workers", 0),
        seed=phase.get("seed", 0),
    )
    koopmon = KoopmonCallback(endpoint=phase.get("endpoint"), run=phase["run"]) if "run" in phase else None
    paced = Paced(koopmon, phase)
    model = ByteModel(phase.get("seed", 0))
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Prose(BATCH * accumulate * 2 * 200),
        eval_dataset=Prose(8, seed=1),
        callbacks=[paced] if koopmon is None else [koopmon, paced],
    )
    trainer.train(resume_from_checkpoint=phase.get("resume"))
    return {
        "losses": paced.losses,
        "digest": digest(model),
        "status": paced.status,
        "joined": koopmon is not None and koopmon.agent.joined,
        "closed": None if koopmon is None else koopmon.agent.status()["reason"],
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    write([train(phase) for phase in json.loads(sys.argv[2])])
    time.sleep(0.1)  # gloo releases its last collective in a thread that needs the interpreter
    if dist.is_initialized():
        dist.destroy_process_group()
