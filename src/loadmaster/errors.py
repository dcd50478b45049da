"""Every error loadmaster raises on purpose, as one tree.

LoadmasterError                 1   something went wrong
├── UsageError                  2   the command line, a plan file or a request is wrong
├── DoesNotFitError             3   no plan keeps the model inside the budget
├── NotFoundError               4   a file, model or build is not there
├── AuthError                   5   a key or token is missing or refused
├── NetworkError                6   a download failed
├── EngineError                 7   the engine is missing, refused a request or died
│   ├── EngineMissingError      7   no engine build is installed, or it failed its self-test
│   ├── EngineCrashedError      7   the worker process died
│   ├── EngineRefusedError      7   the engine could not load the model or allocate a buffer
│   ├── EngineStalledError      7   the worker answers nothing within its deadline
│   ├── ModelChangedError       7   the model file changed on disk after it was planned
│   └── OverBudgetError         7   measured memory is above the plan
├── FailedItemsError            8   the job finished, some of its items failed
├── BusyError                   9   another process holds it, or the queue is full
├── DamagedFileError           65   a file is malformed, truncated or would abort the engine
└── InterruptedRunError       130   the user stopped it

An error says what and how much in its message, and what to type next in its hint. Its numbers are
in `numbers`, for programs.
"""

from collections.abc import Mapping

Number = int | float | str | None


class LoadmasterError(Exception):
    """Something went wrong, in a way that has a message for a person."""

    exit_code = 1
    http_status = 500
    code = "error"

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        numbers: Mapping[str, Number] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.numbers: dict[str, Number] = dict(numbers or {})


class UsageError(LoadmasterError):
    """The command line, a plan file or a request is wrong."""

    exit_code = 2
    http_status = 400
    code = "invalid_request"


class DoesNotFitError(LoadmasterError):
    """No plan keeps the model inside the budget; `numbers` has the shortfall per device."""

    exit_code = 3
    http_status = 400
    code = "insufficient_memory"


class ContextLengthError(UsageError):
    """A prompt is longer than the room left in `n_ctx`; `numbers` has both."""

    code = "context_length_exceeded"


class NotFoundError(LoadmasterError):
    """A file, model or build is not there."""

    exit_code = 4
    http_status = 404
    code = "not_found"


class AuthError(LoadmasterError):
    """A key or token is missing or refused."""

    exit_code = 5
    http_status = 401
    code = "unauthorized"


class NetworkError(LoadmasterError):
    """A download failed."""

    exit_code = 6
    http_status = 502
    code = "network"


class EngineError(LoadmasterError):
    """The engine is missing, refused a request or died."""

    exit_code = 7
    http_status = 503
    code = "engine_error"


class EngineMissingError(EngineError):
    """No engine build is installed, or it failed its self-test."""

    code = "engine_missing"


class EngineCrashedError(EngineError):
    """The worker process died; `numbers` has its signal or exit status."""

    code = "engine_crashed"


class EngineRefusedError(EngineError):
    """The engine could not load the model or allocate a buffer."""

    code = "engine_refused"


class EngineStalledError(EngineError):
    """The worker answers nothing within its deadline."""

    code = "engine_stalled"


class ModelChangedError(EngineError):
    """The model file changed on disk after it was planned."""

    code = "model_changed"


class OverBudgetError(EngineError):
    """Measured memory is above the plan."""

    code = "over_budget"


class FailedItemsError(LoadmasterError):
    """The job finished, and some of its items failed."""

    exit_code = 8
    code = "failed_items"


class BusyError(LoadmasterError):
    """Another process holds it, or the queue is full."""

    exit_code = 9
    http_status = 429
    code = "busy"


class DamagedFileError(LoadmasterError):
    """A file is malformed, truncated, or would abort the engine.

    `code` is the kind of damage (`not_gguf`, `truncated`, `tensor_out_of_file` …).
    """

    exit_code = 65
    http_status = 400

    def __init__(
        self,
        message: str,
        *,
        code: str,
        hint: str | None = None,
        numbers: Mapping[str, Number] | None = None,
    ) -> None:
        super().__init__(message, hint=hint, numbers=numbers)
        self.code = code


class InterruptedRunError(LoadmasterError):
    """The user stopped it."""

    exit_code = 130
    code = "interrupted"
