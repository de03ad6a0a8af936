"""Choice of a device, with simulated GPUs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from koopmon.errors import ConfigError
from koopmon.monitor.engine import check_device, choose_device

Gpus = Callable[..., None]


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gpus:
    """Simulate GPUs: MiB in use by letter, and the visible ones of CUDA, in its order."""

    def pretend(used: dict[str, str], visible: str, status: int = 0) -> None:
        script = tmp_path / "nvidia-smi"
        lines = "".join(f"echo 'GPU-{name}, {memory}'\n" for name, memory in used.items())
        script.write_text(f"#!/bin/sh\n{lines}exit {status}\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(visible))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=visible[index]))

    return pretend


def test_devices_are_checked_by_name(gpus: Gpus) -> None:
    gpus({}, "")
    assert [check_device(name) for name in ("cpu", "auto")] == ["cpu", "auto"]
    for name in ("cuda", "cuda:0", "gpu", "cuda:-1", "cuda:0x1", "", "CPU"):
        with pytest.raises(ConfigError, match=r"auto, cpu and cuda:N \(no CUDA device is present\)"):
            check_device(name)
    gpus({}, "ab")
    assert check_device("cuda:1") == "cuda:1"
    with pytest.raises(ConfigError, match=r"device = 'cuda:2': .*\(cuda:0 to cuda:1\)"):
        check_device("cuda:2")
    assert choose_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.process
def test_auto_takes_the_device_that_nobody_uses(gpus: Gpus) -> None:
    gpus({"a": "70000", "b": "4", "c": "12"}, "cba")
    assert choose_device("auto") == torch.device("cuda", 1), "by its own number, not by nvidia-smi's"


@pytest.mark.process
def test_auto_takes_the_first_of_equals(gpus: Gpus) -> None:
    gpus({"a": "4", "b": "4"}, "ab")
    assert choose_device("auto") == torch.device("cuda", 0)


@pytest.mark.process
@pytest.mark.parametrize(
    ("used", "visible", "status"),
    [
        ({"a": "70000", "b": "513"}, "ab", 0),
        ({"a": "70000", "b": "4"}, "a", 0),
        ({"a": "[N/A]"}, "a", 0),
        ({}, "a", 0),
        ({"a": "4"}, "a", 1),
        ({"a": "4"}, "", 0),
    ],
)
def test_auto_is_the_cpu_when_no_device_is_spare(gpus: Gpus, used: dict[str, str], visible: str, status: int) -> None:
    gpus(used, visible, status)
    assert choose_device("auto") == torch.device("cpu")


@pytest.mark.process
def test_auto_without_nvidia_smi_is_the_cpu(gpus: Gpus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpus({}, "a")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert choose_device("auto") == torch.device("cpu")
