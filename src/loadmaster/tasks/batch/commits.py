"""Results on their way to the disk: several share a sync, none counts before it."""

from loadmaster.jobs.store import JobStore
from loadmaster.jobs.types import Item, ItemResult
from loadmaster.tasks.batch.policy import Clock
from loadmaster.tasks.batch.progress import Tally, Watcher

COMMIT_ITEMS = 64
COMMIT_S = 0.25  # a result waits so long for others


class Commits:
    """Gathers results and commits them together."""

    def __init__(self, store: JobStore, tally: Tally, watcher: Watcher, clock: Clock) -> None:
        self._store = store
        self._tally = tally
        self._watcher = watcher
        self._clock = clock
        self._results: list[ItemResult] = []
        self._verdicts: list[ItemResult] = []
        self._costs: dict[int, int] = {}
        self._oldest_s = 0.0

    def add(self, item: Item, result: ItemResult) -> None:
        """A result to be committed soon. An answer shows that the engine lives: see `hold`."""
        if not self._results:
            self._oldest_s = self._clock.monotonic_s()
        self._results.append(result)
        self._costs[item.number] = item.cost
        if not result.failed:
            self.pass_verdicts()

    def hold(self, item: Item, verdict: ItemResult) -> None:
        """An item seems to kill workers; it fails when a worker has lived since, or at the end."""
        self._verdicts.append(verdict)
        self._costs[item.number] = item.cost

    def pass_verdicts(self) -> None:
        """The items were at fault, not the engine."""
        self._results += self._verdicts
        self._verdicts.clear()

    def patience_s(self, most_s: float) -> float:
        """How long the next result may be waited for."""
        if not self._results:
            return most_s
        age = self._clock.monotonic_s() - self._oldest_s
        return min(most_s, max(0.0, COMMIT_S - age))

    def commit_if_due(self) -> None:
        """Commit if there are many, or if the first has waited long enough."""
        if self._results and (len(self._results) >= COMMIT_ITEMS or self.patience_s(COMMIT_S) <= 0):
            self.commit()

    def commit(self) -> None:
        """Commit what there is.

        Raises:
            JobStoreError: the disk refused; none of it counts.
        """
        results, self._results = self._results, []
        if not results:
            return
        self._store.commit(results)
        self._tally.commit(results, self._costs)
        for result in results:
            self._costs.pop(result.number, None)
        self._watcher.committed(results)
