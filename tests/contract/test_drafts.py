"""Drafts on every backend: what is generated with them is what is generated without."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from loadmaster.engine.process import Engine
from loadmaster.engine.python_build import find_python_build
from loadmaster.engine.types import DoneEvent, DraftLoad, SamplingParams, TextEvent
from tests import hf_parts
from tests.engine_parts import load_request, request, settings

pytestmark = pytest.mark.engine

N_DRAFT = 7
# A prompt that says everything twice; a greedy answer of a small model soon repeats itself, too.
LINES = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n\n\n" * 2


SIZES: dict[str, Any] = {
    "n_ctx": 512, "n_seq_max": 3, "n_outputs_max": 16, "type_k": "f32", "type_v": "f32",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The same model twice: without drafts, and with."""

    plain: Engine
    drafting: Engine
    prompt: list[int]
    by_model: bool  # the model drafts for itself; else guesses are looked up


BACKENDS = ("llamacpp", "transformers", "fake")
KINDS = [(backend, by_model) for backend in BACKENDS for by_model in (False, True)]


@pytest.fixture(
    scope="module", params=KINDS, ids=lambda kind: f"{kind[0]}-{'model' if kind[1] else 'lookup'}"
)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    backend, by_model = request.param
    with (
        _opened(backend, request, 0, by_model=False) as plain,
        _opened(backend, request, N_DRAFT, by_model=by_model) as drafting,
    ):
        prompt = plain.tokenize(LINES)
        yield Pair(plain=plain, drafting=drafting, prompt=prompt, by_model=by_model)


def _opened(
    backend: str, fixtures: pytest.FixtureRequest, n_draft: int, *, by_model: bool
) -> Engine:
    """Costs stay nominal where `commit_peak` is not called: the same drafts on any machine."""
    if backend == "transformers":
        folder = fixtures.getfixturevalue("checkpoint")
        files = hf_parts.files_of(folder)
        engine = Engine.start(find_python_build(), backend=backend)
        load = hf_parts.load_request(folder, n_draft=n_draft)
    else:
        folder = fixtures.getfixturevalue("demo_model")
        files = [folder]
        engine = Engine.start(fixtures.getfixturevalue("engine_build"), backend=backend)
        load = load_request(folder, settings(n_draft=n_draft, **SIZES))
    if by_model:
        own = replace(load.settings, n_draft=0)
        stamp = load.model_stamp
        draft = DraftLoad(model_path=folder, model_stamp=stamp, files=tuple(files), settings=own)
        load = replace(load, draft=draft)
    engine.load(load, files=files)
    return engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    end: DoneEvent


def ask(engine: Engine, name: str, prompt: list[int], n: int, **changes: Any) -> Answer:
    events = list(engine.generate(request(name, prompt, n, **changes)))
    texts = [event for event in events if isinstance(event, TextEvent)]
    reported = [one for event in texts for one in event.logprobs]
    assert isinstance(events[-1], DoneEvent)
    return Answer(
        text="".join(event.text for event in texts),
        tokens=tuple(one.token for one in reported),
        logprobs=tuple(one.logprob for one in reported),
        end=events[-1],
    )


def both(pair: Pair, n: int = 96, **changes: Any) -> tuple[Answer, Answer]:
    """The answers without drafts and with."""
    plain = ask(pair.plain, "plain", pair.prompt, n, **changes)
    return plain, ask(pair.drafting, "drafting", pair.prompt, n, **changes)


def same_ends(plain: DoneEvent, drafted: DoneEvent) -> None:
    assert plain.n_drafted == 0
    assert drafted.finish_reason == plain.finish_reason
    assert drafted.n_generated == plain.n_generated


def test_a_greedy_answer_is_the_same_in_fewer_steps(pair: Pair) -> None:
    before = pair.drafting.stats()
    plain, drafted = both(pair)
    after = pair.drafting.stats()
    assert drafted.text == plain.text
    same_ends(plain.end, drafted.end)
    assert 0 < drafted.end.n_accepted <= drafted.end.n_drafted
    n_steps = after.n_decode_steps - before.n_decode_steps
    assert n_steps == drafted.end.n_generated - drafted.end.n_accepted - 1
    assert after.n_accepted_tokens - before.n_accepted_tokens == drafted.end.n_accepted
    if pair.by_model:  # it says what the model says; the fake one is wrong at every fifth token
        assert drafted.end.n_accepted > 0.3 * drafted.end.n_drafted


def test_the_buffers_of_a_draft_model_are_reported_apart(pair: Pair) -> None:
    plain, drafting = pair.plain.memory(), pair.drafting.memory()
    assert plain.draft_buffers == ()
    assert [row.model_bytes for row in drafting.buffers] == [
        row.model_bytes for row in plain.buffers
    ]
    expected = [(row.device, row.model_bytes, row.context_bytes) for row in plain.buffers]
    found = [(row.device, row.model_bytes, row.context_bytes) for row in drafting.draft_buffers]
    assert found == (expected if pair.by_model else [])


def test_log_probabilities_are_those_of_single_steps(pair: Pair) -> None:
    plain, drafted = both(pair, top_logprobs=2)
    assert drafted.end.n_accepted > 0
    assert drafted.tokens == plain.tokens
    assert drafted.logprobs == pytest.approx(plain.logprobs, abs=1e-3)


def test_a_seed_repeats_and_is_that_of_single_steps(pair: Pair) -> None:
    sampling = SamplingParams(temperature=0.5, top_p=0.9, seed=3)
    plain, drafted = both(pair, sampling=sampling)
    again = ask(pair.drafting, "again", pair.prompt, 96, sampling=sampling)
    assert again.text == drafted.text == plain.text


def test_penalties_count_what_was_accepted(pair: Pair) -> None:
    sampling = SamplingParams(temperature=0, frequency_penalty=0.02, repeat_last_n=-1)
    plain, drafted = both(pair, sampling=sampling)
    assert drafted.text == plain.text


def test_a_stop_string_ends_in_the_middle_of_a_draft(pair: Pair) -> None:
    whole = ask(pair.plain, "whole", pair.prompt, 96).text
    for start in range(40, 60, 3):
        plain, drafted = both(pair, stop=(whole[start : start + 3],))
        assert drafted.text == plain.text
        same_ends(plain.end, drafted.end)
        assert drafted.end.finish_reason == "stop"


def test_max_tokens_is_never_passed(pair: Pair) -> None:
    for n in range(20, 28):
        plain, drafted = both(pair, n)
        same_ends(plain.end, drafted.end)
        assert (drafted.end.n_generated, drafted.text) == (n, plain.text)


def test_n_ctx_fills_up_to_its_last_cell(pair: Pair) -> None:
    plain, drafted = both(pair, 100_000)
    same_ends(plain.end, drafted.end)
    assert drafted.end.finish_reason == "length"
    assert pair.drafting.loaded is not None
    room = pair.drafting.loaded.n_ctx_seq - len(pair.prompt)
    assert drafted.end.n_generated == room


def test_a_schema_is_followed(pair: Pair) -> None:
    schema = '{"type": "array", "items": {"enum": [12345678]}, "minItems": 8, "maxItems": 8}'
    prompt = pair.plain.tokenize("[12345678,12345678,12345678,12345678]")
    answers = [
        ask(engine, name, prompt, 200, json_schema=schema, ignore_eos=False)
        for name, engine in (("plain", pair.plain), ("drafting", pair.drafting))
    ]
    plain, drafted = answers
    assert drafted.text == plain.text
    same_ends(plain.end, drafted.end)


def test_the_cells_that_stay_are_those_of_the_answer(pair: Pair) -> None:
    """What follows an answer goes on from its cells: none of them is a draft's."""
    texts = []
    for engine in (pair.plain, pair.drafting):
        first = ask(engine, "first", pair.prompt, 60, top_logprobs=0)
        follow_up = [*pair.prompt, *first.tokens[:50], *pair.prompt[:20]]
        second = ask(engine, "second", follow_up, 40)
        assert second.end.n_cached >= len(pair.prompt) + 40
        texts.append(second.text)
    assert texts[0] == texts[1]


def test_two_side_by_side_draft_both(pair: Pair) -> None:
    prompts = [pair.prompt, pair.prompt[8:]]
    expected = [ask(pair.plain, f"p{i}", prompt, 60).text for i, prompt in enumerate(prompts)]
    streams = [
        pair.drafting.generate(request(f"d{i}", prompt, 60)) for i, prompt in enumerate(prompts)
    ]
    events = [list(stream) for stream in streams]
    found = ["".join(e.text for e in row if isinstance(e, TextEvent)) for row in events]
    assert found == expected
    ends = [row[-1] for row in events if isinstance(row[-1], DoneEvent)]
    assert sum(end.n_accepted for end in ends) > 0
    assert all(end.n_accepted for end in ends) or not pair.by_model


def test_a_cancelled_request_leaves_nothing_behind(pair: Pair) -> None:
    events = pair.drafting.generate(request("left", pair.prompt, None))
    next(events)
    events.close()  # type: ignore[attr-defined]
    plain, drafted = both(pair, 24)
    assert drafted.text == plain.text
    assert pair.drafting.stats().n_cells_running == 0
