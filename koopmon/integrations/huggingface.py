"""koopmon for the Trainer of Hugging Face transformers, and for its subclasses::

from koopmon.integrations.huggingface import KoopmonCallback

trainer.add_callback(KoopmonCallback())
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from koopmon.errors import MissingExtraError
from koopmon.integrations.mirrors import (
    CallMirror,
    Mirror,
    TensorBoardMirror,
    WandbMirror,
    log_to_comet,
    log_to_mlflow,
)
from koopmon.integrations.session import SessionCallback

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise MissingExtraError(__name__, "transformers", "koopmon[huggingface]") from None

__all__ = ["KoopmonCallback"]


class KoopmonCallback(SessionCallback, TrainerCallback):  # type: ignore[misc] # mypy sees no types of the library
    """Attaches koopmon when `train()` has its model and optimizer, and detaches at its end.

    `endpoint`, `run` and `config` are those of `koopmon.attach`, which raises errors in them at the start of `train()`.
    Without `endpoint` the callback uses the environment's endpoint; without that the training runs unmonitored.

    The numbers that the trainer logs, such as `kl`, `entropy` and `reward` of TRL, go to `Agent.log`: see `scalars`.

    Every `logging_steps` the callback logs koopmon's own scalars where `report_to` contains tensorboard (in a run
    `koopmon` in the trainer's directory) or wandb. On a stop request from the monitor (opt-in), training stops as if it
    had reached its last step. On a checkpoint request (opt-in), the trainer saves a checkpoint at that step, which
    counts in its `save_total_limit`.
    """

    _mirrors: Sequence[Mirror] = ()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The trainer's DataParallel wrapper is private and not visible from the model.
        threads = args.n_gpu > 1
        refused = "torch.nn.DataParallel runs copies of the model in threads; start it by torchrun" if threads else ""
        self._begin(kwargs["model"], [kwargs.get("optimizer")], refused=refused)
        self._mirrors = _mirrors(args) if state is not None and state.is_world_process_zero else []

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.agent.log(**scalars(kwargs.get("logs") or {}))
        for mirror in self._mirrors:
            mirror.write(self.agent, state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.agent.should_stop:
            control.should_training_stop = True
        if self.agent.should_checkpoint:
            control.should_save = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for mirror in self._mirrors:
            mirror.close()
        self._end()


_LOGS = {"mlflow": log_to_mlflow, "comet_ml": log_to_comet}
"""Functions of further trackers by their names in `report_to`."""

OWN = frozenset({"loss", "grad_norm", "learning_rate", "epoch", "total_flos", "num_input_tokens_seen", "num_tokens"})
"""Entries of the trainer's log that are not passed on: the agent measures them, or they only count."""


def scalars(logs: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a trainer's log by names that `Agent.log` accepts.

    `rewards/accuracy/mean` becomes `rewards_accuracy_mean`. The summary at the end of a training (`train_...`) is left
    out.
    """
    found = {
        re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")[:40]: float(value)
        for name, value in logs.items()
        if isinstance(value, (int, float)) and name not in OWN and not name.startswith("train_")
    }
    found.pop("", None)
    return found


def _mirrors(args: TrainingArguments) -> list[Mirror]:
    """Return the mirrors of the trackers that the trainer reports to."""
    mirrors: list[Mirror] = []
    if "tensorboard" in args.report_to:
        # The directory of the trainer's own runs; their names contain date and host.
        from transformers.integrations.integration_utils import default_logdir

        named = os.path.join(args.output_dir, default_logdir())
        mirrors.append(TensorBoardMirror(os.environ.get("TENSORBOARD_LOGGING_DIR") or named))
    if "wandb" in args.report_to:
        mirrors.append(WandbMirror("train/global_step"))
    # Trackio is left out: a value with a step would move the step of the trainer's next values.
    mirrors += [CallMirror(log) for name, log in _LOGS.items() if name in args.report_to]
    return mirrors
