"""Sampling parameters, log-probabilities and JSON schemas, on every backend, through the worker."""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gguf_writer import write_random
from benchmarks.shapes import build_tiny
from loadmaster.engine.process import Engine
from loadmaster.engine.python_build import find_python_build
from loadmaster.engine.types import (
    DoneEvent,
    EngineBuild,
    GenerateEvent,
    SamplingParams,
    TextEvent,
    TokenLogprob,
)
from loadmaster.errors import UsageError
from tests import hf_parts
from tests.engine_parts import load_request, request, settings

pytestmark = pytest.mark.engine

PROMPT = "def read(path):\n    return"  # 24 clear tokens, as in `test_backends`
CLOSE = 0.05  # log-probabilities of one step: kernels round differently for few and for many tokens
FOUR = settings(n_ctx=2048, n_seq_max=4, n_outputs_max=4)
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
FLAGS = {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3}
COLOUR = {"enum": ["red", "green", "blue"]}
NESTED = {
    "$defs": {
        "leaf": {
            "type": "object",
            "properties": {"n": {"enum": [1, 2]}},
            "required": ["n"],
            "additionalProperties": False,
        }
    },
    "type": "object",
    "properties": {"left": {"$ref": "#/$defs/leaf"}, "right": {"$ref": "#/$defs/leaf"}},
    "required": ["left", "right"],
    "additionalProperties": False,
}

FIM = ("pre", "suf", "mid")
names = (f"g{n}" for n in itertools.count())


@pytest.fixture(scope="module", params=["llamacpp", "transformers", "fake"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    if request.param == "transformers":
        folder = request.getfixturevalue("checkpoint")
        with Engine.start(find_python_build(), backend=request.param) as engine:
            four = hf_parts.load_request(folder, n_ctx=2048, n_seq_max=4)
            engine.load(four, files=hf_parts.files_of(folder))
            yield engine
        return
    build = request.getfixturevalue("engine_build")
    with Engine.start(build, backend=request.param) as engine:
        engine.load(load_request(request.getfixturevalue("demo_model"), FOUR))
        yield engine


@pytest.fixture(scope="module")
def llamacpp(engine_build: EngineBuild, demo_model: Path) -> Iterator[Engine]:
    with Engine.start(engine_build) as engine:
        engine.load(load_request(demo_model, FOUR))
        yield engine


def start(engine: Engine, max_tokens: int, **changes: Any) -> Iterator[GenerateEvent]:
    prompt = engine.tokenize(PROMPT, False)
    return engine.generate(request(next(names), prompt, max_tokens, **changes))


def ended(events: Iterator[GenerateEvent]) -> tuple[str, DoneEvent, list[TokenLogprob]]:
    """The text, the end, and the log-probabilities that came with the text."""
    *parts, done = events
    assert isinstance(done, DoneEvent)
    texts = [part for part in parts if isinstance(part, TextEvent)]
    logprobs = [logprob for part in texts for logprob in part.logprobs]
    return "".join(part.text for part in texts), done, logprobs


# -- JSON schemas


@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0), SamplingParams(seed=5)])
@pytest.mark.parametrize("schema", [PERSON, FLAGS, COLOUR, NESTED])
def test_the_text_is_json_of_the_schema(
    engine: Engine, schema: dict[str, Any], sampling: SamplingParams
) -> None:
    events = start(engine, 400, json_schema=json.dumps(schema), sampling=sampling)
    text, done, _ = ended(events)
    assert done.finish_reason == "stop"
    _check(schema, json.loads(text))


def _check(schema: dict[str, Any], value: Any) -> None:
    """By hand: what these four schemas say."""
    if schema is PERSON:
        assert set(value) == {"name", "age"}
        assert len(value["name"]) <= 8
        assert value["age"] in range(151)
    elif schema is FLAGS:
        assert 2 <= len(value) <= 3
        assert set(value) <= {True, False}
    elif schema is COLOUR:
        assert value in COLOUR["enum"]
    else:
        assert [value["left"]["n"] in (1, 2), value["right"]["n"] in (1, 2)] == [True, True]


def test_several_schemas_in_the_same_steps(engine: Engine) -> None:
    schemas = [PERSON, FLAGS, COLOUR, NESTED]
    streams = [start(engine, 400, json_schema=json.dumps(schema)) for schema in schemas]
    free = start(engine, 20)
    for schema, events in zip(schemas, streams, strict=True):
        text, done, _ = ended(events)
        assert done.finish_reason == "stop"
        _check(schema, json.loads(text))
    assert ended(free)[1].finish_reason == "length"


def test_a_schema_does_not_change_its_neighbours(engine: Engine) -> None:
    alone, _, _ = ended(start(engine, 12))
    with_schema = start(engine, 400, json_schema=json.dumps(PERSON))
    beside, _, _ = ended(start(engine, 12))
    ended(with_schema)
    assert beside == alone


def test_a_stop_string_ends_a_schema_early(engine: Engine) -> None:
    events = start(engine, 400, json_schema=json.dumps(PERSON), stop=(":",))
    text, done, _ = ended(events)
    assert done.finish_reason == "stop"
    assert '"name"' in text
    assert ":" not in text


def test_max_tokens_end_a_schema_early(engine: Engine) -> None:
    events = start(engine, 3, json_schema=json.dumps(PERSON))
    assert ended(events)[1].finish_reason == "length"


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ('{"type": "strin"}', "Invalid type: strin"),
        ("[]", "not an object"),
        ("{", "no JSON"),
        ('{"$ref": "#"}', "no text fulfils it"),
        ('{"$ref": "http://example.com/x"}', "registry"),
        ('{"oneOf": [{"type": "object"}, {}]}', "use `anyOf`"),
        ('{"type": "string", "pattern": "("}', "unclosed group"),
        ('{"not": {}}', "not"),
        (json.dumps({"enum": ["x" * 70_000]}), "65536 are allowed"),
        ('{"items":' * 65 + "{}" + "}" * 65, "64 levels"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused(engine: Engine, schema: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ended(start(engine, 10, json_schema=schema))
    assert ended(start(engine, 2))[1].finish_reason == "length"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "((a{1000}){1000}){1000}"},
        {"type": "string", "minLength": 10**9},
        {"type": "array", "maxItems": 10**9, "items": {"type": "array", "maxItems": 10**9}},
        {"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in range(9)]}
                   for i in range(40)]},
        {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(1000)}},
        {"enum": [f"value {i}" for i in range(4000)]},
        {"type": "integer", "multipleOf": 982451653},
    ],
)  # fmt: skip
def test_a_bomb_is_refused_or_followed(engine: Engine, schema: dict[str, Any]) -> None:
    """Either way in bounded time and memory, with one end."""
    before = engine.memory().process_bytes
    try:
        _, done, _ = ended(start(engine, 16, json_schema=json.dumps(schema)))
    except UsageError:
        pass
    else:
        assert done.finish_reason in ("length", "stop", "failed")
    assert engine.memory().process_bytes - before < 48 << 20
    assert ended(start(engine, 2))[1].finish_reason == "length"


# -- log-probabilities


@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0), SamplingParams(seed=5)])
def test_a_logprob_for_each_token(engine: Engine, sampling: SamplingParams) -> None:
    text, done, logprobs = ended(start(engine, 12, top_logprobs=5, sampling=sampling))
    assert len(logprobs) == done.n_generated
    assert b"".join(bytes(one.raw) for one in logprobs).decode("utf-8", "replace") == text
    for one in logprobs:
        found = likelihoods(one)
        assert len(found) == 5
        assert found == sorted(found, reverse=True)
        assert one.logprob <= found[0] <= 0


def test_without_alternatives_there_is_the_token_alone(engine: Engine) -> None:
    _, _, logprobs = ended(start(engine, 3, top_logprobs=0))
    assert [one.top for one in logprobs] == [(), (), ()]


def test_nobody_gets_logprobs_unasked(engine: Engine) -> None:
    asked, free = start(engine, 8, top_logprobs=1), start(engine, 8)
    assert len(ended(asked)[2]) == 8
    assert ended(free)[2] == []


def test_tokens_of_a_stop_string_are_not_reported(engine: Engine) -> None:
    whole, _, all_of_it = ended(start(engine, 24, top_logprobs=0))
    stop = whole[6:9]
    text, _, logprobs = ended(start(engine, 24, top_logprobs=0, stop=(stop,)))
    shown = b"".join(bytes(one.raw) for one in logprobs).decode()
    same = all_of_it[: len(logprobs)]
    assert [one.token for one in logprobs] == [one.token for one in same]
    assert [one.logprob for one in logprobs] == pytest.approx([o.logprob for o in same], abs=CLOSE)
    assert shown.startswith(text)
    assert stop not in shown


def likelihoods(one: TokenLogprob) -> list[float]:
    return [logprob for _, _, logprob in one.top]


def test_greedy_takes_the_likeliest(llamacpp: Engine) -> None:
    _, _, logprobs = ended(start(llamacpp, 16, top_logprobs=2))
    assert all((one.token, one.logprob) == (one.top[0][0], one.top[0][2]) for one in logprobs)


def test_probabilities_are_those_before_sampling(llamacpp: Engine) -> None:
    hot = SamplingParams(temperature=3.0, top_k=0, top_p=1.0, min_p=0.0, seed=1)
    _, _, cold = ended(start(llamacpp, 1, top_logprobs=20))
    _, _, warm = ended(start(llamacpp, 1, top_logprobs=20, sampling=hot))
    assert likelihoods(warm[0]) == pytest.approx(likelihoods(cold[0]), abs=CLOSE)
    assert sum(math.exp(logprob) for _, _, logprob in cold[0].top) <= 1


def test_logprobs_ignore_the_schema(llamacpp: Engine) -> None:
    _, _, free = ended(start(llamacpp, 1, top_logprobs=3))
    text, _, bound = ended(start(llamacpp, 60, top_logprobs=3, json_schema=json.dumps(PERSON)))
    assert likelihoods(bound[0]) == pytest.approx(likelihoods(free[0]), abs=CLOSE)
    assert bound[0].token not in [token for token, _, _ in free[0].top]
    assert b"".join(bytes(one.raw) for one in bound).decode() == text


# -- sampling parameters


def test_a_bias_forbids_and_forces(llamacpp: Engine) -> None:
    first, second = (token for token, _, _ in ended(start(llamacpp, 1, top_logprobs=2))[2][0].top)

    def taken(*bias: tuple[int, float]) -> int:
        sampling = SamplingParams(temperature=0, logit_bias=bias)
        return ended(start(llamacpp, 1, top_logprobs=0, sampling=sampling))[2][0].token

    assert taken((first, -100.0)) == second
    assert taken((7, 100.0)) == 7


@pytest.mark.parametrize(
    "penalty", [{"frequency_penalty": 2.0}, {"presence_penalty": 2.0}, {"repeat_penalty": 2.0}]
)
def test_a_penalty_makes_tokens_differ(llamacpp: Engine, penalty: dict[str, float]) -> None:
    def distinct(**changes: Any) -> int:
        sampling = SamplingParams(temperature=0, repeat_last_n=-1, **changes)
        _, _, logprobs = ended(start(llamacpp, 40, top_logprobs=0, sampling=sampling))
        return len({one.token for one in logprobs})

    assert distinct(**penalty) > distinct()


def test_typical_sampling_is_its_own(llamacpp: Engine) -> None:
    texts = {
        ended(start(llamacpp, 24, sampling=SamplingParams(temperature=1, seed=3, typical_p=p)))[0]
        for p in (1.0, 0.1)
    }
    assert len(texts) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_logprobs": 21}, "between 0 and 20"),
        ({"sampling": SamplingParams(temperature=math.nan)}, "temperature"),
        ({"sampling": SamplingParams(repeat_penalty=0)}, "repeat_penalty"),
        ({"sampling": SamplingParams(logit_bias=((1 << 30, 1.0),))}, "token 1073741824"),
        ({"sampling": SamplingParams(logit_bias=((1, math.nan),))}, "not a number"),
    ],
)
def test_parameters_out_of_range_are_refused(
    engine: Engine, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        start(engine, 1, **changes)


def test_a_token_that_does_not_exist_is_refused(engine: Engine) -> None:
    with pytest.raises(UsageError, match="token 99999999"):
        engine.generate(request("none", [1, 99_999_999], 1))


# -- text and tokens


def test_tokens_back_to_text(engine: Engine) -> None:
    text = "naïve 🙂 text"
    assert engine.detokenize(engine.tokenize(text, False)) == text
    assert engine.detokenize([]) == ""


def test_control_tokens_have_a_text(llamacpp: Engine) -> None:
    tokens = llamacpp.tokenize("<|im_end|>", False, True)
    assert len(tokens) == 1
    assert llamacpp.detokenize(tokens) == "<|im_end|>"
    assert llamacpp.loaded is not None
    assert llamacpp.loaded.fim_prefix is None


def test_tokens_to_fill_in_the_middle(engine_build: EngineBuild, tmp_path: Path) -> None:
    metadata, tensors = build_tiny("llama-8b", "f16")
    middle = {f"tokenizer.ggml.fim_{part}_token_id": 300 + i for i, part in enumerate(FIM)}
    path = write_random(tmp_path / "m.gguf", metadata | middle, tensors)
    with Engine.start(engine_build) as engine:
        loaded = engine.load(load_request(path))
    assert (loaded.fim_prefix, loaded.fim_suffix, loaded.fim_middle) == (300, 301, 302)
