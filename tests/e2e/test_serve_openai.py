"""OpenAI's own client, unmodified, against a real server on the packaged model."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.serve_parts import Running, serving

pytestmark = pytest.mark.engine
ASK: Any = [{"role": "user", "content": "What is a list in Python?"}]
CLEAR = "Return the name of the"  # so is its greedy answer: no CPU takes another token


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(
        "demo", "--embeddings", "vectors=demo", "--ctx", "512", home=tmp_path_factory.mktemp("home")
    ) as running:
        yield running


def test_models_say_how_long_a_prompt_may_be(client: OpenAI) -> None:
    model, other = client.models.list().data
    assert (model.id, other.id) == ("demo", "vectors")
    assert model.model_extra is not None
    assert model.model_extra["max_model_len"] == 512
    assert client.models.retrieve("demo").id == "demo"


def test_chat_answers_and_counts(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=ASK, temperature=0, max_tokens=12
    )  # fmt: skip
    (choice,) = answer.choices
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens <= 12


def test_a_stream_is_the_same_text_with_a_usage_chunk(client: OpenAI) -> None:
    fields: Any = {"model": "demo", "messages": ASK, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**fields)
    chunks = list(
        client.chat.completions.create(
            **fields, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.usage.completion_tokens for c in chunks if c.usage] == [whole.usage.completion_tokens]
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert set(reasons[:-1]) == {None}


def test_choices_have_seeds_of_their_own(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=ASK, n=3, seed=7, temperature=1.5, max_tokens=12
    )  # fmt: skip
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1


def test_a_completion_takes_text_and_tokens_alike(client: OpenAI, server: Running) -> None:
    tokens = server.ask("POST", "/tokenize", {"content": CLEAR, "add_special": True})[1]
    by_text, by_tokens = (
        client.completions.create(model="demo", prompt=p, temperature=0, max_tokens=8)
        for p in (CLEAR, tokens["tokens"])
    )
    assert by_text.choices[0].text == by_tokens.choices[0].text
    assert by_text.usage is not None
    assert by_text.usage.prompt_tokens == len(tokens["tokens"])


def test_a_prompt_too_long_is_refused_with_both_numbers(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.completions.create(model="demo", prompt="word " * 2000)
    assert refusal.value.code == "context_length_exceeded"
    assert isinstance(refusal.value.body, dict)
    numbers = refusal.value.body["numbers"]
    assert numbers["n_ctx"] == 512
    assert numbers["n_prompt"] > 512


def test_an_unknown_model_is_404_with_the_nearest_name(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is `demo`") as refusal:
        client.chat.completions.create(model="dmo", messages=ASK)
    assert refusal.value.code == "model_not_found"


def test_too_many_choices_name_the_field(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(model="demo", messages=ASK, n=9)
    assert refusal.value.param == "n"


def test_stop_strings_are_not_part_of_the_answer(client: OpenAI) -> None:
    fields: Any = {"model": "demo", "prompt": CLEAR, "temperature": 0, "max_tokens": 24}
    text = client.completions.create(**fields).choices[0].text
    stop = text[len(text) // 2]
    stopped = client.completions.create(**fields, stop=[stop])
    assert stopped.choices[0].text == text.partition(stop)[0]
    assert stopped.choices[0].finish_reason == "stop"


def test_metrics_have_memory_planned_and_measured(server: Running) -> None:
    text = server.ask("GET", "/metrics")[1]
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    planned, measured = (
        {line.rpartition(" ")[0].partition("{")[2]: float(line.rpartition(" ")[2])
         for line in lines if line.startswith(f"loadmaster_memory_{name}_bytes")}
        for name in ("planned", "measured")
    )  # fmt: skip
    exact = [key for key in planned if 'kind="model"' in key or 'kind="kv"' in key]
    assert exact
    assert {key: planned[key] for key in exact} == {key: measured[key] for key in exact}


def test_embeddings_are_the_same_in_both_encodings(client: OpenAI) -> None:
    texts = ["a list", "a tuple", "a list"]
    packed = client.embeddings.create(model="vectors", input=texts).data  # base64 on the wire
    plain = client.embeddings.create(model="vectors", input=texts, encoding_format="float").data
    for one, other in zip(packed, plain, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
    first, second, third = (item.embedding for item in plain)
    assert sum(x * x for x in first) == pytest.approx(1, abs=1e-3)
    assert first == pytest.approx(third, abs=1e-4)
    assert first != pytest.approx(second, abs=1e-2)


def test_metrics_count_texts_that_became_vectors(server: Running, client: OpenAI) -> None:
    def counted(name: str) -> int:
        text = server.ask("GET", "/metrics")[1]
        return sum(
            int(line.rpartition(" ")[2])
            for line in text.splitlines()
            if line.startswith(f'{name}{{model="vectors"')
        )

    names = ("loadmaster_requests_total", "loadmaster_prompt_tokens_total")
    before = [counted(name) for name in names]
    made = client.embeddings.create(model="vectors", input=["a list", "a tuple"])
    requests, tokens = (counted(name) - old for name, old in zip(names, before, strict=True))
    assert (requests, tokens) == (1, made.usage.prompt_tokens)


def test_embeddings_of_token_ids_name_the_clients_switch(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        client.embeddings.create(model="vectors", input=[[1, 2, 3]])


def test_a_model_does_what_it_was_opened_for(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="--embeddings"):
        client.embeddings.create(model="demo", input="a list")
    with pytest.raises(openai.BadRequestError, match="writes no text"):
        client.completions.create(model="vectors", prompt="a list")


def test_a_schema_shapes_the_answer(client: OpenAI) -> None:
    schema: Any = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"],
              "additionalProperties": False}  # fmt: skip
    answer = client.chat.completions.create(
        model="demo",
        messages=ASK,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
        max_tokens=200,  # of 160 seeds the longest answer had 44
        seed=1,
    )
    assert json.loads(answer.choices[0].message.content or "")["x"] in (1, 2)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            model="demo",
            messages=ASK,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {"type": "nonsense"}},
            },
        )


def test_logprobs_are_those_of_the_text(client: OpenAI) -> None:
    fields: Any = {"model": "demo", "messages": ASK, "temperature": 0, "max_tokens": 6}
    answer = client.chat.completions.create(**fields, logprobs=True, top_logprobs=2)
    (choice,) = answer.choices
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens).startswith(choice.message.content)
    for token in tokens:
        assert len(token.top_logprobs) == 2
        assert token.logprob == max(top.logprob for top in token.top_logprobs)
