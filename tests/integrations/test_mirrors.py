"""koopmon's scalars in trackers: a real event file, and W&B's own file, offline."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import koopmon
from koopmon.integrations.mirrors import CallMirror, TensorBoardMirror, WandbMirror, scalars
from koopmon.wire.messages import Judgement
from tests.agent.models import batch, build, loss_of
from tests.agent.scripted_monitor import ScriptedMonitor
from tests.integrations.conftest import ended_well
from tests.integrations.programs.trainings import ByteModel, Prose

pytestmark = pytest.mark.filterwarnings("ignore")  # the trackers raise their own warnings
SAID = Judgement(step=3, risk=0.5, forecast=0.25, near_unit_mass=0.75)
JUDGED = {"koopmon/risk": 0.5, "koopmon/forecast": 0.25, "koopmon/near_unit_mass": 0.75}


@pytest.fixture
def monitor() -> Iterator[ScriptedMonitor]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory, ScriptedMonitor(Path(directory) / "m") as scripted:
        scripted.judgement, scripted.heartbeat_seconds = SAID, 0.02
        yield scripted


@pytest.fixture
def agent(monitor: ScriptedMonitor) -> Iterator[koopmon.Agent]:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with koopmon.attach(model, optimizer, endpoint=monitor.endpoint, run="job") as attached:
        for step in range(3):
            loss_of(model, batch(step)).backward()
            optimizer.step()
        monitor.wait(lambda: attached.status()["judgement"])
        yield attached


def read_back(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the tags of the event files below a directory, with (step, value)."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(directory.rglob("events.*")):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    return found


def test_what_is_shown(agent: koopmon.Agent) -> None:
    found = scalars(agent)
    assert {name: found[name] for name in JUDGED} == JUDGED
    assert found["koopmon/lr_scale"] == 1.0
    assert found["koopmon/kss_alpha"] == 0.0
    assert found["koopmon/overhead_ratio"] > 0.0
    assert "koopmon/divergence_probability" not in found, "not known here"
    agent.close()
    assert scalars(agent) == {}


def test_tensorboard_reads_it_back_from_a_run_of_its_own_and_from_the_users(agent: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    own = TensorBoardMirror(tmp_path / "own")
    with SummaryWriter(tmp_path / "theirs") as writer:
        theirs = TensorBoardMirror(writer)
        for step in (7, 8):
            own.write(agent, step)
            theirs.write(agent, step)
        theirs.close()
        writer.add_scalar("loss", 1.0, 8)  # the writer of the user stays open
    own.close()
    for directory in (tmp_path / "own" / "koopmon", tmp_path / "theirs"):
        found = read_back(directory)
        for name, value in JUDGED.items():
            assert found[name] == [(7, value), (8, value)]
    assert read_back(tmp_path / "theirs")["loss"] == [(8, 1.0)]


@pytest.mark.parametrize("error", [OSError("No space left on device"), SystemExit("No space left on device")])
def test_a_tracker_that_fails_is_one_line(error: BaseException, agent: Any, caplog: pytest.LogCaptureFixture) -> None:
    def full(*_: Any) -> None:
        raise error

    mirror = TensorBoardMirror(SimpleNamespace(add_scalar=full))
    for step in range(3):
        mirror.write(agent, step)
    said = [record.message for record in caplog.records if "TensorBoardMirror" in record.message]
    assert said == ["koopmon: TensorBoardMirror is off, training goes on: No space left on device"]


def test_without_a_run_of_wandb_nothing_is_imported(agent: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    mirror = WandbMirror()
    mirror.write(agent, 1)
    assert mirror.enabled
    assert "wandb" not in sys.modules


WANDB = """
import sys
import wandb
from koopmon.integrations.mirrors import WandbMirror
class Agent:
    def status(self):
        applied = {"lr_scale": 0.25, "kss": {"alpha": 0.0}}
        return {"enabled": True, "judgement": {"risk": 0.5}, "applied": applied, "overhead_ratio": 0.001}
run = wandb.init(project="p", mode="offline", dir=sys.argv[1])
beside, named = WandbMirror(), WandbMirror("train/global_step")
for step in range(3):
    beside.write(Agent(), step)
    run.log({"loss": 1.0 - step})
named.write(Agent(), 3)
print({key: run.summary[key] for key in ("loss", "koopmon/risk", "koopmon/lr_scale", "train/global_step", "_step")})
run.finish()
"""


@pytest.mark.process
def test_wandb_holds_it_beside_the_users_own(tmp_path: Path) -> None:
    done = ended_well(("-c", WANDB, str(tmp_path)), WANDB_MODE="offline", WANDB_SILENT="true", HOME=str(tmp_path))
    assert done.stdout.strip().splitlines()[-1] == str(
        {"loss": -1, "koopmon/risk": 0.5, "koopmon/lr_scale": 0.25, "train/global_step": 3, "_step": 3}
    )
    (file,) = tmp_path.rglob("run-*.wandb")
    written = file.read_bytes()
    assert b"koopmon/risk" in written
    assert b"koopmon/overhead_ratio" in written


OFFLINE = """
import sys
from koopmon.integrations.mirrors import CallMirror, log_to_comet, log_to_mlflow
class Agent:
    def status(self):
        return {"enabled": True, "judgement": {"risk": 0.5}, "applied": {"lr_scale": 0.25}, "overhead_ratio": 0.001}
def write(log):
    mirror = CallMirror(log)
    for step in range(3):
        mirror.write(Agent(), step)
    assert mirror.enabled
"""
MLFLOW = """
write(log_to_mlflow)
assert "mlflow" not in sys.modules
import mlflow
mlflow.set_tracking_uri(f"file:{sys.argv[1]}/runs")
write(log_to_mlflow)
assert mlflow.active_run() is None
with mlflow.start_run() as run:
    write(log_to_mlflow)
mlflow.flush_async_logging()
history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "koopmon/risk")
print([(metric.step, metric.value) for metric in history])
"""
COMET = """
import comet_ml, json, zipfile
from pathlib import Path
write(log_to_comet)
settings = dict(log_code=False, log_git_metadata=False, log_env_details=False)
experiment = comet_ml.OfflineExperiment(offline_directory=sys.argv[1], display_summary_level=0, **settings)
write(log_to_comet)
experiment.end()
(archive,) = Path(sys.argv[1]).glob("*.zip")
lines = zipfile.ZipFile(archive).read("messages.json").decode().splitlines()
metrics = [json.loads(line)["payload"]["metric"] for line in lines if '"metric_msg"' in line]
print([(each["step"], each["metricValue"]) for each in metrics if each["metricName"] == "koopmon/risk"])
"""
TRACKIO = """
import json, sqlite3, trackio
from pathlib import Path
run = trackio.init(project="p", embed=False)
write(trackio.log)
trackio.finish()
(file,) = Path(sys.argv[1]).rglob("p.db")
rows = sqlite3.connect(file).execute("select step, metrics from metrics order by step").fetchall()
print([(step, json.loads(text)["koopmon/risk"]) for step, text in rows if "koopmon/risk" in str(text)])
"""


@pytest.mark.process
@pytest.mark.parametrize(("package", "program"), [("mlflow", MLFLOW), ("comet_ml", COMET), ("trackio", TRACKIO)])
def test_a_tracker_s_own_file_has_the_scalars(package: str, program: str, tmp_path: Path) -> None:
    """No extra has these packages, which bring dozens of others; the test runs where one is installed."""
    if find_spec(package) is None:
        pytest.skip(f"{package} is not part of koopmon[dev]")
    quiet = {"MLFLOW_ALLOW_FILE_STORE": "true", "TRACKIO_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = ended_well(("-c", OFFLINE + program, str(tmp_path)), HOME=str(tmp_path), **quiet)
    assert done.stdout.strip().splitlines()[-1] == str([(0, 0.5), (1, 0.5), (2, 0.5)])


def test_a_call_has_the_scalars_and_the_step(agent: Any) -> None:
    calls: list[tuple[dict[str, float], int]] = []
    mirror = CallMirror(lambda values, step: calls.append((values, step)))
    mirror.write(agent, 7)
    ((values, step),) = calls
    assert step == 7
    assert JUDGED.items() <= values.items()


def waiting(callback: Any, monitor: ScriptedMonitor) -> Callable[[], None]:
    return lambda: monitor.wait(lambda: callback.agent.status()["judgement"]) and None


def test_hugging_faces_trainer_that_reports_to_tensorboard_shows_it(monitor: ScriptedMonitor, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("transformers")
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from koopmon.integrations.huggingface import KoopmonCallback

    callback = KoopmonCallback(endpoint=monitor.endpoint, run="job")
    heard = waiting(callback, monitor)

    class Patient(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            heard()

    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        logging_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=["tensorboard"],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    Trainer(ByteModel(), arguments, train_dataset=Prose(8), callbacks=[Patient(), callback]).train()
    found = read_back(tmp_path)
    assert [step for step, _ in found["train/loss"]] == [2, 4]
    assert found["koopmon/risk"][:2] == [(2, 0.5), (4, 0.5)]


def test_lightnings_loggers_show_it(monitor: ScriptedMonitor, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("lightning")
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers import TensorBoardLogger

    from koopmon.integrations.lightning import KoopmonCallback

    callback = KoopmonCallback(endpoint=monitor.endpoint, run="job")
    heard = waiting(callback, monitor)

    class Training(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = ByteModel()

        def training_step(self, batch: Any, index: int) -> Any:
            loss = self.net(batch["ids"])["loss"]
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    class Patient(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            heard()

    Trainer(
        accelerator="cpu",
        max_steps=4,
        log_every_n_steps=2,
        accumulate_grad_batches=2,
        callbacks=[Patient(), callback],
        logger=TensorBoardLogger(tmp_path),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Training(), DataLoader(Prose(16), 2))
    found = read_back(tmp_path)
    assert found["loss"]
    assert found["koopmon/risk"] == [(2, 0.5), (4, 0.5)]
