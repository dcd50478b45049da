"""Why requests end that are not to blame: a worker that died, a model that is down, a server that
ends."""

from collections import deque

from loadmaster.errors import EngineError, LoadmasterError

# After so many deaths in so long a time a model is not loaded again by itself.
BREAKER_DEATHS = 3
BREAKER_S = 600.0


def is_out_of_memory(failure: LoadmasterError) -> bool:
    """Whether a worker died for want of memory, as its post-mortem words it."""
    text = f"{failure.message} {failure.hint or ''}"
    return "out of memory" in text or "give it more memory" in text


def model_failed(model: str, failure: LoadmasterError) -> EngineError:
    """The error of a model that stays down."""
    error = EngineError(
        f"the worker of `{model}` died {BREAKER_DEATHS} times in {BREAKER_S / 60:.0f} minutes, "
        f"last: {failure.message}",
        hint=f"`loadmaster stop {model}` lets it be loaded again",
    )
    error.code = "model_failed"
    return error


def shutting_down() -> EngineError:
    """The error of requests that the server does not take any more, or does not finish."""
    error = EngineError("the server is shutting down", hint="send the request again later")
    error.code = "shutting_down"
    return error


class Breaker:
    """Counts the deaths of models' workers, and says when a model is to stay down."""

    def __init__(self) -> None:
        self._deaths: dict[str, deque[float]] = {}

    def count(self, model: str, failure: LoadmasterError, now: float) -> EngineError | None:
        """Note a death; the error of a model that is down from now on."""
        deaths = self._deaths.setdefault(model, deque(maxlen=BREAKER_DEATHS))
        deaths.append(now)
        if len(deaths) < BREAKER_DEATHS or deaths[-1] - deaths[0] > BREAKER_S:
            return None
        return model_failed(model, failure)

    def close(self, model: str) -> None:
        """Forget what was: the model may be loaded again."""
        self._deaths.pop(model, None)
