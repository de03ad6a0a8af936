"""Inspection of a job's command line and environment before its start."""

from __future__ import annotations

from pathlib import Path

import pytest

from koopmon.cli.launch_inspection import isolation, script_name, spread, state_directory


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("torchrun --nnodes 2 train.py", "--nnodes 2"),
        ("torchrun --nnodes=1:4 train.py", "--nnodes 1:4"),
        ("python -m torch.distributed.run --nnodes 3 -m package.train", "--nnodes 3"),
        ("/opt/bin/torchrun --nproc-per-node 8 --nnodes 2 train.py", "--nnodes 2"),
        ("accelerate launch --num_machines 2 train.py", "--num-machines 2"),
        ("deepspeed --num_nodes 2 train.py", "--num-nodes 2"),
        ("torchrun --nnodes 1 train.py", None),
        ("torchrun --nnodes 1:1 train.py", None),
        ("torchrun --nproc-per-node 8 train.py --nnodes 2", None),
        ("python train.py --nnodes 2", None),
        ("torchrun train.py", None),
    ],
)
def test_nodes_on_the_command_line(command: str, said: str | None) -> None:
    assert spread(command.split(), {}) == said


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("sbatch job.sh", "sbatch starts it elsewhere; or put koopmon run into the batch script"),
        ("srun --ntasks 2 python train.py", "srun outside of an allocation starts it elsewhere"),
    ],
)
def test_what_slurm_would_start_elsewhere(command: str, said: str) -> None:
    assert spread(command.split(), {}) == said


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("srun -N 2 python train.py", "srun -N 2"),
        ("srun -N4 python train.py", "srun -N 4"),
        ("srun --nodes=2-3 python train.py", "srun --nodes 2-3"),
        ("/usr/bin/srun --nodes 2 python train.py", "srun --nodes 2"),
        ("srun -N 1 --ntasks 8 python train.py", None),
        ("srun --ntasks=8 python train.py -N 2", None),
    ],
)
def test_nodes_of_a_step_inside_an_allocation(command: str, said: str | None) -> None:
    assert spread(command.split(), {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1"}) == said


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"SLURM_NNODES": "2"}, "SLURM_NNODES=2"),
        ({"SLURM_JOB_NUM_NODES": "4"}, "SLURM_JOB_NUM_NODES=4"),
        ({"PET_NNODES": "1:2"}, "PET_NNODES=1:2"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS=2"),
        ({"SLURM_NNODES": "1", "WORLD_SIZE": "1"}, None),
        ({"SLURM_NNODES": ""}, None),
    ],
)
def test_nodes_and_ranks_in_the_environment(environ: dict[str, str], said: str | None) -> None:
    assert spread(["torchrun", "train.py"], environ) == said


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("torchrun --nproc-per-node 2 path/to/train.py --x y.py", "train"),
        ("python -m torch.distributed.run -m package.pretrain", "pretrain"),
        ("python -m package.train", "train"),
        ("/usr/bin/env true", "env"),
        ("bash ./-weird_name!.py", "-weird_name!"),
    ],
)
def test_the_name_is_the_scripts(command: str, name: str) -> None:
    assert script_name(command.split()) == name


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("python -I train.py", "-I"),
        ("/opt/bin/python3.11 -u -E train.py", "-E"),
        ("env A=1 python3 -Su train.py", "-S"),
        ("python -W ignore -I -m train", "-I"),
        ("python -Wignore -X dev train.py -I", ""),
        ("python -Imtrain", "-I"),
        ("python -m train -I", ""),
        ("python -c IES -S", ""),
        ("python -u train.py", ""),
        ("python - -I", ""),
        ("torchrun --nproc-per-node 2 train.py -I", ""),
        ("pythonic -I x", ""),
        ("python", ""),
    ],
)
def test_an_isolated_python_is_found(command: str, option: str) -> None:
    assert isolation(command.split()) == option


def test_the_state_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    default = Path.home() / ".local" / "state"
    for base, expected in (("/s", Path("/s")), ("", default), ("relative", default)):
        monkeypatch.setenv("XDG_STATE_HOME", base)
        assert state_directory() == expected / "koopmon"
