"""Frames and the schema behind them."""

import socket
import struct
from typing import Any

import pytest

from loadmaster.engine import remote_errors, wire
from loadmaster.engine.types import DoneEvent, GenerateRequest, SamplingParams, VirtualDevice
from loadmaster.errors import ContextLengthError, DamagedFileError, EngineError, LoadmasterError
from loadmaster.plan.types import Adapter, EngineSettings, Override
from loadmaster.schema import SchemaError, from_json, to_json
from loadmaster.units import Bytes
from tests.conftest import CUDA_RULES
from tests.engine_parts import request, settings


@pytest.mark.parametrize("cut", [1, 3, 7, 1000])
def test_frames_survive_any_cut(cut: int) -> None:
    frames: list[tuple[dict[str, Any], bytes]] = [
        ({"kind": "a", "n": 1}, b""),
        ({"kind": "b"}, b"\x00payload"),
        ({}, b""),
    ]
    stream = b"".join(wire.encode(body, payload) for body, payload in frames)
    decoder = wire.Decoder()
    found = [
        (frame.body, frame.payload)
        for at in range(0, len(stream), cut)
        for frame in decoder.feed(stream[at : at + cut])
    ]
    assert found == frames


@pytest.mark.parametrize(
    "stream",
    [
        struct.pack("<II", 1 << 30, 0),
        struct.pack("<II", 3, 0) + b"{{{",
        struct.pack("<II", 2, 0) + b"[]",
        struct.pack("<II", 4, 0) + b"\xff\xfe\xfd\xfc",
        struct.pack("<II", 200_000, 0) + b"[" * 200_000,
    ],
    ids=["too large", "not JSON", "no object", "not UTF-8", "too deep"],
)
def test_a_hostile_frame_is_refused(stream: bytes) -> None:
    with pytest.raises(wire.WireError):
        list(wire.Decoder().feed(stream))


def test_a_frame_over_the_cap_is_not_sent() -> None:
    with pytest.raises(wire.WireError):
        wire.encode({"text": "x" * (wire.MAX_JSON_BYTES + 1)})


def test_a_closed_channel_says_so() -> None:
    ours, theirs = socket.socketpair()
    channel = wire.Channel(ours)
    theirs.sendall(wire.encode({"kind": "last"}))
    theirs.close()
    frames = channel.receive()
    assert frames is not None
    assert [frame.kind for frame in frames] == ["last"]
    assert channel.receive() is None
    channel.close()


def test_frames_that_are_sent_together_are_read_together() -> None:
    ours, theirs = map(wire.Channel, socket.socketpair())
    theirs.send_all([{"kind": "event", "n": n} for n in range(3)])
    frames = ours.receive()
    assert frames is not None
    assert [frame.body["n"] for frame in frames] == [0, 1, 2]
    ours.close()
    theirs.close()


def test_settings_round_trip() -> None:
    value = settings(
        layers_per_device=(3, 4),
        overrides=(Override(pattern=r"^blk\.1\.", device="cpu"),),
        adapters=(Adapter(path="a.gguf", scale=0.5, size_bytes=Bytes(7)),),
    )
    assert from_json(EngineSettings, to_json(value)) == value


def test_requests_and_devices_round_trip() -> None:
    wanted = request("id", [1, 2], None, stop=("a",), sampling=SamplingParams(seed=3))
    assert from_json(GenerateRequest, to_json(wanted)) == wanted
    device = VirtualDevice(id="gpu:0", total_bytes=Bytes(1), rules=CUDA_RULES)
    assert from_json(VirtualDevice, to_json(device)) == device


DONE = {
    "request_id": "a", "finish_reason": "stop", "n_prompt": 1, "n_cached": 0, "n_generated": 1,
    "prefill_s": 0, "decode_s": 0.5, "error": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"finish_reason": "bored"}, "finish_reason"),
        ({"n_prompt": "1"}, "n_prompt"),
        ({"n_prompt": True}, "n_prompt"),
        ({"n_prompt": 1.5}, "n_prompt"),
        ({"extra": 1}, "extra"),
        ({"error": 3}, "error"),
    ],
)
def test_a_malformed_event_names_the_place(change: dict[str, object], said: str) -> None:
    with pytest.raises(SchemaError, match=said):
        from_json(DoneEvent, DONE | change)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(SchemaError, match="n_cached: missing"):
        from_json(DoneEvent, {k: v for k, v in DONE.items() if k != "n_cached"})


def test_a_well_formed_event_is_read() -> None:
    assert from_json(DoneEvent, DONE).decode_s == 0.5


def test_our_errors_cross_the_wire() -> None:
    error = ContextLengthError("too long", hint="shorten it", numbers={"n_ctx": 5})
    copy = remote_errors.remote_error(remote_errors.error_json(error))
    assert type(copy) is ContextLengthError
    assert (copy.message, copy.hint, copy.numbers) == ("too long", "shorten it", {"n_ctx": 5})
    damaged = DamagedFileError("bad", code="truncated")
    assert remote_errors.remote_error(remote_errors.error_json(damaged)).code == "truncated"


@pytest.mark.parametrize("name", ["SystemExit", "Mapping", "Number", "__name__", None, 3])
def test_only_our_errors_are_made(name: object) -> None:
    error = remote_errors.remote_error({"type": name, "message": "m", "numbers": {"a": []}})
    assert type(error) is EngineError
    assert error.numbers == {}


def test_an_error_that_cannot_be_read_is_one() -> None:
    assert isinstance(remote_errors.remote_error([]), LoadmasterError)
