"""OpenAI's objects of batches, and what may be asked for."""

from dataclasses import replace
from typing import Any

import pytest

from loadmaster.jobs.orders import BatchOrder, OrderEnd, OrderError
from loadmaster.jobs.types import Counts
from loadmaster.tasks.api.batch_objects import batch_object, page_object, parse_batch, status_of
from loadmaster.tasks.api.openai_fields import BadFieldError

BODY: dict[str, Any] = {
    "input_file_id": "file-1", "endpoint": "/v1/completions", "completion_window": "24h"
}  # fmt: skip
ORDER = BatchOrder(
    batch_id="batch_1", owner="", endpoint="/v1/completions", input_file_id="file-1",
    completion_window="24h", created_s=1.5, expires_s=100.0, output_file_id="file-2",
    error_file_id="file-3",
)  # fmt: skip
COUNTS = Counts(
    done=2, failed=1, left=3, prompt_tokens=10, cached_tokens=4, generated_tokens=5
)  # fmt: skip


def test_an_order_is_read() -> None:
    new = parse_batch({**BODY, "metadata": {"night": "first"}})
    assert (new.endpoint, new.window_s) == ("/v1/completions", 86_400)
    assert new.metadata == {"night": "first"}
    assert parse_batch({**BODY, "completion_window": "7d"}).window_s == 7 * 86_400


@pytest.mark.parametrize(
    ("param", "changes"),
    [
        ("input_file_id", {"input_file_id": None}),
        ("input_file_id", {"input_file_id": 1}),
        ("endpoint", {"endpoint": "/v1/responses"}),
        ("endpoint", {"endpoint": None}),
        ("completion_window", {"completion_window": "soon"}),
        ("completion_window", {"completion_window": "9999d"}),
        ("metadata", {"metadata": {str(n): "" for n in range(17)}}),
        ("metadata", {"metadata": {"a": 1}}),
        ("metadata", {"metadata": {"a": "x" * 513}}),
        ("metadata", {"metadata": {"k" * 65: "x"}}),
        ("metadata", {"metadata": []}),
        ("output_expires_after", {"output_expires_after": {"seconds": 3600}}),
    ],
)
def test_a_bad_order_names_its_field(param: str, changes: dict[str, Any]) -> None:
    with pytest.raises(BadFieldError) as refusal:
        parse_batch({**BODY, **changes})
    assert refusal.value.param == param


def test_statuses_follow_the_order_and_its_job() -> None:
    assert status_of(ORDER, has_job=False) == "validating"
    assert status_of(ORDER, has_job=True) == "in_progress"
    assert status_of(replace(ORDER, cancelling_s=2.0), has_job=True) == "cancelling"
    assert status_of(replace(ORDER, finalizing_s=2.0), has_job=True) == "finalizing"
    end = OrderEnd(status="expired", at_s=3.0)
    both = replace(ORDER, cancelling_s=2.0, finalizing_s=2.0, end=end)
    assert status_of(both, has_job=True) == "expired"


def test_files_are_named_when_the_batch_is_at_its_end() -> None:
    running = batch_object(ORDER, COUNTS)
    assert running["output_file_id"] is None
    assert running["request_counts"] == {"total": 6, "completed": 2, "failed": 1}
    assert running["usage"]["total_tokens"] == 15
    end = OrderEnd(status="completed", at_s=3.9, counts=COUNTS, has_output=True)
    ended = batch_object(replace(ORDER, end=end), COUNTS)
    assert (ended["output_file_id"], ended["error_file_id"]) == ("file-2", None)
    assert (ended["completed_at"], ended["failed_at"]) == (3, None)


def test_errors_of_lines_are_listed() -> None:
    errors = (OrderError(code="invalid_line", message="not JSON", line=7),)
    end = OrderEnd(status="failed", at_s=3.0, errors=errors)
    value = batch_object(replace(ORDER, end=end), None)
    assert value["errors"]["data"] == [
        {"code": "invalid_line", "line": 7, "message": "not JSON", "param": None}
    ]


def test_a_page_names_its_ends() -> None:
    page = page_object([{"id": "a"}, {"id": "b"}], has_more=True)
    assert (page["first_id"], page["last_id"], page["has_more"]) == ("a", "b", True)
    assert page_object([], has_more=False)["first_id"] is None
