"""Jobs on served models: when they get one, and how fast they give it back."""

import asyncio
import math
from collections.abc import Awaitable, Callable

import pytest

from loadmaster.errors import BusyError, EngineCrashedError, EngineError, InterruptedRunError
from loadmaster.tasks.opening import Opened
from loadmaster.tasks.planning import PlanRefusedError
from loadmaster.tasks.serving.guests import WAITING, Guest
from loadmaster.tasks.serving.host import Serving
from loadmaster.tasks.serving.visits import entertain
from tests.cli_parts import ScriptedEngine
from tests.unit.test_serving_models import Bench, ask, ready, request, run

NEVER_S = 1e9


class Worker:
    """A job that has the model as soon as it may, and leaves at once when asked."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.n_visits = 0
        guest.wake = self.look

    def look(self) -> None:
        if self.guest.withheld is not None:
            self.guest.close()
            return
        self.guest.reopen()
        self.n_visits += 1


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(20_000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came to that")


def with_job(
    name: str, work: Callable[[Serving, Worker], Awaitable[None]]
) -> Callable[[Serving], Awaitable[None]]:
    """Work while a job wants a model."""

    async def main(serving: Serving) -> None:
        worker = Worker(Guest(serving.models[name], prefix_scope="mine"))
        visit = asyncio.create_task(entertain(serving, serving.models[name], worker.guest))
        try:
            await work(serving, worker)
        finally:
            visit.cancel()
            await asyncio.gather(visit, return_exceptions=True)
        assert serving.models[name].visitor is None

    return main


def test_a_job_loads_what_fits_beside_and_keeps_it_from_being_idle() -> None:
    bench = Bench()

    async def work(serving: Serving, worker: Worker) -> None:
        await until(lambda: worker.n_visits == 1)
        assert ready(serving) == ["b"]
        assert math.isinf(serving.models["b"].expires_in_s)
        assert serving.models["b"].is_idle
        assert worker.guest.withheld is None
        assert worker.guest.n_sequences == 2

    run(bench, with_job("b", work), keep_alive_s=0.0)


def test_a_job_never_closes_what_people_used_lately() -> None:
    bench = Bench()

    async def work(serving: Serving, worker: Worker) -> None:
        await ask(serving, "a")
        with pytest.raises(BusyError, match="models of people"):
            await serving.load_for_job(serving.models["big"])
        assert ready(serving) == ["a"]
        assert serving.models["big"].state == "unloaded"
        assert worker.guest.withheld == WAITING
        with pytest.raises(EngineError):
            worker.guest.reopen()

    run(bench, with_job("huge", work), job_patience_s=NEVER_S)


def test_a_job_takes_the_place_of_what_nobody_uses_and_of_no_other_job() -> None:
    bench = Bench()

    async def work(serving: Serving) -> None:
        await ask(serving, "a")
        await serving.load_for_job(serving.models["big"])
        assert bench.closed == ["a"]
        serving.models["big"].visitor = Guest(serving.models["big"], prefix_scope="")
        with pytest.raises(BusyError):
            await serving.load_for_job(serving.models["a"])
        serving.models["big"].visitor = None

    run(bench, work, job_patience_s=0.0)


def test_what_does_not_fit_alone_is_refused_to_a_job_too() -> None:
    async def work(serving: Serving) -> None:
        with pytest.raises(PlanRefusedError):
            await serving.load_for_job(serving.models["huge"])
        assert serving.models["huge"].state == "unloaded"

    run(Bench(), work)


def test_a_person_gets_the_memory_of_a_jobs_model_and_the_job_comes_back() -> None:
    bench = Bench()

    async def work(serving: Serving, worker: Worker) -> None:
        await until(lambda: worker.n_visits == 1)
        assert await ask(serving, "a") == "Hello you"
        assert bench.closed == ["big"]
        await until(lambda: worker.n_visits == 2)
        assert bench.closed == ["big", "a"]

    run(bench, with_job("big", work), job_patience_s=0.3)


def test_a_job_that_had_to_go_stays_away_until_somebody_asks() -> None:
    bench = Bench()

    async def work(serving: Serving, worker: Worker) -> None:
        model = serving.models["b"]
        await until(lambda: worker.n_visits == 1)
        model.turned_out_s = -math.inf
        assert await serving.unload(model)
        await until(lambda: model.visitor is None)
        await asyncio.sleep(0.5)
        assert model.state == "unloaded"
        assert worker.guest.withheld is not None
        await ask(serving, "b")
        await until(lambda: worker.n_visits == 2)

    run(bench, with_job("b", work), job_patience_s=NEVER_S)


def test_a_load_for_a_job_ends_when_a_person_wants_another_model() -> None:
    """The watcher of a load is asked now and then whether it is still wanted."""

    async def work(serving: Serving) -> None:
        progress = serving._progress(serving.models["a"], for_job=True)
        progress.loading(0.1)
        serving._loads["a"] = serving._background(asyncio.sleep(0))
        progress.loading(0.2)  # the same one: go on
        serving._loads["b"] = serving._background(asyncio.sleep(0))
        with pytest.raises(InterruptedRunError):
            progress.loading(0.3)
        serving._progress(serving.models["a"], for_job=False).loading(0.3)
        serving._loads.clear()

    run(Bench(), work)


def test_deaths_while_a_job_has_the_model_do_not_take_it_from_people() -> None:
    bench = Bench()

    async def work(serving: Serving, worker: Worker) -> None:
        for count in range(1, 5):
            await until(lambda count=count: worker.n_visits == count)  # type: ignore[misc]
            bench.engines["b"][-1].failure = EngineCrashedError("it died")
        await until(lambda: worker.n_visits == 5)
        assert serving.counts["b"].deaths == 4
        assert await ask(serving, "b") == "Hello you"

    run(bench, with_job("b", work))


def test_a_guest_asks_in_its_owners_scope_and_counts_what_is_in_flight() -> None:
    bench = Bench()
    held: list[Callable[[], None]] = []

    def holds(engine: ScriptedEngine) -> None:
        def start(one: object, sink: Callable[..., None]) -> None:
            engine.requests.append(one)  # type: ignore[arg-type]
            held.append(lambda: sink("r", engine.done(one, 1)))  # type: ignore[arg-type]

        engine.start_request = start  # type: ignore[assignment]

    async def work(serving: Serving, worker: Worker) -> None:
        await until(lambda: worker.n_visits == 1)
        heard: list[object] = []
        worker.guest.start(request(), lambda request_id, event: heard.append(event))
        assert serving.models["b"].row().n_items == 1
        assert serving.models["b"].row().n_running == 0
        assert bench.engines["b"][0].requests[0].prefix_scope == "mine"
        held[0]()
        assert len(heard) == 1
        assert serving.models["b"].row().n_items == 0

    bench.scripted = holds
    run(bench, with_job("b", work))


def test_a_guest_that_is_asked_to_leave_before_it_came_is_gone() -> None:
    async def work(serving: Serving) -> None:
        await ask(serving, "a")
        model = serving.models["a"]
        guest = Guest(model, prefix_scope="")
        opened: Opened = model.live
        guest.grant(opened)
        await guest.granted()
        guest.ask_to_leave("others need it")
        await asyncio.wait_for(guest.gone(), 1)
        assert guest.withheld == "others need it"
        guest.grant(opened)
        guest.reopen()
        assert guest.withheld is None
        guest.ask_to_leave("again")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(guest.gone(), 0.05)
        guest.close()
        await asyncio.wait_for(guest.gone(), 1)

    run(Bench(), work)
