"""Request bodies of OpenAI's API: what they become, and which field an error names."""

from typing import Any

import pytest

from loadmaster.tasks.api.openai_requests import (
    BadFieldError,
    parse_chat,
    parse_completion,
    parse_embedding,
    parse_request,
    stable_seed,
)


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}


def test_a_chat_with_every_field() -> None:
    body = chat_body(
        max_tokens=9, max_completion_tokens=7, temperature=0.5, top_p=0.9, top_k=-1, min_p=0.1,
        repetition_penalty=1.1, presence_penalty=0.5, logit_bias={"7": -100}, seed=-1, stop="END",
        n=3, logprobs=True, top_logprobs=2,
        response_format={"type": "json_object"}, stream=True,
        stream_options={"include_usage": True}, user="someone", metadata={"a": "b"}, tools=[],
    )  # fmt: skip
    generation = parse_chat(body).generation
    request = generation.request("id", [1, 2], index=2, default_seed=5, priority=1)
    assert (request.max_tokens, request.stop, request.top_logprobs) == (7, ("END",), 2)
    assert request.json_schema == '{"type": "object"}'
    assert request.sampling.seed == 1  # -1 and the index, in 32 bits
    assert (request.sampling.top_k, request.sampling.repeat_penalty) == (0, 1.1)
    assert request.sampling.logit_bias == ((7, -100.0),)
    assert request.sampling.presence_penalty == 0.5
    assert (generation.n, generation.stream, generation.include_usage) == (3, True, True)


def test_messages_become_what_a_template_takes() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "d"}, {"role": "user", "content": parts}]
    assert parse_chat(chat_body(messages=messages)).messages == (
        {"role": "system", "content": "d"},
        {"role": "user", "content": "ab"},
    )


def test_a_seed_that_is_not_named_is_the_callers() -> None:
    generation = parse_chat(chat_body()).generation
    assert generation.request("id", [1], default_seed=7).sampling.seed == 7
    assert stable_seed("a") == stable_seed("a") != stable_seed("b")


def test_a_request_gets_no_more_than_the_room_there_is() -> None:
    generation = parse_chat(chat_body()).generation
    assert generation.request("id", [1]).max_tokens is None
    assert generation.request("id", [1], room=10).max_tokens == 10
    short = parse_chat(chat_body(max_tokens=5)).generation
    assert short.request("id", [1], room=10).max_tokens == 5


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", ("a",)), (["a", "b"], ("a", "b")), ([1, 2], ((1, 2),)), ([[1], "b"], ((1,), "b"))],
)
def test_prompts_are_text_or_tokens(prompt: object, expected: object) -> None:
    assert parse_completion({"prompt": prompt}).prompts == expected
    assert parse_embedding({"input": prompt}).inputs == expected


def test_a_json_schema_is_carried_as_text() -> None:
    schema = {"type": "object"}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    generation = parse_chat(chat_body(response_format=wanted)).generation
    assert generation.json_schema == '{"type": "object"}'


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": ["x"]}, "messages[0]"),
        ({"model": 3}, "model"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"n": 0}, "n"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"seed": "x"}, "seed"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logit_bias": {"hi": 5}}, "logit_bias.hi"),
        ({"logit_bias": {"1": 500}}, "logit_bias.1"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {}}, "response_format.type"),
    ],
)
def test_an_error_names_its_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadFieldError) as caught:
        parse_chat(chat_body(**fields))
    assert caught.value.param == param
    assert f"`{param}`" in caught.value.message
    assert caught.value.http_status == 400


@pytest.mark.parametrize("prompt", [None, "", [], [""], [[]], [1.5], {"a": 1}, [-1], ["a", 3]])
def test_a_prompt_that_is_none_is_refused(prompt: object) -> None:
    with pytest.raises(BadFieldError):
        parse_completion({"prompt": prompt})


def test_best_of_is_refused_where_it_would_choose() -> None:
    assert parse_completion({"prompt": "a", "n": 2, "best_of": 2}).generation.n == 2
    with pytest.raises(BadFieldError, match="best_of"):
        parse_completion({"prompt": "a", "best_of": 2})


def test_endpoints_go_by_their_url() -> None:
    assert parse_request("/v1/completions", {"prompt": "a"})
    with pytest.raises(BadFieldError, match="not an endpoint"):
        parse_request("/v1/images", {})
    with pytest.raises(BadFieldError, match="not an object"):
        parse_request("/v1/completions", [])
