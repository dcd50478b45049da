"""Many requests at once on llama.cpp: shared prefixes, preemption and cancelling, on every kind of
cache. Each chosen token is held against a run of its request alone, fed the same tokens."""

import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gguf_writer import write_random
from benchmarks.shapes import build_tiny
from loadmaster.engine.process import Engine
from loadmaster.engine.types import (
    DoneEvent,
    EngineBuild,
    GenerateEvent,
    SchedulerStats,
    TextEvent,
)
from loadmaster.errors import LoadmasterError
from loadmaster.units import Bytes
from tests.engine_parts import WRONG_LOGITS, gaps, held, load_request, request, settings

pytestmark = pytest.mark.engine

Prompt = list[int]
PREFIX = [(7 * i * i + 3 * i) % 250 + 1 for i in range(100)]
BUSY = [30 + i % 50 for i in range(230)]
SHARED = [[*PREFIX, 5 + i, 9, 40 + i, 3] for i in range(6)]


class Outcome:
    """What became of a set of requests that were in flight together."""

    def __init__(self, engine: Engine, prompts: Sequence[Prompt], n_out: int, **changes: Any):
        before = engine.stats()
        fields = {"top_logprobs": 0} | changes
        with held(engine):
            # Something to do while it reads of all the others.
            busy = engine.generate(request("busy", BUSY, 1, prefix_scope="busy"))
            streams = [
                engine.generate(request(f"r{i}", prompt, n_out, **fields))
                for i, prompt in enumerate(prompts)
            ]
        events = [list(stream) for stream in streams]
        self.prompts = prompts
        self.tokens = [
            [one.token for e in row if isinstance(e, TextEvent) for one in e.logprobs]
            for row in events
        ]
        self.ends = [row[-1] for row in events if isinstance(row[-1], DoneEvent)]
        list(busy)
        self.stats = engine.stats()
        self.n_prefilled = self.stats.n_prefilled_tokens - before.n_prefilled_tokens
        self.n_prefilled -= len(BUSY)


def opened(
    engine: Engine, path: Path, state_bytes: int | None = None, **changes: Any
) -> SchedulerStats:
    fields: Mapping[str, Any] = {
        "n_ctx": 1024, "n_seq_max": 6, "n_outputs_max": 6, "type_k": "f32", "type_v": "f32",
    } | changes  # fmt: skip
    load = load_request(path, settings(**fields))
    room = None if state_bytes is None else Bytes(state_bytes)
    engine.load(replace(load, state_bytes=room))
    return engine.stats()


def check(outcome: Outcome, n_out: int, build: EngineBuild, path: Path) -> None:
    assert [end.finish_reason for end in outcome.ends] == ["length"] * len(outcome.prompts)
    assert [end.n_generated for end in outcome.ends] == [n_out] * len(outcome.prompts)
    # The last tokens may be a part of a character: those have no place beside the text.
    assert all(n_out - 3 <= len(tokens) <= n_out for tokens in outcome.tokens)
    assert max(gaps(build, path, outcome.prompts, outcome.tokens)) <= WRONG_LOGITS
    assert outcome.stats.n_cells_running == 0


def test_a_shared_prefix_is_fed_once(engine_build: EngineBuild, demo_model: Path) -> None:
    with Engine.start(engine_build) as engine:
        opened(engine, demo_model)
        outcome = Outcome(engine, SHARED, 12)
        assert outcome.n_prefilled == len(PREFIX) + 6 * 4
        assert sorted(end.n_cached for end in outcome.ends) == [0, *[len(PREFIX)] * 5]
        check(outcome, 12, engine_build, demo_model)
        again = Outcome(engine, SHARED, 12)
        assert again.n_prefilled == 6 - len(BUSY) + 1  # the last token of each prompt


def test_scopes_share_nothing(engine_build: EngineBuild, demo_model: Path) -> None:
    with Engine.start(engine_build) as engine:
        opened(engine, demo_model)
        streams = [
            engine.generate(request(f"r{i}", SHARED[i], 4, prefix_scope=f"key {i}"))
            for i in range(3)
        ]
        ends = [list(stream)[-1] for stream in streams]
        assert [end.n_cached for end in ends if isinstance(end, DoneEvent)] == [0, 0, 0]


@pytest.mark.parametrize("state_bytes", [1 << 28, 0])
def test_nobody_fails_for_want_of_cells(
    engine_build: EngineBuild, demo_model: Path, state_bytes: int
) -> None:
    prompts = [[(i * 31 + j * 7) % 240 + 5 for j in range(41 + 5 * i)] for i in range(8)]
    with Engine.start(engine_build) as engine:
        opened(engine, demo_model, state_bytes, n_ctx=256)
        outcome = Outcome(engine, prompts, 40)
        assert sum(len(prompt) + 40 for prompt in prompts) > 3 * 256
        assert outcome.stats.n_preempted > 0
        assert (outcome.stats.n_restored > 0) == (state_bytes > 0)
        assert outcome.stats.state_bytes == 0
        check(outcome, 40, engine_build, demo_model)


def test_a_seeded_stream_survives_preemption(engine_build: EngineBuild, demo_model: Path) -> None:
    """The sampler goes on where it stood; `test_nobody_fails…` shows the cells do."""
    texts = []
    for n_ctx in (1024, 256):
        with Engine.start(engine_build) as engine:
            opened(engine, demo_model, n_ctx=n_ctx, n_seq_max=2, n_outputs_max=2)
            with held(engine):
                streams = [engine.generate(request(f"r{i}", [9, 5 + i], 200, stop=("\0",)))
                           for i in range(2)]  # fmt: skip
            ends = [list(stream) for stream in streams]
            texts.append(["".join(e.text for e in row if isinstance(e, TextEvent)) for row in ends])
            assert (engine.stats().n_preempted > 0) == (n_ctx == 256)
    assert texts[0] == texts[1]


def test_cancelling_one_leaves_the_others(engine_build: EngineBuild, demo_model: Path) -> None:
    with Engine.start(engine_build) as engine:
        opened(engine, demo_model, n_ctx=8192)
        long = engine.generate(request("long", SHARED[0], None))
        others = [engine.generate(request(f"r{i}", SHARED[i], 16)) for i in range(1, 5)]
        next(long)
        engine.cancel("long")
        ends = [list(stream)[-1] for stream in (long, *others)]
        reasons = [end.finish_reason for end in ends if isinstance(end, DoneEvent)]
        assert reasons == ["cancelled", *["length"] * 4]
        assert engine.stats().n_running == engine.stats().n_cells_running == 0


def test_a_person_goes_before_the_items_of_a_job(
    engine_build: EngineBuild, demo_model: Path
) -> None:
    with Engine.start(engine_build) as engine:
        opened(engine, demo_model, n_ctx=2048, n_seq_max=2, n_outputs_max=2)
        begun = threading.Event()
        ends: queue.SimpleQueue[DoneEvent] = queue.SimpleQueue()

        def hear(name: str, event: GenerateEvent | LoadmasterError) -> None:
            if isinstance(event, TextEvent):
                begun.set()
            elif isinstance(event, DoneEvent):
                ends.put(event)

        for i in range(3):
            engine.start_request(request(f"item {i}", SHARED[i], 800, priority=1), hear)
        begun.wait(60)
        engine.start_request(request("person", [1, 2, 3], 4), hear)
        person, *items = [ends.get(timeout=60) for _ in range(4)]
        assert (person.request_id, person.n_generated) == ("person", 4)
        assert [item.finish_reason for item in items] == ["length"] * 3


# Prompt tokens that six requests with a hundred tokens in common feed: once shared, once not.
ONCE = len(PREFIX) + 6 * 4


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ("llama-8b", {}),
        ("deepseek2-lite", {}),
        ("gemma3-12b", {"window": 32}),
        ("gpt-oss-20b", {"window": 32}),
        ("mamba-2.8b", {}),
        ("granitehybrid-3b", {}),
        ("lfm2-1.2b", {}),
        ("qwen3next-80b-a3b", {}),
    ],
)
def test_every_kind_of_cache_shares_what_is_cold(
    engine_build: EngineBuild, tmp_path: Path, shape: str, changes: dict[str, Any]
) -> None:
    path = tmp_path / "m.gguf"
    write_random(path, *build_tiny(shape, "f16", **changes))
    with Engine.start(engine_build) as engine:
        opened(engine, path)
        outcome = Outcome(engine, SHARED, 10)
        assert outcome.n_prefilled == ONCE
        check(outcome, 10, engine_build, path)


@pytest.mark.parametrize(
    ("shape", "changes"), [("gpt-oss-20b", {"window": 32}), ("granitehybrid-3b", {})]
)
def test_a_prefix_outlives_those_that_moved_on_from_it(
    engine_build: EngineBuild, tmp_path: Path, shape: str, changes: dict[str, Any]
) -> None:
    path = tmp_path / "m.gguf"
    write_random(path, *build_tiny(shape, "f16", **changes))
    prompts = [[*PREFIX, 5 + i, 9, 40 + i, 3] for i in range(20)]
    with Engine.start(engine_build) as engine:
        opened(engine, path, n_ctx=2048, n_seq_max=8, n_outputs_max=8)
        outcome = Outcome(engine, prompts, 6, priority=1)
        assert outcome.n_prefilled == len(PREFIX) + 20 * 4
        check(outcome, 6, engine_build, path)


@pytest.mark.parametrize(
    ("shape", "changes"),
    [("gemma3-12b", {"window": 32}), ("mamba-2.8b", {}), ("granitehybrid-3b", {})],
)
@pytest.mark.parametrize("state_bytes", [1 << 28, 0])
def test_every_kind_of_cache_preempts(
    engine_build: EngineBuild, tmp_path: Path, shape: str, changes: dict[str, Any],
    state_bytes: int,
) -> None:  # fmt: skip
    path = tmp_path / "m.gguf"
    write_random(path, *build_tiny(shape, "f16", **changes))
    prompts = [[(i * 31 + j * 7) % 240 + 5 for j in range(40 + 5 * i)] for i in range(6)]
    with Engine.start(engine_build) as engine:
        opened(engine, path, state_bytes, n_ctx=256)
        outcome = Outcome(engine, prompts, 70)
        assert outcome.stats.n_preempted > 0
        assert (outcome.stats.n_restored > 0) == (state_bytes > 0)
        check(outcome, 70, engine_build, path)
