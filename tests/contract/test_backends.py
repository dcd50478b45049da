"""One suite that every backend passes, through the worker, as the rest of the program uses it."""

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from loadmaster.engine import watch
from loadmaster.engine.process import Engine
from loadmaster.engine.python_build import find_python_build
from loadmaster.engine.types import (
    DoneEvent,
    EngineBuild,
    GenerateEvent,
    GenerateRequest,
    SamplingParams,
    TextEvent,
    VirtualDevice,
)
from loadmaster.errors import ContextLengthError, EngineCrashedError
from loadmaster.plan.types import Sizing
from loadmaster.units import GIB, Bytes
from tests import hf_parts
from tests.conftest import CUDA_RULES
from tests.engine_parts import load_request, request, settings
from tests.engine_parts import request as make_request

pytestmark = pytest.mark.engine

# Its greedy answer is clear: over 24 tokens the next best has 0.25 less log-probability at least.
PROMPT = "Return the name of the"
ON_GPU = settings(n_gpu_layers=2, layers_per_device=(2,), n_seq_max=2, n_outputs_max=2, n_ctx=512)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """An engine with an open model, and what it was sized at before."""

    engine: Engine
    sizing: Sizing
    prompt: list[int]
    stand_ins: tuple[VirtualDevice, ...] = ()


@pytest.fixture(scope="module", params=["llamacpp", "transformers", "fake"])
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    if request.param == "transformers":
        yield from _of_transformers(request.getfixturevalue("checkpoint"))
    else:
        model = request.getfixturevalue("demo_model")
        yield from _on_a_stand_in(request.param, request.getfixturevalue("engine_build"), model)


def _on_a_stand_in(backend: str, build: EngineBuild, model: Path) -> Iterator[Case]:
    gpu = VirtualDevice(id="gpu:0", total_bytes=Bytes(GIB), rules=CUDA_RULES)
    options = {"tok_s": 5000.0} if backend == "fake" else {}
    with Engine.start(build, devices=[gpu], backend=backend, options=options) as engine:
        sizing = engine.size(model, ON_GPU)
        assert isinstance(sizing, Sizing)
        engine.load(load_request(model, ON_GPU))
        engine.commit_peak(time_limit_s=1.0)
        yield Case(engine=engine, sizing=sizing, prompt=engine.tokenize(PROMPT), stand_ins=(gpu,))


def _of_transformers(folder: Path) -> Iterator[Case]:
    request = hf_parts.load_request(folder)
    with Engine.start(find_python_build(), backend="transformers") as engine:
        sizing = engine.size(folder, request.settings)
        assert isinstance(sizing, Sizing)
        engine.load(request, files=hf_parts.files_of(folder))
        engine.commit_peak(time_limit_s=1.0)
        yield Case(engine=engine, sizing=sizing, prompt=engine.tokenize(PROMPT))


def run(engine: Engine, wanted: GenerateRequest) -> tuple[str, DoneEvent]:
    """The whole text and the one terminal event."""
    events = list(engine.generate(wanted))
    done = [event for event in events if isinstance(event, DoneEvent)]
    assert done == events[-1:]
    return _text(events), done[0]


def _text(events: list[GenerateEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextEvent))


def test_loads_into_exactly_the_sized_bytes(case: Case) -> None:
    assert case.engine.memory().buffers == case.sizing.buffers


def test_a_stand_in_gpu_counts_what_was_sized(case: Case) -> None:
    report = case.engine.memory()
    assert report.device_used_bytes.keys() == {gpu.id for gpu in case.stand_ins}
    for gpu in case.stand_ins:
        row = case.sizing.on(gpu.id)
        assert report.device_used_bytes[gpu.id] == (
            row.model_bytes + row.context_bytes + row.compute_bytes
        )
        assert report.device_denied[gpu.id] == 0


def test_the_process_is_measured(case: Case) -> None:
    report = case.engine.memory()
    assert 0 < report.process_bytes <= report.process_peak_bytes


def test_ends_at_max_tokens(case: Case) -> None:
    text, done = run(case.engine, request("length", case.prompt, 12))
    assert (done.finish_reason, done.n_generated) == ("length", 12)
    assert done.n_prompt == len(case.prompt)
    assert text


def test_ends_when_the_cells_are_full(case: Case) -> None:
    assert case.engine.loaded is not None
    n_ctx = case.engine.loaded.n_ctx_seq
    _, done = run(case.engine, request("full", case.prompt, None))
    assert done.finish_reason == "length"
    assert done.n_prompt + done.n_generated == n_ctx


def test_greedy_text_repeats(case: Case) -> None:
    first, _ = run(case.engine, request("greedy-1", case.prompt, 16))
    second, done = run(case.engine, request("greedy-2", case.prompt, 16))
    assert first == second
    assert done.n_cached == len(case.prompt) - 1  # the cells were still there


def test_a_seed_repeats(case: Case) -> None:
    sampling = SamplingParams(temperature=1.5, seed=7)
    run(case.engine, request("read", case.prompt, 1))  # from now on all compute the same steps
    texts = {
        run(case.engine, request(f"seed-{i}", case.prompt, 16, sampling=sampling))[0]
        for i in range(2)
    }
    other = run(
        case.engine,
        request("seed-other", case.prompt, 16, sampling=SamplingParams(temperature=1.5, seed=8)),
    )
    assert len(texts) == 1
    assert other[0] not in texts


def test_a_stop_string_is_not_shown(case: Case) -> None:
    whole, _ = run(case.engine, request("whole", case.prompt, 24))
    stop = whole[5:8]
    text, done = run(case.engine, request("stopped", case.prompt, 24, stop=(stop,)))
    assert done.finish_reason == "stop"
    assert text == whole[: whole.index(stop)]


def cancelled(engine: Engine, name: str, prompt: list[int]) -> DoneEvent:
    events = engine.generate(request(name, prompt, None))
    engine.cancel(name)
    *_, done = events
    assert isinstance(done, DoneEvent)
    return done


def test_a_cancelled_request_frees_its_sequence(case: Case) -> None:
    # A busy machine may let a whole generation pass before the cancellation is sent.
    ends = (cancelled(case.engine, f"cancelled-{i}", case.prompt) for i in range(20))
    assert any(end.finish_reason == "cancelled" for end in ends)
    assert run(case.engine, request("after", case.prompt, 2))[1].finish_reason == "length"


def test_leaving_early_cancels(case: Case) -> None:
    events = case.engine.generate(request("left", case.prompt, None))
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert run(case.engine, request("next", case.prompt, 2))[1].n_generated == 2


def test_two_sequences_run_side_by_side(case: Case) -> None:
    streams = [case.engine.generate(request(f"side-{i}", case.prompt, 20)) for i in range(3)]
    ends = [list(stream)[-1] for stream in streams]
    assert [end.finish_reason for end in ends if isinstance(end, DoneEvent)] == ["length"] * 3


def test_a_prompt_longer_than_n_ctx_is_refused_with_both_numbers(case: Case) -> None:
    assert case.engine.loaded is not None
    n_ctx = case.engine.loaded.n_ctx_seq
    with pytest.raises(ContextLengthError) as refusal:
        case.engine.generate(request("long", case.prompt[:1] * n_ctx, 1))
    assert refusal.value.numbers == {"n_prompt": n_ctx, "n_ctx": n_ctx}


def test_a_saved_sequence_goes_on(case: Case) -> None:
    expected, _ = run(case.engine, request("before-save", case.prompt, 10))
    state = case.engine.save_state()
    assert state.tokens[: len(case.prompt)] == tuple(case.prompt)
    for seq_id in (0, 1):  # other prompts take both slots
        run(case.engine, request(f"other-{seq_id}", case.prompt[::-1], 4))
    case.engine.restore_state(state)
    text, done = run(case.engine, request("after-save", case.prompt, 10))
    assert done.n_cached == len(case.prompt) - 1
    assert text == expected


def test_tokens_are_the_text(case: Case) -> None:
    tokens = case.engine.tokenize("naïve 🙂 text", False)
    assert tokens
    assert case.engine.tokenize("", False) == []


def opened(name: str, request: pytest.FixtureRequest) -> Engine:
    """An engine with a model, long enough that its requests do not end by themselves."""
    if name == "transformers":
        folder = request.getfixturevalue("checkpoint")
        engine = Engine.start(find_python_build(), backend=name)
        engine.load(hf_parts.load_request(folder, n_ctx=8192), files=hf_parts.files_of(folder))
        return engine
    options = {"tok_s": 20.0} if name == "fake" else {}
    build = request.getfixturevalue("engine_build")
    engine = Engine.start(build, backend=name, options=options)
    engine.load(load_request(request.getfixturevalue("demo_model"), settings(n_ctx=8192)))
    return engine


@pytest.mark.parametrize("backend", ["llamacpp", "transformers", "fake"])
def test_a_killed_worker_ends_every_request_once(
    backend: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "machine_oom_kills", lambda: 0)  # other tests may cause some
    with opened(backend, request) as engine:
        streams = [engine.generate(make_request(f"r{i}", [1, 2, 3], None)) for i in range(3)]
        next(streams[0])
        os.kill(engine.pid, signal.SIGKILL)
        for stream in streams:
            *_, done = stream
            assert isinstance(done, DoneEvent)
            assert done.finish_reason == "failed"
            assert done.error is not None
            assert "SIGKILL" in done.error
        assert isinstance(engine.failure, EngineCrashedError)
        with pytest.raises(EngineCrashedError):
            engine.memory()
