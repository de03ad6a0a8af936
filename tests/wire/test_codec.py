"""Codec: messages survive a round trip, and anything else is a ProtocolError at low cost."""

from __future__ import annotations

import math
import tracemalloc
import weakref
from typing import Any

import msgspec
import msgspec.inspect as inspect
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from koopmon.errors import ProtocolError
from koopmon.wire.codec import DTYPES, ReceivedShard, decode, decode_for_agent, decode_for_monitor, decode_shard, encode
from koopmon.wire.headers import PREFIX, REJECTION_REASONS, UNBOUNDED_SCALARS, WireLimits
from koopmon.wire.messages import (
    PROTOCOL_VERSION,
    Ack,
    AgentMessage,
    AnyMessage,
    Applied,
    Command,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Hello,
    KssSettings,
    MonitorMessage,
    Rewind,
    Shard,
    TrainingStep,
    Welcome,
)
from tests.factories import gathered

LIMITS = WireLimits()
WHO: dict[str, Any] = {"run": "job/1", "incarnation": "00c0ffee"}
DECODERS = (decode, decode_for_agent, decode_for_monitor, decode_shard)
PAYLOAD = {
    "set_lr_scale": {"lr_scale", "max_rate"},
    "set_kss": {"kss"},
    "set_cadence": {"cadence_steps", "cadence_until_step"},
    "set_ceilings": {"ceilings"},
    "rewind": {"rewind"},
}


def values(kind: inspect.Type) -> st.SearchStrategy[Any]:
    """Draw any value of a field's type, bounds included."""
    match kind:
        case inspect.UnionType(types=types):
            return st.one_of(*map(values, types))
        case inspect.NoneType():
            return st.none()
        case inspect.BoolType():
            return st.booleans()
        case inspect.LiteralType(values=choices):
            return st.sampled_from(choices)
        case inspect.StructType(cls=cls):
            return messages(cls)
        case inspect.DictType(key_type=key, value_type=value, max_length=most):
            return st.dictionaries(values(key), values(value), max_size=min(most or 4, 4))
        case inspect.ListType(item_type=item):
            return st.lists(values(item), max_size=4)
        case inspect.VarTupleType(item_type=item, max_length=most):
            return st.lists(values(item), max_size=min(most or 4, 4)).map(tuple)
        case inspect.StrType(pattern=str(pattern)):
            return st.from_regex(pattern).filter(lambda text: len(text) <= 128)
        case inspect.StrType(min_length=least, max_length=most):
            return st.text(st.characters(codec="utf-8"), min_size=least or 0, max_size=most)
        case inspect.IntType(ge=least, le=most, lt=below):
            return st.integers(least, below - 1 if most is None else most)
        case inspect.FloatType(ge=least, gt=above, le=most):
            bounded = {
                "min_value": above if least is None else least,
                "max_value": most,
                "exclude_min": above is not None,
            }
            return st.floats(**bounded, allow_nan=False, allow_infinity=False)
    raise AssertionError(f"no values for {kind}")


@st.composite
def messages(draw: st.DrawFn, struct: type[msgspec.Struct]) -> Any:
    fields = {}
    for field in inspect.type_info(struct).fields:
        strategy = values(field.type)
        if field.name in UNBOUNDED_SCALARS:
            strategy = st.floats() if field.required else st.none() | st.floats()
        fields[field.name] = draw(strategy)
    if struct is Shard:
        fields["num_points"] = draw(st.integers(1, 5))
        fields["first_point"] = draw(st.integers(0, 4092))
        if fields["paired"]:
            fields |= {name: 2 * (fields[name] // 2) for name in ("num_points", "first_point")}
            fields["num_points"] = max(2, fields["num_points"])
        num_layers = fields["num_points"] // 2 if fields["paired"] else fields["num_points"] - 1
        layers = values(inspect.type_info(float | None))
        rows = st.lists(layers, min_size=num_layers, max_size=num_layers)
        fields["observables"] = {name: draw(rows) for name in fields["observables"]}
    if struct is Hello:
        fields["world_size"] = max(fields["world_size"], fields["process_rank"] + 1)
    if struct is Command:
        for kind, names in PAYLOAD.items():
            fields.update(dict.fromkeys(names) if kind != fields["kind"] else {})
        if fields["kind"] == "set_lr_scale":
            fields["lr_scale"] = draw(st.floats(0.0, 1.0, exclude_min=True))
        if fields["max_rate"] is None:
            fields["warmup_steps"] = 0
        if fields["kind"] == "set_kss":
            fields["kss"] = draw(messages(KssSettings))
        if fields["kind"] == "set_cadence":
            fields["cadence_steps"] = draw(st.integers(1, 100_000))
        if fields["kind"] == "set_ceilings":
            fields["ceilings"] = fields["ceilings"] or {}
        else:
            fields["corrects"] = False
        if fields["kind"] == "rewind":
            fields["rewind"] = draw(messages(Rewind))
    return struct(**fields)


@st.composite
def shards(draw: st.DrawFn) -> tuple[Shard, list[bytes]]:
    header = draw(messages(Shard))
    small = {name: draw(st.integers(1, 5)) for name in ("num_samples", "width")}
    header = msgspec.structs.replace(header, **small)
    nbytes = small["num_samples"] * small["width"] * DTYPES[header.dtype].itemsize
    return header, [draw(st.binary(min_size=nbytes, max_size=nbytes)) for _ in range(header.num_points)]


def same(left: msgspec.Struct, right: msgspec.Struct) -> bool:
    """Compare with NaN equal to itself."""
    return type(left) is type(right) and msgspec.msgpack.encode(left) == msgspec.msgpack.encode(right)


def shard(**changes: Any) -> Shard:
    fields = {"first_point": 0, "num_points": 2, "num_samples": 3, "width": 4, "dtype": "float32", **changes}
    return Shard(**WHO, process_rank=0, num_senders=1, **gathered({"step": 7, **fields}))


def command(**fields: Any) -> Command:
    return Command(**WHO, id="0123abcd", reason="r", expires_step=9, **fields)


def rejected(frames: list[Any], limits: WireLimits = LIMITS, decoder: Any = decode) -> ProtocolError:
    with pytest.raises(ProtocolError) as caught:
        decoder(frames, limits=limits)
    assert caught.value.reason in REJECTION_REASONS
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300
    return caught.value


def packed(**fields: Any) -> bytes:
    return PREFIX + msgspec.msgpack.encode(fields)


@pytest.mark.parametrize("struct", [s for s in AnyMessage.__args__ if s is not Shard], ids=lambda s: s.__name__)
def test_every_message_survives_the_wire(struct: type[msgspec.Struct]) -> None:
    @given(messages(struct))
    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def check(message: Any) -> None:
        frames = encode(message)
        assert len(frames) == 1
        assert len(frames[0]) <= LIMITS.max_header_bytes
        mine, other = decode_for_agent, decode_for_monitor
        if struct in AgentMessage.__args__:
            mine, other = other, mine
        assert same(decode(frames, limits=LIMITS), message)
        assert same(mine(frames, limits=LIMITS), message)
        assert rejected(frames, decoder=other).reason == "direction"
        assert rejected(frames, decoder=decode_shard).reason == "direction"

    check()


@given(shards())
@settings(max_examples=60, deadline=None)
def test_every_shard_survives_the_wire(sent: tuple[Shard, list[bytes]]) -> None:
    header, raw = sent
    frames = encode(header, raw)
    received = decode_shard(frames, limits=LIMITS)
    assert same(received.header, header)
    assert [bytes(frame) for frame in received.frames] == raw
    assert torch.stack(received.points()).view(torch.uint8).numpy().tobytes() == b"".join(raw)
    assert rejected(frames, decoder=decode_for_agent).reason == "direction"
    assert rejected(frames, decoder=decode_for_monitor).reason == "direction"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_states_keep_shape_dtype_and_bits(dtype: str, offset: int) -> None:
    states = torch.randn(2, 3, 4).to(DTYPES[dtype])
    states[0, 0, :3] = torch.tensor([math.nan, math.inf, -0.0])
    header, *frames = encode(shard(dtype=dtype), states)
    # The transport's buffers need not be aligned; bytes are read-only.
    shifted = [memoryview(bytearray(offset) + frame)[offset:] for frame in map(bytes, frames)]
    for received in (decode_shard([header, *shifted], limits=LIMITS), decode_shard([header, *frames], limits=LIMITS)):
        bits = states.view(torch.uint8)
        assert torch.stack(received.points()).shape == (2, 3, 4)
        assert torch.stack(received.points()).dtype == DTYPES[dtype]
        assert torch.equal(torch.stack(received.points()).view(torch.uint8), bits)
        assert torch.equal(torch.stack(received.points()).view(torch.uint8), bits)
    assert torch.equal(
        decode_shard([header, *map(bytes, frames)], limits=LIMITS).points()[1].view(torch.uint8), bits[1]
    )


def test_nothing_is_copied_on_the_way() -> None:
    states = torch.randn(2, 3, 4)
    frames = encode(shard(), states)
    received = decode_shard(frames, limits=LIMITS)
    assert [point.data_ptr() for point in received.points()] == [states[0].data_ptr(), states[1].data_ptr()]
    states.zero_()
    assert not received.points()[0].any()


def test_received_memory_lives_as_long_as_a_view_of_it() -> None:
    class Buffer(bytearray):
        """A bytearray with weak references."""

    buffer = Buffer(48)
    watch = weakref.ref(buffer)
    header, frame = encode(shard(num_points=1), [memoryview(buffer)])
    received = decode_shard([header, frame], limits=LIMITS)
    del buffer, frame
    points = received.points()
    del received
    assert watch() is not None
    assert points[0].shape == (3, 4)
    del points
    assert watch() is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_news(value: float) -> None:
    training = TrainingStep(step=1, loss=value, grad_norm=value, learning_rate=value)
    beat = Heartbeat(**WHO, process_rank=0, training=training, applied=Applied())
    received = decode_for_monitor(encode(beat), limits=LIMITS)
    assert same(received, beat)
    frames = encode(shard(loss=value), torch.zeros(2, 3, 4))
    assert same(decode_shard(frames, limits=LIMITS).header, shard(loss=value))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("field", ["overhead_ratio", "step_seconds"])
def test_any_other_number_must_be_finite(field: str, value: float) -> None:
    beat = Heartbeat(**WHO, process_rank=0, training=TrainingStep(step=1), applied=Applied())
    with pytest.raises(ProtocolError, match=f"^schema: .*{field}"):
        encode(msgspec.structs.replace(beat, **{field: value}))
    raw = {**msgspec.to_builtins(beat), field: value}
    assert field in rejected([packed(**raw)]).detail
    hello = Hello(
        **WHO, process_rank=0, world_size=1, num_senders=1, adapter="", num_layers=0, width=0, acts=True, step=0,
        applied=Applied(), koopmon_version="", torch_version="", thresholds={"x": value},
    )  # fmt: skip
    with pytest.raises(ProtocolError, match=r"^schema: .*thresholds"):
        encode(hello)


@pytest.mark.parametrize(
    ("message", "names"),
    [
        (command(kind="set_lr_scale"), "lr_scale"),
        (command(kind="stop", lr_scale=0.5), "lr_scale"),
        (command(kind="set_lr_scale", lr_scale=0.5, kss=KssSettings()), "kss"),
        (command(kind="set_kss"), "kss"),
        (command(kind="set_ceilings"), "ceilings"),
        (command(kind="set_cadence", cadence_steps=1, ceilings={}), "ceilings"),
        (command(kind="set_cadence", cadence_steps=1, corrects=True), "corrects"),
        (command(kind="set_ceilings", ceilings={0: 0.0}), "> 0.0"),
        (command(kind="set_ceilings", ceilings={0: 2.1}), "<= 2.0"),
        (command(kind="set_ceilings", ceilings={0: math.nan}), "0.0"),
        (command(kind="set_ceilings", ceilings={4096: 1.0}), "<"),
        (command(kind="set_ceilings", ceilings=dict.fromkeys(range(33), 1.0)), "length <= 32"),
        (command(kind="set_cadence", cadence_until_step=9), "cadence_steps"),
        (command(kind="stop", cadence_until_step=9), "cadence_until_step"),
        (command(kind="set_lr_scale", lr_scale=1.5), "lr_scale"),
        (command(kind="set_lr_scale", lr_scale=0.0), "lr_scale"),
        (command(kind="set_lr_scale", max_rate=0.1), "lr_scale"),
        (command(kind="set_lr_scale", lr_scale=1.0, max_rate=0.0), "max_rate"),
        (command(kind="set_lr_scale", lr_scale=1.0, max_rate=math.inf), "max_rate"),
        (command(kind="set_lr_scale", lr_scale=1.0, warmup_steps=5), "warmup_steps"),
        (command(kind="stop", max_rate=0.1), "max_rate"),
        (command(kind="rewind"), "rewind"),
        (command(kind="stop", rewind=Rewind(max_rate=0.1, min_age_steps=0)), "rewind"),
        (command(kind="rewind", rewind=Rewind(max_rate=0.0, min_age_steps=0)), "max_rate"),
        (command(kind="rewind", rewind=Rewind(max_rate=0.1, min_age_steps=-1)), "min_age_steps"),
        (command(kind="jump"), "jump"),
        (Goodbye(run="a\n", incarnation="00c0ffee", process_rank=0, step=0), "run"),
        (Goodbye(run="", incarnation="00c0ffee", process_rank=0, step=0), "run"),
        (Goodbye(run="a", incarnation="XYZ", process_rank=0, step=0), "incarnation"),
        (Goodbye(**WHO, process_rank=-1, step=0), "process_rank"),
        (Welcome(**WHO, data_endpoint="x" * 257), "data_endpoint"),
        (shard(first_point=4096, num_points=2), "4097"),
        (shard(paired=True, num_points=3), "3 points from 0 are no pairs: both numbers must be even"),
        (shard(paired=True, first_point=1), "2 points from 1 are no pairs"),
        (shard(paired=True, observables={"router_entropy": []}), "router_entropy has 0 values for 1 transitions"),
        (shard(dtype="float64"), "float64"),
        (shard(observables={"router_entropy": [0.5, 0.5]}), "router_entropy has 2 values for 1 transitions"),
        (shard(observables={"router_entropy": []}), "router_entropy has 0 values"),
        (shard(observables={"Entropy": [0.5]}), "observables"),
        (shard(observables={"a" * 41: [0.5]}), "observables"),
        (shard(observables={f"a{index}": [0.5] for index in range(9)}), "observables"),
        (shard(observables={"router_entropy": [math.inf]}), "observables"),
        (shard(num_points=2050, observables={name: [None] * 2049 for name in "ab"}), "exceed 4096"),
    ],
)
def test_a_sender_refuses_what_a_receiver_would(message: Any, names: str) -> None:
    with pytest.raises(ProtocolError, match=f"^schema: .*{names}"):
        encode(message)
    assert rejected([PREFIX + msgspec.msgpack.encode(message)]).reason == "schema"


@pytest.mark.parametrize(
    "tensors",
    [
        torch.zeros(1, 3, 4),
        torch.zeros(3, 3, 4),
        torch.zeros(2, 4, 3),
        torch.zeros(2, 12),
        torch.zeros(2, 3, 4, dtype=torch.float16),
        torch.zeros(2, 3, 4, dtype=torch.int32),
        torch.zeros(2, 4, 3).transpose(1, 2),
        torch.zeros(2, 3, 8)[:, :, ::2],
        torch.zeros(2, 3, 4, device="meta"),
        [bytes(48), bytes(47)],
        [bytes(48), bytes(49)],
        [bytes(48)],
    ],
    ids=range(12),
)
def test_tensors_must_fit_their_header(tensors: Any) -> None:
    with pytest.raises(ProtocolError, match=r"^shape: "):
        encode(shard(), tensors)


def test_a_tensor_that_requires_gradients_can_be_sent() -> None:
    states = torch.randn(2, 3, 4, requires_grad=True)
    assert torch.equal(torch.stack(decode_shard(encode(shard(), states), limits=LIMITS).points()), states.detach())


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_one_tensor_has_the_frames_of_its_points(cut: bool) -> None:
    states = torch.randn(2, 5, 4)[:, :3] if cut else torch.randn(2, 3, 4)
    frames = encode(shard(), states)
    assert frames == encode(shard(), list(states))
    assert [bytes(frame) for frame in frames[1:]] == [point.numpy().tobytes() for point in states]


def test_only_shards_carry_tensors() -> None:
    beat = HeartbeatReply(**WHO)
    with pytest.raises(ProtocolError, match=r"^shape: "):
        encode(beat, [bytes(4)])
    assert rejected([*encode(beat), b"x"]).reason == "shape"


@pytest.mark.parametrize("theirs", [0, PROTOCOL_VERSION + 1, 255])
def test_another_version_says_who_must_upgrade(theirs: int) -> None:
    frame = encode(HeartbeatReply(**WHO))[0]
    error = rejected([frame[:7] + bytes([theirs]) + frame[8:]])
    assert error.reason == "version"
    assert f"version {theirs}, this side {PROTOCOL_VERSION}" in error.detail
    assert error.detail.endswith("the peer's side" if theirs < PROTOCOL_VERSION else "this side")


NESTED = PREFIX + b"\x82\xa1x" + b"\x91" * 60_000


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([], "garbage"),
        ([b""], "garbage"),
        ([b"GET / HTTP/1.1\r\n\r\n"], "garbage"),
        ([PREFIX[:7]], "garbage"),
        ([PREFIX], "garbage"),
        ([PREFIX + b"\xc1"], "garbage"),
        ([packed(type="heartbeat_reply", **WHO) + b"\0"], "garbage"),
        ([packed(type="heartbeat_reply", **WHO)[:-1]], "garbage"),
        ([NESTED], "garbage"),
        ([packed()], "schema"),
        ([packed(type="nobody", **WHO)], "schema"),
        ([packed(type="heartbeat_reply", run="a")], "schema"),
        ([packed(type="heartbeat_reply", **WHO, **{"evil\n\x1b[31m" + "x" * 900: 1})], "schema"),
        ([packed(type="goodbye", **WHO, process_rank="0", step=0)], "schema"),
        ([packed(type="goodbye", **WHO, process_rank=1 << 20, step=0)], "schema"),
        ([PREFIX + msgspec.msgpack.encode([1, 2])], "schema"),
    ],
)
def test_what_is_no_message_is_rejected_with_its_reason(frames: list[bytes], reason: str) -> None:
    assert rejected(frames).reason == reason


@pytest.mark.parametrize(
    ("limits", "frames"),
    [
        (WireLimits(max_frames=2), encode(shard(), torch.zeros(2, 3, 4))),
        (WireLimits(max_message_bytes=200), encode(shard(), torch.zeros(2, 3, 4))),
        (WireLimits(max_header_bytes=64), encode(shard(), torch.zeros(2, 3, 4))),
        (LIMITS, [PREFIX + bytes(1 << 16)]),
    ],
)
def test_limits(limits: WireLimits, frames: list[Any]) -> None:
    assert rejected(frames, limits).reason == "size"


HUGE = b"\xff\xff\xff\xff"
GIANT = msgspec.to_builtins(shard(num_points=4097, num_samples=1 << 20, width=1 << 20))


@pytest.mark.parametrize(
    "frames",
    [
        [packed(**GIANT), *[b""] * 4097],
        *([PREFIX + claim + HUGE] for claim in (b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9")),
        *([PREFIX + b"\x82\xa4type\xa5shard\xa3run" + claim + HUGE] for claim in (b"\xdb", b"\xdd")),
        [PREFIX + b"\x82\xa4type\xa5hello\xaathresholds\xdf" + HUGE + b"\xa1a\xcb" + bytes(8)],
        [NESTED],
    ],
    ids=lambda frames: repr(frames[0][:28]),
)
def test_claims_of_size_allocate_nothing(frames: list[bytes]) -> None:
    tracemalloc.start()
    try:
        rejected(frames)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


@given(st.lists(st.binary(max_size=64) | st.binary(max_size=64).map(PREFIX.__add__), max_size=4))
@example([PREFIX + b"\x81\xa4type\xa1\xff"])
@example([PREFIX + b"\x81\xa1\xff\xc0"])
@settings(max_examples=500, deadline=None)
def test_arbitrary_bytes_raise_nothing_but_protocol_errors(frames: list[bytes]) -> None:
    for decoder in DECODERS:
        rejected(frames, decoder=decoder)


@st.composite
def damaged(draw: st.DrawFn) -> list[bytes]:
    if draw(st.booleans()):
        header, raw = draw(shards())
        frames = [bytearray(frame) for frame in encode(header, raw)]
    else:
        sent = draw(st.sampled_from([s for s in AnyMessage.__args__ if s is not Shard]).flatmap(messages))
        frames = [bytearray(frame) for frame in encode(sent)]
    for _ in range(draw(st.integers(1, 4))):
        if not frames:
            break
        frame = frames[draw(st.integers(0, len(frames) - 1)) if draw(st.booleans()) else 0]
        at = draw(st.integers(0, max(0, len(frame) - 1)))
        match draw(st.sampled_from(["flip", "truncate", "insert", "drop", "repeat"])):
            case "flip" if frame:
                frame[at] ^= 1 << draw(st.integers(0, 7))
            case "truncate":
                del frame[at:]
            case "insert":
                frame[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "drop":
                frames = [each for each in frames if each is not frame]
            case "repeat":
                frames.append(frame)
    return [bytes(frame) for frame in frames]


@given(damaged())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_damaged_messages_are_rejected_or_still_messages(frames: list[bytes]) -> None:
    for decoder in DECODERS:
        try:
            message = decoder(frames, limits=LIMITS)
        except ProtocolError:
            rejected(frames, decoder=decoder)
            continue
        if isinstance(message, ReceivedShard):
            header = message.header
            assert torch.stack(message.points()).shape == (header.num_points, header.num_samples, header.width)
        else:
            assert isinstance(message, AgentMessage | MonitorMessage)
            assert same(decode(encode(message), limits=LIMITS), message)


def test_ack_answers_a_command() -> None:
    sent = command(kind="set_kss", kss=KssSettings(alpha=0.5), ramp_steps=3)
    got = decode_for_agent(encode(sent), limits=LIMITS)
    assert isinstance(got, Command)
    answer = Ack(**WHO, command_id=got.id, outcome="applied", step=8, applied=Applied(kss=got.kss or KssSettings()))
    assert decode_for_monitor(encode(answer), limits=LIMITS) == answer


UNENCODABLE: list[AnyMessage] = [
    *(Goodbye(**WHO, process_rank=0, step=step) for step in (-1, 1 << 53, 1 << 63, 1 << 64, 1 << 200)),
    *(Goodbye(**WHO, process_rank=0, step=1, reason=text) for text in ("\ud800", "x" * 513)),
    Welcome(**WHO, data_endpoint="ipc:///x", heartbeat_seconds=math.inf),
    Welcome(**WHO, data_endpoint="ipc:///x", restore=Applied(lr_scale=0.0)),
    HeartbeatReply(**WHO, judgement={1, 2}),  # type: ignore[arg-type]
    Heartbeat(**WHO, process_rank=0, training=TrainingStep(step=1), applied=Applied(kss=KssSettings(alpha=1 << 70))),
    Heartbeat(**WHO, process_rank=0, training=TrainingStep(step=1), applied=Applied(), step_seconds=object()),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("message", UNENCODABLE, ids=lambda message: type(message).__name__)
def test_what_no_receiver_takes_is_not_encoded(message: AnyMessage) -> None:
    """For any value that Python allows in a field, the error is one that senders expect."""
    with pytest.raises(ProtocolError) as caught:
        encode(message)
    assert caught.value.reason == "schema"
    assert caught.value.detail.isprintable()
