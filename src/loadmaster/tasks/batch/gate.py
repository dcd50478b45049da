"""Whether a run may start items: open, draining, waiting for its window, or stopped."""

from loadmaster.tasks.batch.policy import Clock, Policy, StopReason


class Gate:
    """The rules of a run, looked at again and again. It starts and cancels nothing itself."""

    def __init__(self, policy: Policy, clock: Clock) -> None:
        self._policy = policy
        self._clock = clock
        self._reason: StopReason | None = None
        self._closed_s = 0.0  # when it last closed, by the clock that does not jump
        self._at_once = False
        self._window_is_open = True
        self._withheld: str | None = None

    def stop(self, reason: StopReason, *, at_once: bool = False) -> None:
        """The run is to end; the first reason counts. Callable from a signal handler."""
        self._at_once = self._at_once or at_once
        if self._reason is None:
            self._closed_s = self._clock.monotonic_s()
            self._reason = reason

    def look(
        self,
        *,
        generated_tokens: int,
        run_s: float,
        cancel_asked: bool,
        withheld: str | None = None,
    ) -> None:
        """Check the limits, the window, and whether others have the model."""
        policy = self._policy
        self._withheld = withheld
        if cancel_asked:
            self._reason = None  # a cancellation outranks whatever else ends the run
            self.stop("cancelled", at_once=True)
        elif policy.max_tokens is not None and generated_tokens >= policy.max_tokens:
            self.stop("token limit")
        elif policy.max_time_s is not None and run_s >= policy.max_time_s:
            self.stop("time limit")
        window = policy.window
        is_open = window is None or window.is_open(self._clock.time_of_day())
        if self._window_is_open and not is_open:
            self._closed_s = self._clock.monotonic_s()
        self._window_is_open = is_open

    @property
    def reason(self) -> StopReason | None:
        """Why the run ends; None while it does not."""
        return self._reason

    @property
    def may_start(self) -> bool:
        """Whether items may start now."""
        return self._reason is None and self._window_is_open and self._withheld is None

    @property
    def waiting(self) -> str | None:
        """What the run waits for; None when it does not."""
        if self._reason is not None:
            return None
        return self._withheld if self._window_is_open else f"waiting for {self._policy.window}"

    @property
    def drain_is_over(self) -> bool:
        """Whether what is still in flight is to be given up."""
        if self.may_start:
            return False
        late = self._clock.monotonic_s() - self._closed_s > self._policy.drain_s
        at_once = self._at_once and self._reason is not None
        return late or at_once or self._withheld is not None
