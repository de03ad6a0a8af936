"""Both callbacks in one process: closing, refusals, and the end. A scripted monitor sends commands."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import koopmon
from koopmon.errors import ConfigError
from koopmon.wire.messages import Goodbye, Heartbeat
from tests.agent.scripted_monitor import ScriptedMonitor
from tests.integrations.conftest import ended_well, environment
from tests.integrations.programs.trainings import ByteModel, Prose

pytestmark = pytest.mark.filterwarnings("ignore")  # the trainers raise their own warnings
STEPS = 6
Step = Callable[[int], None]


class FailureError(Exception):
    """A user's own exception."""


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    for name in ("KOOPMON_ENDPOINT", "KOOPMON_RUN", "KOOPMON_CONFIG", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def monitor() -> Iterator[ScriptedMonitor]:
    with tempfile.TemporaryDirectory() as directory, ScriptedMonitor(Path(directory) / "m") as scripted:
        yield scripted


class HuggingFace:
    """Trainer with `fit`, which calls `after_step(k)` after each step and returns the number of steps."""

    def __init__(self, **options: Any) -> None:
        pytest.importorskip("transformers")
        from koopmon.integrations.huggingface import KoopmonCallback

        self.callback = KoopmonCallback(**options)

    def fit(self, after_step: Step = lambda _: None, *, steps: int = STEPS, optimizers: int = 1) -> int:
        from transformers import Trainer, TrainerCallback, TrainingArguments

        class Told(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                after_step(state.global_step)

        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                max_steps=steps,
                per_device_train_batch_size=2,
                use_cpu=True,
                report_to=[],
                logging_steps=1,
                save_strategy="no",
                disable_tqdm=True,
                remove_unused_columns=False,
            )
            trainer = Trainer(ByteModel(), arguments, train_dataset=Prose(2 * steps), callbacks=[Told()])
            trainer.add_callback(self.callback)
            if optimizers != 1:
                trainer.callback_handler.optimizer = None
                self.callback.on_train_begin(arguments, trainer.state, trainer.control, model=trainer.model)
                return 0
            trainer.train()
            return int(trainer.state.global_step)


class Lightning:
    """Trainer of Lightning with the same interface."""

    def __init__(self, **options: Any) -> None:
        pytest.importorskip("lightning")
        from koopmon.integrations.lightning import KoopmonCallback

        self.callback = KoopmonCallback(**options)

    def fit(self, after_step: Step = lambda _: None, *, steps: int = STEPS, optimizers: int = 1) -> int:
        from lightning.pytorch import Callback, LightningModule, Trainer

        class Training(LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.net = ByteModel()
                self.automatic_optimization = optimizers == 1

            def training_step(self, batch: Any, index: int) -> Any:
                return self.net(batch["ids"])["loss"]

            def configure_optimizers(self) -> Any:
                made = [torch.optim.SGD(self.net.parameters(), lr=0.1) for _ in range(optimizers)]
                return made or None

        class Told(Callback):
            def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
                after_step(trainer.global_step)

        trainer = Trainer(
            accelerator="cpu",
            max_steps=steps,
            callbacks=[Told(), self.callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_epochs=1,
        )
        trainer.fit(Training(), DataLoader(Prose(2 * steps), 2))
        return int(trainer.global_step)


both = pytest.mark.parametrize("library", [HuggingFace, Lightning])


@both
def test_the_loss_arrives_and_the_end_is_said(library: Any, monitor: ScriptedMonitor) -> None:
    monitor.heartbeat_seconds = 0.02
    trainer = library(endpoint=monitor.endpoint, run="mine")

    def after_step(step: int) -> None:
        monitor.wait(lambda: trainer.callback.agent.status()["connected"])
        if step == STEPS:
            monitor.wait(lambda: any(5.0 < (beat.training.loss or 0.0) < 6.0 for beat in monitor.of(Heartbeat)))

    assert trainer.fit(after_step) == STEPS
    monitor.wait(lambda: monitor.of(Goodbye))
    assert [(each.run, each.reason) for each in monitor.of(Goodbye)] == [("mine", "")]
    assert trainer.callback.agent.status()["reason"] == "closed"
    assert trainer.fit(lambda _: monitor.wait(lambda: trainer.callback.agent.status()["connected"])) == STEPS
    monitor.wait(lambda: len(monitor.of(Goodbye)) == 2)
    assert len({each.incarnation for each in monitor.of(Goodbye)}) == 2, "the next training is a new session"


@both
def test_the_trainer_stops_when_the_monitor_asks(library: Any, monitor: ScriptedMonitor) -> None:
    trainer = library(endpoint=monitor.endpoint)

    def after_step(step: int) -> None:
        agent = trainer.callback.agent
        monitor.wait(lambda: agent.status()["connected"])
        if step == 2:
            monitor.command("stop")
        if step > 2:
            monitor.wait(lambda: bool(agent.status()["control_ready"]))

    assert 2 < trainer.fit(after_step, steps=400) < 400


@both
def test_a_training_that_raises_says_so(library: Any, monitor: ScriptedMonitor) -> None:
    trainer = library(endpoint=monitor.endpoint)

    def after_step(step: int) -> None:
        monitor.wait(lambda: trainer.callback.agent.status()["connected"])
        raise FailureError

    with pytest.raises(FailureError):
        trainer.fit(after_step)
    if library is HuggingFace:  # reports no exception; the test below covers the end of the interpreter
        assert trainer.callback.agent.enabled
        trainer.callback._end("the test is over")
    else:
        monitor.wait(lambda: monitor.of(Goodbye))
        assert monitor.of(Goodbye)[0].reason == "the training raised FailureError"


@pytest.mark.process
def test_what_nobody_caught_is_said_when_the_interpreter_ends(monitor: ScriptedMonitor) -> None:
    text = """
import sys
from tests.integrations.test_session import HuggingFace
from tests.agent.scripted_monitor import ScriptedMonitor
trainer = HuggingFace(endpoint=sys.argv[1])
def after_step(step):
    ScriptedMonitor.wait(lambda: trainer.callback.agent.status()["connected"])
    raise ZeroDivisionError
trainer.fit(after_step)
"""
    done = subprocess.run(
        [sys.executable, "-c", text, monitor.endpoint],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    monitor.wait(lambda: monitor.of(Goodbye))
    assert monitor.of(Goodbye)[0].reason == "the training raised ZeroDivisionError"


@both
def test_a_training_that_is_attached_already_is_used_and_left_open(library: Any, monitor: ScriptedMonitor) -> None:
    theirs: list[koopmon.Agent] = []
    original = torch.optim.Optimizer.__init__

    def init(optimizer: Any, *args: Any, **kwargs: Any) -> None:
        original(optimizer, *args, **kwargs)
        if not theirs:  # as `koopmon run` does
            from koopmon.agent.model_roots import root_module

            theirs.append(koopmon.attach(root_module(optimizer), optimizer, endpoint=monitor.endpoint, run="theirs"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Optimizer, "__init__", init)
        trainer = library(endpoint="tcp://127.0.0.1:9", run="mine")
        seen: list[Any] = []
        trainer.fit(lambda _: seen.append(trainer.callback.agent.status()["endpoint"]))
    assert set(seen) == {monitor.endpoint}
    assert trainer.callback.agent.joined
    assert theirs[0].enabled, "who attached it closes it"
    theirs[0].close()


@both
def test_a_training_without_an_optimizer_is_one_line(library: Any, caplog: pytest.LogCaptureFixture) -> None:
    trainer = library(endpoint="tcp://127.0.0.1:9")
    trainer.fit(optimizers=0)
    said = [record.message for record in caplog.records if record.name.startswith("koopmon")]
    assert said == ["koopmon: not attached, training goes on: the trainer has no torch.optim.Optimizer"]
    assert not trainer.callback.agent.enabled


def test_all_optimizers_of_a_module_are_attached() -> None:
    trainer = Lightning(endpoint="tcp://127.0.0.1:9")
    seen: list[int] = []
    trainer.fit(lambda _: seen.append(len(list(trainer.callback.agent._runtime.optimizers))), optimizers=2, steps=1)
    assert set(seen) <= {2}
    assert trainer.callback.agent._runtime is not None


def test_copies_in_threads_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    trainer = HuggingFace(endpoint="tcp://127.0.0.1:9")
    arguments = type("Arguments", (), {"n_gpu": 2})()
    model = ByteModel()
    trainer.callback.on_train_begin(arguments, None, None, model=model, optimizer=torch.optim.SGD(model.parameters()))
    assert "torch.nn.DataParallel" in trainer.callback.agent.status()["reason"]
    assert len([record for record in caplog.records if "DataParallel" in record.message]) == 1


@both
def test_without_an_endpoint_training_goes_on_alone(library: Any, caplog: pytest.LogCaptureFixture) -> None:
    trainer = library()
    assert trainer.fit() == STEPS
    assert "KOOPMON_ENDPOINT" in trainer.callback.agent.status()["reason"]


@both
def test_a_mistake_in_an_argument_is_raised_before_the_first_step(library: Any) -> None:
    seen: list[int] = []
    with pytest.raises(ConfigError, match=r"sampling\.num_samples"):
        library(endpoint="tcp://127.0.0.1:9", config={"sampling": {"num_samples": 3}}).fit(seen.append)
    assert seen == []


@pytest.mark.process
@pytest.mark.parametrize(
    ("module", "library", "extra"),
    [
        ("huggingface", "transformers", "koopmon[huggingface]"),
        ("lightning", "lightning", "koopmon[lightning]"),
        ("optuna", "optuna", "optuna"),
    ],
)
def test_a_missing_library_is_one_clear_line(module: str, library: str, extra: str) -> None:
    text = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == {library!r}:
            raise ModuleNotFoundError("No module named " + name, name=name)
sys.meta_path.insert(0, Absent())
try:
    import koopmon.integrations.{module}
except ImportError as error:
    print(type(error).__name__, error)
"""
    done = ended_well(("-c", text))
    assert done.stdout.count("\n") == 1
    assert library in done.stdout
    assert done.stdout.endswith(f"pip install '{extra}'\n")
