"""OpenAI's objects of files and batches, as JSON, and what clients send to make them. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loadmaster.errors import UsageError
from loadmaster.jobs.file_shelf import KeptFile
from loadmaster.jobs.orders import BatchOrder, OrderError
from loadmaster.jobs.types import Counts
from loadmaster.tasks.api.openai_fields import Fields
from loadmaster.tasks.api.openai_requests import URLS
from loadmaster.tasks.batch.policy import parse_duration

Body = dict[str, Any]
Status = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling",
    "cancelled",
]  # fmt: skip

MOST_WINDOW_S = 366 * 86_400.0
_METADATA_KEYS, _KEY_CHARS, _VALUE_CHARS = 16, 64, 512


@dataclass(frozen=True, slots=True, kw_only=True)
class NewBatch:
    """What a client wants a batch to be."""

    input_file_id: str
    endpoint: str
    completion_window: str
    window_s: float
    metadata: Mapping[str, str] | None


def parse_batch(body: object) -> NewBatch:
    """The body of `POST /v1/batches`.

    Raises:
        BadFieldError: a field is missing or cannot be.
    """
    fields = Fields(body)
    for name in ("input_file_id", "endpoint", "completion_window"):
        fields.required(name)
    endpoint = fields.choice("endpoint", URLS)
    window = fields.text("completion_window") or ""
    if fields.get("output_expires_after") is not None:
        raise fields.bad("output_expires_after", "not supported", hint="delete the files yourself")
    return NewBatch(
        input_file_id=fields.text("input_file_id") or "",
        endpoint=endpoint or "",
        completion_window=window,
        window_s=_window_s(fields, window),
        metadata=_metadata(fields),
    )


def _window_s(fields: Fields, window: str) -> float:
    try:
        seconds = parse_duration(window)
    except UsageError:
        seconds = 0.0
    if not 0 < seconds <= MOST_WINDOW_S:
        raise fields.bad("completion_window", "not a time", hint="`24h`, `90m`, `7d`")
    return seconds


def _metadata(fields: Fields) -> Mapping[str, str] | None:
    value = fields.get("metadata")
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > _METADATA_KEYS:
        raise fields.bad("metadata", f"not an object of at most {_METADATA_KEYS} keys")
    for key, text in value.items():
        if len(key) > _KEY_CHARS or not isinstance(text, str) or len(text) > _VALUE_CHARS:
            message = (
                f"a key has more than {_KEY_CHARS} characters, or a value is no text of "
                f"at most {_VALUE_CHARS}"
            )
            raise fields.bad("metadata", message)
    return dict(value)


# -- objects


def file_object(card: KeptFile) -> Body:
    """A file as OpenAI describes it."""
    value: Body = {
        "id": card.file_id,
        "object": "file",
        "bytes": card.size_bytes,
        "created_at": int(card.created_s),
        "filename": card.filename,
        "purpose": card.purpose,
        "status": "processed",
        "status_details": None,
    }
    if card.expires_s is not None:
        value["expires_at"] = int(card.expires_s)
    return value


def deleted_object(file_id: str) -> Body:
    """The answer to the deletion of a file."""
    return {"id": file_id, "object": "file", "deleted": True}


def page_object(entries: Sequence[Body], *, has_more: bool) -> Body:
    """A page of a list."""
    return {
        "object": "list",
        "data": list(entries),
        "first_id": entries[0]["id"] if entries else None,
        "last_id": entries[-1]["id"] if entries else None,
        "has_more": has_more,
    }


def status_of(order: BatchOrder, *, has_job: bool) -> Status:
    """What a batch is at."""
    if order.end is not None:
        return order.end.status
    if order.cancelling_s is not None:
        return "cancelling"
    if order.finalizing_s is not None:
        return "finalizing"
    return "in_progress" if has_job else "validating"


def batch_object(order: BatchOrder, counts: Counts | None) -> Body:
    """A batch as OpenAI describes it; `counts` of its job, if there is one yet."""
    end = order.end
    status = status_of(order, has_job=counts is not None)
    counts = counts or Counts(done=0, failed=0, left=0)
    return {
        "id": order.batch_id,
        "object": "batch",
        "endpoint": order.endpoint,
        "model": order.model,
        "errors": _errors(end.errors) if end and end.errors else None,
        "input_file_id": order.input_file_id,
        "completion_window": order.completion_window,
        "status": status,
        "output_file_id": order.output_file_id if end and end.has_output else None,
        "error_file_id": order.error_file_id if end and end.has_errors else None,
        "created_at": int(order.created_s),
        "expires_at": int(order.expires_s),
        **_times(order),
        "request_counts": {
            "total": counts.total, "completed": counts.done, "failed": counts.failed
        },
        "usage": _usage(counts),
        "metadata": order.metadata,
    }  # fmt: skip


def _times(order: BatchOrder) -> Body:
    """When a batch reached each status; None for those it has not reached."""
    ended = {f"{status}_at": None for status in ("completed", "failed", "expired", "cancelled")}
    times: dict[str, float | None] = {
        "in_progress_at": order.in_progress_s,
        "finalizing_at": order.finalizing_s,
        "cancelling_at": order.cancelling_s,
        **ended,
    }
    if order.end is not None:
        times[f"{order.end.status}_at"] = order.end.at_s
    return {name: None if value is None else int(value) for name, value in times.items()}


def _errors(errors: Sequence[OrderError]) -> Body:
    data = [
        {"code": one.code, "line": one.line, "message": one.message, "param": None}
        for one in errors
    ]
    return {"object": "list", "data": data}


def _usage(counts: Counts) -> Body:
    return {
        "input_tokens": counts.prompt_tokens,
        "input_tokens_details": {"cached_tokens": counts.cached_tokens},
        "output_tokens": counts.generated_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": counts.prompt_tokens + counts.generated_tokens,
    }
