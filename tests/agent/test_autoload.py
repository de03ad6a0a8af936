"""Attach without code: the affected processes, the found model, and its harmlessness."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
from torch.optim import AdamW

from koopmon.agent.autoload import DIRECTORY, _name_child, should_attach
from koopmon.agent.optimizer_watch import ATTACHED_PID, IDLE_STEPS, MAX_MODELS, OptimizerWatch
from tests.agent.models import build, train_step

ENDPOINT = {"KOOPMON_ENDPOINT": "ipc:///nowhere/control", "KOOPMON_RUN": "autoload-test"}

# It replaces a user's sitecustomize, and koopmon.attach by a recorder.
THEIRS = """
import json, logging, os, sys, weakref
assert "torch" not in sys.modules
import koopmon

class Agent:
    step = 0
    def __init__(self, model):
        self.model, self.number, self.enabled = weakref.ref(model), len(ever), not is_refused(model)
        ever.append(self.number)
    def close(self):
        if self in agents:
            note("close", steps=self.step, agent=self.number)
            agents.remove(self)
    def status(self):
        return {"enabled": self.enabled, "step": self.step}

agents, ever = [], []

def is_refused(model):
    return type(model).__name__ == os.environ.get("REFUSE")

def note(what, **more):
    with open(os.environ["NOTES"], "a") as notes:
        more.update(what=what, pid=os.getpid(), rank=os.environ.get("RANK"))
        notes.write(json.dumps(more) + "\\n")

def attach(model, optimizer, run=None):
    if os.environ.get("FAIL"):
        raise RuntimeError("no residual chain")
    joined = [agent for agent in agents if agent.model() is model]
    if is_refused(model):
        logging.getLogger("koopmon.agent").warning("not attached: no chain in %s", type(model).__name__)
        return Agent(model)
    note("join" if joined else "attach", model=type(model).__name__, optimizer=type(optimizer).__name__, run=run)
    agent = joined[0] if joined else Agent(model)
    def count(*_):
        agent.step += 1
    optimizer.register_step_post_hook(count)
    if not joined:
        agents.append(agent)
    return agent

koopmon.attach = attach
theirs = True
"""

TRAIN = """
import torch
from torch import nn
model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(2, 3)).sum().backward()
optimizer.step()
print("trained")
"""


class Bench:
    """Run scripts like `koopmon run`, and read the records."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.notes_file = directory / "notes.jsonl"
        (directory / "site").mkdir()
        (directory / "site" / "sitecustomize.py").write_text(THEIRS)

    def write(self, body: str) -> Path:
        script = self.directory / "script.py"
        script.write_text(textwrap.dedent(body))
        return script

    def run(self, body: str, *, launcher: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(DIRECTORY), str(self.directory / "site")])
        environ = {key: value for key, value in os.environ.items() if not key.startswith("KOOPMON_")}
        environ |= {"PYTHONPATH": path, "NOTES": str(self.notes_file), "OMP_NUM_THREADS": "1", **ENDPOINT, **env}
        command = [sys.executable, *launcher, str(self.write(body))]
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)

    def notes(self) -> list[dict[str, Any]]:
        lines = self.notes_file.read_text().splitlines() if self.notes_file.exists() else []
        return [json.loads(line) for line in lines]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.mark.process
def test_a_plain_script_is_attached_once_and_closed_at_its_end(bench: Bench) -> None:
    done = bench.run(TRAIN)
    assert (done.returncode, done.stdout, done.stderr) == (0, "trained\n", "")
    assert [note["what"] for note in bench.notes()] == ["attach", "close"]
    assert bench.notes()[0]["model"] == "Sequential"
    assert bench.notes()[0]["optimizer"] == "AdamW"


@pytest.mark.process
def test_torch_is_not_imported_before_the_script_does(bench: Bench) -> None:
    done = bench.run(
        """
        import sys
        assert "torch" not in sys.modules and "numpy" not in sys.modules, sorted(sys.modules)
        import torch.optim.optimizer as module, inspect
        assert "class Optimizer" in inspect.getsource(module)
        assert "exec_module" not in vars(module.__loader__)
        assert not any("koopmon" in type(finder).__module__ for finder in sys.meta_path)
        assert module.Optimizer.__init__.__qualname__ == "Optimizer.__init__"
        assert hasattr(module.Optimizer.__init__, "__wrapped__")
        """
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.process
def test_the_users_own_sitecustomize_runs_and_ours_leaves_no_trace(bench: Bench) -> None:
    done = bench.run(
        f"""
        import sys, sitecustomize
        assert sitecustomize.theirs
        assert {str(DIRECTORY)!r} not in sys.path
        """
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.process
def test_an_error_in_the_users_own_sitecustomize_is_reported_as_ever(bench: Bench) -> None:
    (bench.directory / "site" / "sitecustomize.py").write_text("raise ValueError('theirs is broken')")
    done = bench.run("print('alive')")
    assert done.stdout == "alive\n"
    assert "theirs is broken" in done.stderr


@pytest.mark.process
def test_without_an_endpoint_nothing_is_wrapped(bench: Bench) -> None:
    body = "import torch; print(hasattr(torch.optim.Optimizer.__init__, '__wrapped__'))"
    assert bench.run(body, KOOPMON_ENDPOINT="").stdout == "False\n"
    assert bench.run(body).stdout == "True\n"


@pytest.mark.process
def test_a_failure_is_one_line_and_training_goes_on(bench: Bench) -> None:
    done = bench.run(TRAIN, FAIL="1")
    assert (done.returncode, done.stdout) == (0, "trained\n")
    assert done.stderr.count("\n") == 1
    assert "not attached" in done.stderr
    assert "no residual chain" in done.stderr


@pytest.mark.process
def test_parameters_of_no_model_are_one_line(bench: Bench) -> None:
    step = "each = torch.ones(2, requires_grad=True); torch.optim.SGD([each], lr=0.1).step()"
    done = bench.run(f"import torch; {step}; {step}; print('on')")
    assert done.stdout == "on\n"
    assert done.stderr.count("\n") == 1
    assert "no one model owns" in done.stderr


@pytest.mark.slow
@pytest.mark.process
def test_workers_are_left_alone_and_other_scripts_are_not(bench: Bench) -> None:
    done = bench.run(
        """
        import multiprocessing, os, subprocess, sys

        TRAIN = "import torch; m = torch.nn.Linear(2, 2); torch.optim.SGD(m.parameters(), lr=0.1)"
        SHOW = "; import os; print(os.getpid(), os.environ['KOOPMON_RUN'])"

        def train():
            exec(TRAIN)

        if __name__ == "__main__":
            for method in ("spawn", "forkserver"):
                child = multiprocessing.get_context(method).Process(target=train)
                child.start(); child.join(); assert child.exitcode == 0
            exec(TRAIN)  # now this process is attached
            child = multiprocessing.get_context("fork").Process(target=train)
            child.start(); child.join(); assert child.exitcode == 0
            print(os.getpid(), flush=True)
            subprocess.run([sys.executable, "-c", TRAIN + SHOW], check=True)
        """
    )
    assert done.returncode == 0, done.stderr
    *pids, run = done.stdout.split()
    assert run == "autoload-test.child"
    parent, other = map(int, pids)
    notes = [(note["what"], note["pid"]) for note in bench.notes()]
    assert [what for what, _ in notes[:2]] == ["attach", "close"], "a spawned rank"
    assert parent not in (notes[0][1], notes[1][1])
    assert notes[2:] == [("attach", parent), ("attach", other), ("close", other), ("close", parent)]


def attached(bench: Bench, body: str) -> list[tuple[str, str | None, str | None]]:
    """Run a script; what was attached and closed, with the model and the optimizer."""
    start = "import torch\nfrom torch import nn\nfrom torch.optim import SGD, AdamW\n"
    train = "def train(optimizer, steps):\n    for _ in range(steps):\n        optimizer.step()\n"
    done = bench.run(start + train + textwrap.dedent(body))
    assert (done.returncode, done.stderr) == (0, "")
    return [(note["what"], note.get("model"), note.get("optimizer")) for note in bench.notes()]


MODEL = "model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))\n"


@pytest.mark.process
@pytest.mark.parametrize(
    "body",
    [
        "a = SGD(model.parameters(), lr=0.1); b = AdamW(model.parameters())",
        "a = SGD(model[0].parameters(), lr=0.1); b = AdamW(model[1].parameters())",
        "a = SGD(model[1].parameters(), lr=0.1); train(a, 3); a = AdamW(model.parameters()); train(a, 3)",
    ],
    ids=["replaced", "by layer", "unfreezing"],
)
def test_optimizers_of_one_model_share_one_agent(bench: Bench, body: str) -> None:
    assert attached(bench, MODEL + body) == [
        ("attach", "Sequential", "SGD"),
        ("join", "Sequential", "AdamW"),
        ("close", None, None),
    ]


@pytest.mark.process
def test_an_optimizer_per_parameter_and_one_of_a_single_number_beside_the_model(bench: Bench) -> None:
    body = """
    held = [SGD([each], lr=0.1) for each in model.parameters()]
    alone = AdamW([torch.ones(1, requires_grad=True)])
    train(held[0], 1); train(alone, 20)
    """
    found = attached(bench, MODEL + textwrap.dedent(body))
    assert [what for what, *_ in found] == ["attach", "join", "join", "join", "close"]


SECOND = """
import torch
from torch import nn

class Net(nn.Sequential):
    pass

class Wide(nn.Sequential):
    pass

class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

def made(kind=Net, wrapped=False):
    model = kind(nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return (Wrapper(model) if wrapped else model), optimizer

def train(pair, steps=20):
    for _ in range(steps):
        pair[1].step()

def fit(*args):
    model, optimizer = made(*args)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)  # a cycle of references
    train((model, optimizer))
"""


def runs(bench: Bench, body: str) -> list[tuple[str, str | None, int]]:
    """Run a script of several trainings; the model, the run and the number of its steps, by agent."""
    done = bench.run(SECOND + textwrap.dedent(body))
    assert (done.returncode, done.stderr) == (0, "")
    notes = [note for note in bench.notes() if note["what"] != "join"]
    opened = [(note["model"], note["run"]) for note in notes if note["what"] == "attach"]
    steps = {note["agent"]: note["steps"] for note in notes if note["what"] == "close"}
    return [(*pair, steps[index]) for index, pair in enumerate(opened)]


@pytest.mark.process
@pytest.mark.parametrize(
    "body",
    [
        "for _ in range(3):\n    model, optimizer = made()\n    train((model, optimizer))",
        "kept = []\nfor _ in range(3):\n    kept.append(made())\n    train(kept[-1])",
        "for _ in range(3):\n    fit()",
        "class Trainer:\n    def __init__(self):\n        self.me, self.pair = self, made()\n"
        "for _ in range(3):\n    trainer = Trainer(); train(trainer.pair)",
        "import gc; gc.disable()\nfor _ in range(3):\n    fit()",
    ],
    ids=["loop", "kept", "function", "cycle", "no collection"],
)
def test_the_next_training_of_a_process_is_followed_from_its_first_step(bench: Bench, body: str) -> None:
    assert runs(bench, body) == [("Net", None, 20)] * 3


@pytest.mark.process
def test_a_wrapper_does_not_change_the_class_of_a_model(bench: Bench) -> None:
    body = """
    def wrapped():
        model = Wrapper(Net(nn.Linear(3, 1)))
        return model, torch.optim.SGD(model.parameters(), lr=0.1)
    kept = [wrapped()]
    train(kept[0])
    train(made())
    """
    assert runs(bench, body) == [("Wrapper", None, 20), ("Net", None, 20)]


@pytest.mark.process
def test_trainings_of_other_classes_have_runs_of_their_own(bench: Bench) -> None:
    body = "kept = []\nfor kind in (Net, Wide, Net, Wide):\n    kept.append(made(kind)); train(kept[-1])"
    wide = "autoload-test.Wide"
    assert runs(bench, body) == [("Net", None, 20), ("Wide", wide, 20)] * 2


@pytest.mark.process
def test_models_that_were_made_before_and_train_one_after_the_other(bench: Bench) -> None:
    body = "members = [made() for _ in range(3)]\nfor each in members:\n    train(each)"
    assert [steps for *_, steps in runs(bench, body)] == [20, 19, 19], "followed after their first step"


@pytest.mark.process
def test_a_model_that_trains_again_is_attached_again(bench: Bench) -> None:
    body = """
    first, second = made(), made(Wide)
    for _ in range(2):
        train(first)
        train(second)
    """
    assert runs(bench, body)[:3] == [("Net", None, 20), ("Wide", "autoload-test.Wide", 39), ("Net", None, 19)]


@pytest.mark.process
def test_a_probe_without_a_chain_leaves_the_training_attached(bench: Bench) -> None:
    done = bench.run(
        SECOND
        + """
pair = made()
for _ in range(4):
    train(pair)
    train(made(Wide))
print("done")
""",
        REFUSE="Wide",
    )
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert done.stderr.count("not attached") == 1, "one line for all four"
    assert [note["what"] for note in bench.notes()] == ["attach", "close"]
    assert bench.notes()[-1]["steps"] == 80


@pytest.mark.process
def test_a_model_that_is_built_later_around_the_parts_is_the_root(bench: Bench) -> None:
    body = """
    parts = nn.Linear(3, 3), nn.Linear(3, 1)
    a, b = SGD(parts[0].parameters(), lr=0.1), AdamW(parts[1].parameters())
    whole = nn.ModuleList(parts)
    train(a, 1); train(b, 1)
    """
    assert attached(bench, body) == [
        ("attach", "Linear", "SGD"),
        ("close", None, None),
        ("attach", "ModuleList", "SGD"),
        ("join", "ModuleList", "AdamW"),
        ("close", None, None),
    ]


@pytest.mark.process
def test_a_model_that_is_loaded_with_its_optimizer_is_attached_at_its_first_step(bench: Bench) -> None:
    body = """
    import copy, pickle
    first = nn.Linear(3, 3)
    both = pickle.loads(pickle.dumps((first, SGD(first.parameters(), lr=0.1))))
    del first
    train(both[1], 2)
    both[1].load_state_dict(both[1].state_dict())
    copies = copy.deepcopy(both[1])
    train(both[1], 2)
    """
    assert attached(bench, body) == [
        ("attach", "Linear", "SGD"),
        ("close", None, None),
        ("attach", "Linear", "SGD"),
        ("close", None, None),
    ]


@pytest.mark.process
def test_parameters_that_become_a_model_before_the_first_step_are_attached(bench: Bench) -> None:
    body = """
    weight = nn.Parameter(torch.zeros(1))
    optimizer = SGD([weight], lr=0.1)
    model = nn.ParameterList([weight])
    train(optimizer, 2)
    """
    assert [what for what, *_ in attached(bench, body)] == ["attach", "close"]


GAN = """
import torch
from torch import nn

class Generator(nn.Sequential):
    pass

class Critic(nn.Sequential):
    pass

def made(kind):
    model = kind(nn.Linear(3, 1))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)
"""


@pytest.mark.process
def test_models_that_train_in_turn_are_runs_of_their_own(bench: Bench) -> None:
    done = bench.run(
        GAN
        + """
generator, one = made(Generator)
critic, other = made(Critic)
second, third = made(Critic)
for step in range(50):
    other.step()
    third.step()
    if step % 5 == 4:
        one.step()
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert [(note["what"], note.get("model"), note.get("run")) for note in bench.notes()] == [
        ("attach", "Generator", None),
        ("attach", "Critic", "autoload-test.Critic"),
        ("attach", "Critic", "autoload-test.Critic2"),
        *[("close", None, None)] * 3,
    ]


@pytest.mark.process
def test_the_number_of_models_is_bounded_and_one_line_says_so(bench: Bench) -> None:
    done = bench.run(
        GAN
        + f"""
made = [made(Critic) for _ in range({MAX_MODELS} + 2)]
for step in range(5):
    for _, optimizer in made:
        optimizer.step()
"""
    )
    assert [note["what"] for note in bench.notes()].count("attach") == MAX_MODELS
    assert f"more than {MAX_MODELS} models train in this process: Critic under SGD is not watched" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.process
def test_the_next_model_of_a_class_replaces_the_first_one(bench: Bench) -> None:
    bench.run(
        GAN
        + """
generator, one = made(Generator)
critic, other = made(Critic)
for step in range(5):
    one.step()
    other.step()
model, later = made(Generator)
for step in range(30):
    other.step()
    later.step()
"""
    )
    assert [(note["what"], note.get("model")) for note in bench.notes()][:3] == [
        ("attach", "Generator"),
        ("attach", "Critic"),
        ("close", None),
    ]
    assert [note["run"] for note in bench.notes() if note.get("model") == "Generator"] == [None, None]


@pytest.mark.distributed
def test_every_rank_is_attached_to_its_ddp_root_and_the_launcher_is_not(bench: Bench) -> None:
    done = bench.run(
        """
        import torch, torch.distributed as dist
        from torch import nn
        from torch.nn.parallel import DistributedDataParallel
        dist.init_process_group("gloo")
        model = DistributedDataParallel(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)))
        torch.optim.AdamW(model.parameters())
        dist.destroy_process_group()
        """,
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    )
    assert done.returncode == 0, done.stderr
    attached = [note for note in bench.notes() if note["what"] == "attach"]
    assert sorted(note["rank"] for note in attached) == ["0", "1"]
    assert {note["model"] for note in attached} == {"DistributedDataParallel"}


PYTHON = "/usr/bin/python3"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([PYTHON, "train.py"], True),
        ([PYTHON, "-u", "train.py", "torchrun"], True),
        ([PYTHON, "-X", "dev", "-m", "package.train"], True),
        ([PYTHON, "-c", "import package; package.train()"], True),
        ([PYTHON, "/home/multiprocessing/train.py"], True),
        ([PYTHON, "/usr/local/bin/torchrun", "train.py"], False),
        ([PYTHON, "-m", "torch.distributed.run", "train.py"], False),
        ([PYTHON, "-Wignore", "-m", "accelerate", "launch"], False),
        ([PYTHON, "-c", "from multiprocessing.spawn import spawn_main; spawn_main()", "--multiprocessing-fork"], True),
        ([PYTHON, "-c", "from multiprocessing.forkserver import main; main(3, 4)"], False),
        ([PYTHON, "-c", "from multiprocessing.resource_tracker import main;main(3)"], False),
        ([PYTHON, "/lib/torch/_inductor/compile_worker/__main__.py"], False),
    ],
)
def test_which_processes_may_train(argv: list[str], expected: bool) -> None:
    assert should_attach(ENDPOINT, argv, 7) is expected
    assert should_attach({**ENDPOINT, "RANK": "0"}, argv, 7) is expected
    assert not should_attach({}, argv, 7)
    assert should_attach({**ENDPOINT, "KOOPMON_ATTACHED_PID": "7"}, argv, 7) is expected
    assert should_attach({**ENDPOINT, "KOOPMON_ATTACHED_PID": "6"}, argv, 7) is expected
    assert not should_attach({**ENDPOINT, "KOOPMON_ATTACHED_PID": "6 rank"}, argv, 7)
    assert should_attach({**ENDPOINT, "KOOPMON_ATTACHED_PID": "7 rank"}, argv, 7) is expected


@pytest.mark.parametrize(
    ("mark", "named"), [("6", "job.child"), ("6 rank", "job.child"), ("7", "job"), ("7 rank", "job"), (None, "job")]
)
def test_a_child_of_an_attached_process_has_a_run_of_its_own(mark: str | None, named: str) -> None:
    environ = {"KOOPMON_RUN": "job"} | ({"KOOPMON_ATTACHED_PID": mark} if mark else {})
    for _ in range(2):
        _name_child(environ, 7)
        assert environ["KOOPMON_RUN"] == named
    nameless = {"KOOPMON_ATTACHED_PID": "6"}
    _name_child(nameless, 7)
    assert nameless == {}


@pytest.mark.process
def test_an_optimizer_that_is_made_while_another_thread_attaches_is_attached_later(bench: Bench) -> None:
    done = bench.run("""
        import threading
        import koopmon, torch
        from torch import nn
        first, second = (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)) for _ in range(2))
        attach, begun, made = koopmon.attach, threading.Event(), threading.Event()

        def slow(*args, **options):
            koopmon.attach = attach
            begun.set()
            made.wait(20)
            return attach(*args, **options)

        koopmon.attach = slow

        def train(model, optimizer):
            for _ in range(20):
                model(torch.ones(2, 3)).sum().backward()
                optimizer.step()

        thread = threading.Thread(target=lambda: train(first, torch.optim.AdamW(first.parameters())))
        thread.start()
        begun.wait(20)
        optimizer = torch.optim.AdamW(second.parameters())
        made.set()
        thread.join()
        train(second, optimizer)
    """)
    assert done.returncode == 0, done.stderr
    assert [note["what"] for note in bench.notes()].count("attach") == 2


@pytest.mark.parametrize("num_before", [0, 1])
@pytest.mark.parametrize("num_after", [0, 1, 2])
def test_an_attachment_after_a_step_leaves_the_hooks_of_that_step_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_before: int, num_after: int
) -> None:
    """torch iterates over the hooks of an optimizer while it calls them. A change of them would end the training."""
    monkeypatch.setattr(sys.modules["torch.optim.optimizer"], "_global_optimizer_post_hooks", OrderedDict())
    monkeypatch.setenv("KOOPMON_ENDPOINT", f"ipc://{tmp_path}/control")
    monkeypatch.setenv("KOOPMON_RUN", "job")
    monkeypatch.setenv(ATTACHED_PID, str(os.getpid()))
    watch, calls = OptimizerWatch(), 0

    def hook(*_: Any) -> None:
        nonlocal calls
        calls += 1

    first = build()
    idle = AdamW(first.parameters())
    watch.on_optimizer_created(idle)
    try:
        second = build()
        optimizer = AdamW(second.parameters())
        for _ in range(num_before):
            optimizer.register_step_post_hook(hook)
        watch.on_optimizer_created(optimizer)
        for _ in range(num_after):
            optimizer.register_step_post_hook(hook)
        assert [list(each.optimizers) for each in watch._attached] == [[idle]]
        for step in range(IDLE_STEPS + 1):
            train_step(second, optimizer, step)
        followed = [list(each.optimizers) for each in watch._attached]
        assert followed == [[optimizer]], "the first one does not step"
        assert calls == (num_before + num_after) * (IDLE_STEPS + 1)
    finally:
        for each in list(watch._attached):
            watch._let_go(each)
