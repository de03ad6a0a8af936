"""Target composition: any sequence of legal messages with extreme numbers, for a monitor's service without sockets.

The commands, rows, series and replies of the monitor must be valid for all numbers of its peers. An input is a sequence
of choices, one byte each: the next event, and an extreme value for each of its numbers.
"""

from __future__ import annotations

import itertools
import logging
import math
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec
import torch
from prometheus_client import CollectorRegistry

from koopmon.config import Config, RiskConfig, StoreConfig, from_mapping
from koopmon.errors import ProtocolError
from koopmon.history.writer import HistoryWriter
from koopmon.monitor.assembler import Snapshot
from koopmon.monitor.engine import Engine, Result
from koopmon.monitor.failures import Failures
from koopmon.monitor.http.live_state import LiveState
from koopmon.monitor.rejection_log import RejectionLog
from koopmon.monitor.run_controller import ControllerCheckpoint
from koopmon.monitor.service import Outputs, Service
from koopmon.risk.calibration import Calibrator
from koopmon.spectral import LayerProfile, SpectralProfile
from koopmon.spectral.profiles import FIELDS
from koopmon.telemetry.metrics import Metrics
from koopmon.wire.codec import ReceivedShard, decode, decode_for_agent, encode
from koopmon.wire.headers import UNBOUNDED_SCALARS, WireLimits
from koopmon.wire.messages import (
    DROP_REASONS,
    Ack,
    Applied,
    Command,
    Goodbye,
    Heartbeat,
    Hello,
    Message,
    MonitorMessage,
    Shard,
    TrainingStep,
)

MAX_TURNS = 40
RUNS = ("one", "two")
INCARNATIONS = ("aaaaaaaa", "bbbbbbbb")
SIZES = (0.0, 5e-324, 1e-300, 1.0, 2.0, 1e6, 1e300, sys.float_info.max)
STRANGE = (math.nan, math.inf, -math.inf)
WHOLE = (0, 1, 2, 7, 49, 50, 60, 1000, 1 << 31, 1 << 52, (1 << 53) - 1_000_001, (1 << 53) - 60, (1 << 53) - 1)
SECONDS = (0.0, 0.1, 1.5, 20.0, 400.0, 1e6)
POLICIES = ("auto", "lr", "kss", "kss+lr", "observe")
CALIBRATOR = Calibrator(
    adapter="x",
    weights=(1.0, 1.0),
    intercept=0.0,
    means=(0.0, 0.0),
    scales=(1.0, 1.0),
    highest_effective_rate=1e30,
    num_runs=20,
    num_diverged=10,
)
RANK = {"process_rank": 0, "world_size": 2, "num_senders": 2}
FRAME = bytes(2 * 2 * 2)
"""Two rows of width two in bfloat16."""
T = TypeVar("T")
Choose = Callable[[Sequence[T]], T]


class Choices:
    """Read choices from bytes; after the last byte, always the first choice."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def __call__(self, options: Sequence[T]) -> T:
        self._at += 1
        return options[(self._data[self._at - 1] if self._at <= len(self._data) else 0) % len(options)]

    @property
    def any_left(self) -> bool:
        return self._at < len(self._data)


def legal(kind: msgspec.inspect.Type, choose: Choose[Any]) -> Any:
    """Return a value that the protocol allows for `kind`, mostly one at its bounds."""
    match kind:
        case msgspec.inspect.UnionType(types=types):
            return legal(choose(types), choose)
        case msgspec.inspect.NoneType():
            return None
        case msgspec.inspect.BoolType():
            return choose((False, True))
        case msgspec.inspect.LiteralType(values=values):
            return choose(values)
        case msgspec.inspect.StrType(max_length=most):
            return choose(("", "x", "é" * (most or 1)))
        case msgspec.inspect.StructType(cls=cls):
            return made(cls, choose)
        case msgspec.inspect.DictType():
            return {}
        case msgspec.inspect.VarTupleType(item_type=item, max_length=most):
            return tuple(legal(item, choose) for _ in range(choose((0, 1, most or 1))))
        case msgspec.inspect.IntType() | msgspec.inspect.FloatType():
            return choose([*_within(kind)])
    raise AssertionError(f"no values for {kind}")


def _within(kind: msgspec.inspect.IntType | msgspec.inspect.FloatType) -> Iterator[float]:
    whole = isinstance(kind, msgspec.inspect.IntType)
    given = (kind.ge, kind.gt, kind.le, kind.lt)
    edges = [bound for bound in given if bound is not None]
    beside = [
        *(edge + side for edge in edges for side in (-1, 1)),
        *(math.nextafter(edge, math.copysign(math.inf, side)) for edge in edges for side in (-1, 1)),
    ]
    tried: list[Any] = [*(WHOLE if whole else (*SIZES, *(-size for size in SIZES))), *edges, *beside]
    for value in tried:
        if not whole or isinstance(value, int):
            low = (kind.ge is None or value >= kind.ge) and (kind.gt is None or value > kind.gt)
            if low and (kind.le is None or value <= kind.le) and (kind.lt is None or value < kind.lt):
                yield value


def made(cls: type[T], choose: Choose[Any], **fixed: Any) -> T:
    """Return a struct of this class with a legal value in each field; the first choices give its defaults."""
    kind = msgspec.inspect.type_info(cls)
    assert isinstance(kind, msgspec.inspect.StructType)
    values = {}
    for field in kind.fields:
        if field.name in fixed:
            values[field.name] = fixed[field.name]
        elif field.name == "training" and "step" in fixed:
            values[field.name] = made(TrainingStep, choose, step=fixed["step"])
        elif not field.required and choose((True, False, False)):
            continue
        elif field.name in UNBOUNDED_SCALARS:
            values[field.name] = choose((None, *STRANGE, *SIZES, *(-size for size in SIZES)))
        else:
            values[field.name] = legal(field.type, choose)
    return cls(**values)


def legal_hello(**fields: Any) -> Hello:
    """Return a valid hello of an acting agent, with `fields` replaced."""
    return made(
        Hello, lambda options: options[0], **{"acts": True, "adapter": "x", "width": 8, "applied": Applied(), **fields}
    )


def _profile(choose: Choose[Any]) -> SpectralProfile | None:
    """Return a possible result of an engine with finite numbers; None for states that are not finite."""
    num_layers = choose((0, 1, 2, 3, 70))
    if not num_layers:
        return None
    share, positive = (0.0, 0.3, 1.0), (0.0, 1e-30, 0.5, 1.0, 3.0, 700.0, 1e4, 1e38)
    wide = (*positive, sys.float_info.max)
    bounds: dict[str, Sequence[float]] = dict.fromkeys(FIELDS, share)
    bounds |= dict.fromkeys(("spectral_radius", "eigenvector_condition_number", "kreiss_constant"), positive)
    bounds |= dict.fromkeys(("nonlinearity_ratio", "update_ratio"), wide)
    bounds["update_exponent"] = (-100.0, 0.0, 1.0, 100.0)
    values = {name: choose(options) for name, options in bounds.items()}
    informative = choose((True, True, False))
    layers = tuple(
        LayerProfile(
            eigenvalues=torch.full((2,), values["spectral_radius"], dtype=torch.complex128),
            **{**values, "update_ratio": choose(wide) if index < 3 else values["update_ratio"]},
            num_samples=64,
            svd_rank=4,
            informative=informative,
            reason="" if informative else "too few samples",
        )
        for index in range(num_layers)
    )
    return SpectralProfile(layers=layers)


class _Engine:
    """Engine that keeps submitted snapshots until the next event."""

    def __init__(self) -> None:
        self.queue: deque[Snapshot] = deque()

    @property
    def queue_length(self) -> int:
        return len(self.queue)

    def submit(self, snapshot: Snapshot, *, wait: bool = False) -> list[str]:
        self.queue.append(snapshot.without_states())
        return []


class Play:
    """A monitor's service, its peers, and a clock; `choose` makes every choice. Raises for an invalid output."""

    def __init__(self, choose: Choose[Any], folder: Path) -> None:
        self.choose = choose
        self.now = 1000.0
        self.step = 0
        self.commands: list[Command] = []
        self._path = folder / "history.sqlite3"
        policy = {"name": choose(POLICIES), "act_risk": choose((0.4, 1e-9)), "release_risk": 0.0}
        tables: Mapping[str, Any] = {"policy": policy | {"cooldown_steps": 1, "hold_steps": 1}}
        self._config: Config = from_mapping(tables)
        self._store: HistoryWriter | None = None
        self.begin()

    def begin(self) -> None:
        """Start a new monitor on the same history; the run mostly reconnects."""
        self.close()
        self.metrics = Metrics(CollectorRegistry(), {})
        self._store = HistoryWriter.open(self._path, StoreConfig(max_bytes=1 << 20), clock=lambda: self.now)
        self.engine = _Engine()
        self.service = Service(
            config=self._config,
            failures=Failures(self.metrics, lambda: self.now),
            outputs=Outputs(history=self._store, metrics=self.metrics, live_state=LiveState()),
            engine=cast(Engine, self.engine),
            rejection_log=RejectionLog(self.metrics, lambda: self.now),
            send=self._sent,
            data_endpoint="ipc:///nowhere",
            calibrator=CALIBRATOR,
            clock=lambda: self.now,
            wall=lambda: 1.7e9 + self.now,
        )
        if self.choose((True, True, False)):
            self._says(legal_hello(**self._named(), **RANK))

    def close(self) -> None:
        if self._store is not None:
            self._store.close()

    def _sent(self, peer: bytes, message: MonitorMessage) -> bool:
        """Let an agent receive the command, or be away."""
        assert decode_for_agent(encode(message), limits=WireLimits()) == message
        if isinstance(message, Command):
            self.commands.append(message)
        return bool(self.choose((True, True, False)))

    def turn(self) -> str:
        """Run one event and return its name."""
        happens = (
            *(self.shard, self.result, self.hello, self.ack, self.heartbeat, self.result, self.shard, self.pass_time),
            *(self.goodbye, self.begin),
        )
        happening: Callable[[], None] = self.choose(happens)
        try:
            happening()
        except ProtocolError as error:
            return f"{happening.__name__} refused: {error.reason}"
        self.service.tick()
        assert self.service.next_deadline() > -math.inf
        return happening.__name__

    def check(self) -> None:
        """Check that every series has a number, no internal error was confined, and a restart finds its records."""
        for family in self.metrics.collect():
            for sample in family.samples:
                assert math.isfinite(sample.value), sample
                quiet = family.name not in ("koopmon_internal_errors", "koopmon_store_lost", "koopmon_engine_failures")
                assert quiet or sample.value == 0.0, sample
        assert self._store is not None
        for run, incarnation in itertools.product(RUNS, INCARNATIONS):
            if (memory := self._store.launches.memory(run, incarnation)) is not None:
                msgspec.json.decode(memory, type=ControllerCheckpoint)

    def pass_time(self) -> None:
        self.now += self.choose(SECONDS)

    def hello(self) -> None:
        fields = {name: self.choose((0.0, 1e-6, 0.5, 1e6, sys.float_info.max)) for name in self._hinted()}
        rank = self.choose((0, 1))
        self._says(made(Hello, self.choose, **self._name(), **{**RANK, "process_rank": rank}, thresholds=fields))

    def _hinted(self) -> Sequence[str]:
        names = RiskConfig.__struct_fields__
        return self.choose(((), names, names[:3]))  # type: ignore[no-any-return]

    def heartbeat(self) -> None:
        dropped = {reason: self.choose((0, 1, (1 << 53) - 1)) for reason in self.choose(((), DROP_REASONS))}
        self._says(made(Heartbeat, self.choose, **self._name(), process_rank=self.choose((0, 1)), dropped=dropped))

    def ack(self) -> None:
        command = self.choose((None, *self.commands[-3:]))
        name = self._name() if command is None else self._named(command.run, command.incarnation)
        known = "f" * 8 if command is None else command.id
        self._says(made(Ack, self.choose, **name, command_id=known))

    def goodbye(self) -> None:
        self._says(made(Goodbye, self.choose, **self._name(), process_rank=self.choose((0, 1))))

    def shard(self) -> None:
        points, paired = self.choose(((2, False), (3, False), (71, False), (2, True), (70, True)))
        values = [self.choose((None, 0.0, -1e300, sys.float_info.max))] * (points // 2 if paired else points - 1)
        observed = dict.fromkeys(self.choose(((), ("a", "b"))), values)
        shape = {"num_points": points, "num_samples": 2, "width": 2, "dtype": "bfloat16", "first_point": 0}
        senders = {"process_rank": self.choose((0, 1)), "num_senders": self.choose((1, 1, 2)), "last_stage": True}
        shape["paired"] = paired
        header = made(Shard, self.choose, **self._name(), **shape, **senders, observables=observed)
        received = decode(encode(header, [FRAME] * points), limits=WireLimits())
        assert isinstance(received, ReceivedShard)
        self.service.on_shard(received)

    def result(self) -> None:
        if self.engine.queue:
            self.service.on_result(Result(self.engine.queue.popleft(), _profile(self.choose), 0.1))

    def _named(self, run: str = RUNS[0], incarnation: str = INCARNATIONS[0]) -> dict[str, Any]:
        """Choose the sender of a message and a step, mostly the next one."""
        self.step += 1
        return {"run": run, "incarnation": incarnation, "step": self.choose((*[self.step] * 12, *WHOLE))}

    def _name(self) -> dict[str, Any]:
        run, incarnation = (
            self.choose((*[RUNS[0]] * 5, RUNS[1])),
            self.choose((*[INCARNATIONS[0]] * 7, INCARNATIONS[1])),
        )
        return self._named(run, incarnation)

    def _says(self, message: Message) -> None:
        said = decode(encode(cast(Any, message)), limits=WireLimits())
        rank = getattr(message, "process_rank", 0)
        self.service.on_control(f"{message.run}/{rank}".encode(), cast(Any, said))


_folder = Path(tempfile.mkdtemp(prefix="koopmon-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
logging.getLogger("koopmon").addHandler(logging.NullHandler())


def seeds() -> Iterator[bytes]:
    yield bytes(200)
    yield bytes([0, 0, 2] + [0] * 60 + [0] * 40 + [1] + [0] * 40)
    for first in range(10):
        yield bytes((first + 7 * place) % 251 for place in range(400))


def run(data: bytes) -> str:
    for path in _folder.iterdir():
        path.unlink()
    choices = Choices(data)
    play = Play(choices, _folder)
    told = "nothing"
    try:
        for _ in range(MAX_TURNS):
            if not choices.any_left:
                break
            told = play.turn()
            play.check()
    finally:
        play.close()
    return told


def close() -> None:
    shutil.rmtree(_folder, ignore_errors=True)
