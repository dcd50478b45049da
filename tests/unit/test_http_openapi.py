"""The OpenAPI document says what is answered: every route, its statuses, its fields."""

from typing import Any

import pytest

from benchmarks.serving.bodies import Bodies, operations
from benchmarks.serving.conform import complaints
from loadmaster.interfaces.http.app import routes
from loadmaster.interfaces.http.openapi import document
from loadmaster.interfaces.http.openapi_shapes import SHAPES

DOCUMENT = document(routes())


def listed() -> set[tuple[str, str]]:
    return {(one.method, one.path) for one in operations(DOCUMENT)}


def test_the_tables_are_of_the_routes_that_there_are() -> None:
    assert set(SHAPES) == listed()


@pytest.mark.parametrize(
    "operation", operations(DOCUMENT), ids=lambda one: f"{one.method} {one.path}"
)
def test_an_operation_tells_its_errors_in_the_form_of_its_api(operation: Any) -> None:
    responses = operation.spec["responses"]
    assert {"403", "413"} <= set(responses)
    assert ("401" in responses) == (operation.path != "/health")
    for status, response in responses.items():
        if status == "200":
            continue
        reference = response["content"]["application/json"]["schema"]["$ref"]
        expected = (
            "ollama_error" if operation.path.startswith("/api/")
            else "anthropic_error" if operation.path.startswith("/v1/messages")
            else "error"
        )  # fmt: skip
        assert reference.endswith(f"/{expected}")


def test_a_path_and_its_parameters_agree() -> None:
    for operation in operations(DOCUMENT):
        for name in operation.in_path:
            assert f"{{{name}}}" in operation.path


ERROR = {"$ref": "#/components/schemas/error"}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"error": {"message": "m", "type": "t", "param": None, "code": "c"}}, None),
        ({"error": {"message": "m", "type": "t", "param": 1, "code": "c"}}, "param is int"),
        ({"error": {"message": "m", "type": "t", "param": None}}, "code is missing"),
        ({"error": "m"}, "error is str"),
        ([], "is list"),
    ],
)
def test_what_is_not_as_the_document_says_is_noticed(value: Any, words: str | None) -> None:
    found = next(complaints(value, ERROR, DOCUMENT), None)
    assert (found is None) if words is None else (words in str(found))


def test_bodies_made_from_the_document_are_as_it_allows() -> None:
    import random

    for operation in operations(DOCUMENT):
        if operation.body is not None:
            source = Bodies(operation.body, random.Random(1), ("demo",))
            for all_fields in (False, True):
                body = source.right(all_fields=all_fields)
                assert list(complaints(body, operation.body, DOCUMENT)) == []
            assert sum(1 for _ in source.wrong()) > 1000
