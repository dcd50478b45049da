"""A schema and log-probabilities go on where they stopped when a sequence gives up its cells."""

import json
from pathlib import Path

import pytest

from loadmaster.engine.backends.fake import Fake
from loadmaster.engine.driver import Driver
from loadmaster.engine.types import (
    DoneEvent,
    GenerateEvent,
    LoadRequest,
    SamplingParams,
    TextEvent,
)
from loadmaster.errors import UsageError
from loadmaster.scheduler.types import Limits
from tests.engine_parts import request, settings

ROWS = {
    "type": "array",
    "items": {"type": "object", "properties": {"name": {"const": "row"}}, "required": ["name"]},
    "minItems": 9,
    "maxItems": 9,
}
N_REQUESTS, N_CTX = 4, 256


class Told:
    """What a driver reports."""

    def __init__(self) -> None:
        self.events: dict[str, list[GenerateEvent]] = {}
        self.refused: dict[str, UsageError] = {}

    def event(self, event: GenerateEvent) -> None:
        self.events.setdefault(event.request_id, []).append(event)

    def refusal(self, request_id: str, error: UsageError) -> None:
        self.refused[request_id] = error


def driver(told: Told, tmp_path: Path, state_bytes: int) -> Driver:
    (tmp_path / "m.gguf").write_bytes(b"")
    backend = Fake(devices=(), options={})
    opened = settings(n_ctx=N_CTX, n_seq_max=N_REQUESTS)
    wanted = LoadRequest(
        model_path=tmp_path / "m.gguf", model_stamp="", settings=opened, ram_cap_bytes=None
    )
    backend.load(wanted, lambda _: True)
    limits = Limits(
        n_ctx=N_CTX, n_ctx_seq=N_CTX, n_seq_max=N_REQUESTS, n_batch=64, n_ubatch=64,
        partial_removal=True, shared_prefix=True, partial_state=True, state_bytes=state_bytes,
    )  # fmt: skip
    return Driver(backend, limits, report=told.event, refuse=told.refusal)


@pytest.mark.parametrize("state_bytes", [0, 1 << 20])
def test_a_preempted_sequence_finishes_its_json(tmp_path: Path, state_bytes: int) -> None:
    told = Told()
    running = driver(told, tmp_path, state_bytes)
    for index in range(N_REQUESTS):
        prompt = list(f"request {index}: {'.' * 20}".encode())
        wanted = request(
            str(index), prompt, None, json_schema=json.dumps(ROWS), top_logprobs=1,
            sampling=SamplingParams(seed=index),
        )  # fmt: skip
        running.submit(wanted)
    while not running.idle:
        running.step()
    ends = [events[-1] for events in told.events.values()]
    assert all(isinstance(end, DoneEvent) and end.finish_reason == "stop" for end in ends)
    assert sum(end.n_preempted for end in ends if isinstance(end, DoneEvent)) > 0
    for events in told.events.values():
        texts = [event for event in events if isinstance(event, TextEvent)]
        text = "".join(event.text for event in texts)
        assert json.loads(text) == [{"name": "row"}] * 9
        raw = b"".join(bytes(one.raw) for event in texts for one in event.logprobs)
        assert raw.decode() == text


def test_a_bad_schema_is_refused_before_anything_is_fed(tmp_path: Path) -> None:
    told = Told()
    running = driver(told, tmp_path, 0)
    running.submit(request("bad", [1, 2, 3], 4, json_schema='{"type": "strin"}'))
    assert "Invalid type" in str(told.refused["bad"])
    assert running.idle
    assert told.events == {}
