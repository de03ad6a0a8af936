"""A slice of `python -m benchmarks.fuzz`: the kept corpus, and a short search in each target."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fuzz.__main__ import CORPUS, TARGETS, main

GUIDED = TARGETS[:-1]
SECONDS = 4
EXECUTIONS = {name: 150 if name == "composition" else 1500 for name in GUIDED}
"""Numbers of inputs instead of a time, so that the search is the same on every machine. `make prove` searches on."""


@pytest.fixture(params=GUIDED)
def harness(request: pytest.FixtureRequest) -> Iterator[Any]:
    module = importlib.import_module(f"benchmarks.fuzz.{request.param}")
    yield module
    getattr(module, "close", lambda: None)()


def test_the_kept_corpus_breaks_nothing(harness: Any) -> None:
    name = harness.__name__.rpartition(".")[2]
    inputs = [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
    assert len({harness.run(data) for data in [*harness.seeds(), *inputs]}) > 1, "some are taken, some refused"


def test_the_codec_harness_sees_a_codec_that_lets_something_through(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = importlib.import_module("benchmarks.fuzz.codec")

    def careless(frames: Any, limits: Any) -> Any:
        raise ValueError("not a ProtocolError")

    monkeypatch.setattr(codec, "RECEIVERS", (careless,))
    with pytest.raises(ValueError, match="not a ProtocolError"):
        codec.run(next(codec.seeds()))


def test_frames_and_their_input_are_each_other() -> None:
    codec = importlib.import_module("benchmarks.fuzz.codec")
    frames = [b"", b"a" * 300, b"\0"]
    assert codec.unpack(codec.pack(7, frames)) == (7, frames)
    mutated = {codec.mutate(codec.pack(0, frames), 4096, seed, lambda piece, _: piece[::-1]) for seed in range(50)}
    assert len(mutated) > 10


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_moment_of_fuzzing(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if target in GUIDED and importlib.util.find_spec("atheris") is None:
        if os.environ.get("REQUIRE_ALL") == "1":
            pytest.fail("needs atheris, which is not installed, and REQUIRE_ALL=1", pytrace=False)
        pytest.skip("needs atheris, which is not installed")
    monkeypatch.chdir(tmp_path)  # directory for an input that breaks something
    out = tmp_path / "fuzz.json"
    bound = (
        ["--executions", str(EXECUTIONS[target]), "--seconds", "60"]
        if target in GUIDED
        else ["--seconds", str(SECONDS)]
    )
    assert main(["--target", target, *bound, "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["targets"].values()
    assert row["crashes"] == 0
    assert row["executions"] > 0
