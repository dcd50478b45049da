"""The lives of a run's workers: the model open or closed, deaths counted, opened again."""

from loadmaster.errors import (
    DoesNotFitError,
    EngineCrashedError,
    EngineError,
    EngineRefusedError,
    LoadmasterError,
    OverBudgetError,
)
from loadmaster.tasks.batch.gate import Gate
from loadmaster.tasks.batch.model import BatchModel
from loadmaster.tasks.batch.policy import Clock
from loadmaster.tasks.batch.progress import Watcher

MOST_DEATHS = 5  # workers in a row that died before an item ended
REOPEN_PAUSES_S = (5.0, 60.0)
HOPELESS = "workers_died"  # the code of a run that ended for `MOST_DEATHS`
# When a window opens, what the day's work has of the memory may be free a little later, and nobody
# is there to try again.
NO_MEMORY = (DoesNotFitError, EngineRefusedError, OverBudgetError, EngineCrashedError)
RETRY_S = 300.0
MOST_RETRIES = 12  # an hour: what does not fit by then never will


class Lives:
    """Whether a run has its model now, and how often it was lost."""

    def __init__(self, model: BatchModel, gate: Gate, watcher: Watcher, clock: Clock) -> None:
        self.is_open = True
        self._model = model
        self._gate = gate
        self._watcher = watcher
        self._clock = clock
        self._deaths_in_a_row = 0
        self._not_before_s = float("-inf")  # when it is tried again
        self._retries = 0

    def proved(self) -> None:
        """An item has ended: this worker lives."""
        self._deaths_in_a_row = 0

    def lost(self, death: LoadmasterError) -> None:
        """The worker died. Opens another, unless the run ends or others need the model first.

        Raises:
            EngineError: too many died in a row, or none opens any more.
        """
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row > MOST_DEATHS:
            raise _hopeless(death, self._deaths_in_a_row)
        if self._gate.reason is None:
            self._watcher.say(f"{death.message}; opening the model again")
            self.is_open = False
            if self._model.withheld is None:
                self.reopen()

    def close(self) -> None:
        """Give the model's memory back for a while."""
        self._model.close()
        self.is_open = False

    def go_on(self, *, patiently: bool) -> None:
        """After a wait: open the model again; `patiently`, for an hour while memory lacks.

        Raises:
            LoadmasterError: it cannot be opened.
        """
        if self._clock.monotonic_s() < self._not_before_s:
            return
        self._watcher.say("going on")
        try:
            self.reopen()
        except NO_MEMORY as error:
            self._retries += 1
            if not patiently or self._retries > MOST_RETRIES:
                raise
            self._not_before_s = self._clock.monotonic_s() + RETRY_S
            self._watcher.say(f"{error.message}; trying again in {RETRY_S / 60:.0f} min")
        else:
            self._retries = 0

    def reopen(self) -> None:
        """Open the model again; a driver may take a while to give a dead process's memory back."""
        for pause_s in REOPEN_PAUSES_S:
            try:
                self._model.reopen()
                break
            except LoadmasterError as error:
                if self._gate.reason is not None:
                    raise
                self._watcher.say(f"{error.message}; trying again in {pause_s:.0f} s")
                self._clock.sleep(pause_s)
        else:
            self._model.reopen()
        self.is_open = True


def _hopeless(death: LoadmasterError, count: int) -> EngineError:
    error = EngineError(
        f"{count} workers in a row died before any item ended, the last one with: {death.message}",
        hint="`loadmaster doctor` checks the machine; `batch resume` goes on from here",
    )
    error.code = HOPELESS
    return error
