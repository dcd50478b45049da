"""Which plan a model gets beside the open ones, and which of them it replaces."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor

from loadmaster.errors import BusyError
from loadmaster.plan.types import Plan
from loadmaster.tasks.planning import PlanRefusedError
from loadmaster.tasks.serving.model import ServedModel
from loadmaster.tasks.serving.opening import (
    Ledger,
    ModelOpener,
    Prepared,
    Share,
    ledger_of,
    reduced,
)


class Fitting:
    """Plans one model beside the others. It closes none: the caller does, and asks again."""

    def __init__(
        self,
        opener: ModelOpener,
        models: Callable[[], Iterable[ServedModel]],
        threads: Executor,
        *,
        job_patience_s: float,
    ) -> None:
        """`models` are all of the server; a job waits for those used within `job_patience_s`."""
        self._opener = opener
        self._models = models
        self._threads = threads
        self._job_patience_s = job_patience_s
        self._at_most: dict[str, Ledger] = {}  # after an out-of-memory death

    # -- the caps of one model

    def take_less(self, model: ServedModel, plan: Plan) -> None:
        """The next plan of a model has less memory than this one, with which it ran out of it."""
        self._at_most[model.id] = reduced(plan)

    def is_limited(self, model: ServedModel) -> bool:
        """Whether its next plan has less memory than there is."""
        return model.id in self._at_most

    def forget_limit(self, model: ServedModel) -> None:
        """Plan it as if it had never run out of memory."""
        self._at_most.pop(model.id, None)

    # -- plans

    async def choose(
        self, model: ServedModel, *, for_job: bool
    ) -> tuple[Prepared, Sequence[ServedModel]]:
        """A plan, and whom it replaces: as few as will do, idle ones first, least recently used.

        Raises:
            PlanRefusedError: it would not fit if every other model were closed.
            BusyError: it would fit, but what is in the way does not give way to a job.
        """
        beside = self._open_beside(model)
        patience_s = self._job_patience_s
        stay = [other for other in beside if for_job and not other.yields_to_job(patience_s)]
        others = [other for other in beside if other not in stay]
        others.sort(key=lambda other: (not other.is_idle, other.last_used_s))
        for count in range(len(others) + 1):
            try:
                prepared = await self._prepare(model, [*stay, *others[count:]], others[:count])
            except PlanRefusedError as refusal:
                if count == len(others) and stay:
                    raise BusyError("its memory is in use by models of people") from refusal
                if count == len(others):
                    raise
            else:
                return prepared, others[:count]
        raise AssertionError("unreachable")

    async def beside_open(self, model: ServedModel) -> Prepared:
        """The plan that a model gets beside all that are open.

        Raises:
            PlanRefusedError: it does not fit beside them.
        """
        return await self._prepare(model, self._open_beside(model), ())

    def _open_beside(self, model: ServedModel) -> list[ServedModel]:
        return [m for m in self._models() if m is not model and m.opened is not None]

    async def _prepare(
        self, model: ServedModel, stay: Sequence[ServedModel], go: Sequence[ServedModel]
    ) -> Prepared:
        share = Share(
            taken=tuple(ledger_of(m.live.session.plan) for m in stay),
            coming_back=tuple(ledger_of(m.live.session.plan) for m in go),
            at_most=self._at_most.get(model.id),
        )
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._opener.prepare, model.offer, share)
