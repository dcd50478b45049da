"""Errors over HTTP, in the form that the client of each route reads."""

from typing import Any

from starlette.responses import Response

from loadmaster.errors import (
    BusyError,
    EngineCrashedError,
    EngineError,
    EngineStalledError,
    LoadmasterError,
)
from loadmaster.interfaces.http.writing import dumps
from loadmaster.tasks.api.openai_answers import error_body

_RETRY_AFTER_S = 2
_PASSING = ("shutting_down",)  # codes of errors that another try may not meet


class InternalError(LoadmasterError):
    """A defect of ours; what it was is in the server's log and not in the answer."""

    http_status = 500
    code = "internal"


def as_ours(error: BaseException) -> LoadmasterError:
    """Any exception as one of ours; a foreign one tells its type alone, never its text."""
    if isinstance(error, LoadmasterError):
        return error
    return InternalError(f"the server failed: {type(error).__name__}")


def error_response(error: LoadmasterError, *, path: str) -> Response:
    """The response to a request that failed."""
    return Response(
        content=dumps(body_for(error, path)),
        status_code=error.http_status,
        media_type="application/json",
        headers=_headers(error),
    )


def body_for(error: LoadmasterError, path: str) -> Any:
    """OpenAI's error object, or Ollama's or Anthropic's on their own routes."""
    if path.startswith("/api/"):
        return {"error": error_body(error)["error"]["message"]}
    if path.startswith("/v1/messages"):
        return {
            "type": "error",
            "error": {
                "type": _anthropic_type(error),
                "message": error_body(error)["error"]["message"],
            },
        }
    return error_body(error)


def _anthropic_type(error: LoadmasterError) -> str:
    by_status = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
        503: "overloaded_error",
    }
    other = "invalid_request_error" if error.http_status < 500 else "api_error"
    return by_status.get(error.http_status, other)


def may_pass(error: LoadmasterError) -> bool:
    """Whether the same request may succeed later: a worker is replaced, a queue gets shorter."""
    passing = isinstance(error, BusyError | EngineCrashedError | EngineStalledError)
    plain = type(error) is EngineError and error.code == EngineError.code
    return passing or plain or error.code in _PASSING


def _headers(error: LoadmasterError) -> dict[str, str]:
    if error.http_status == 408:  # the rest of the request may still come, and is for nobody
        return {"connection": "close"}
    if error.http_status < 500 and error.http_status != 429:
        return {}
    if may_pass(error):
        return {"retry-after": str(error.numbers.get("retry_after_s") or _RETRY_AFTER_S)}
    return {"x-should-retry": "false"}  # clients would load the model twice more
