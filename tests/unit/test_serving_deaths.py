"""What becomes of requests when their worker dies: who goes on, who is told, what is counted."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from loadmaster.engine.types import DoneEvent, GenerateRequest, TextEvent
from loadmaster.errors import EngineCrashedError, LoadmasterError
from loadmaster.plan.types import CPU
from loadmaster.tasks.serving.answer import Answer
from loadmaster.tasks.serving.host import Serving
from loadmaster.tasks.serving.model import ServedModel
from loadmaster.units import MIB
from tests.cli_parts import ScriptedEngine
from tests.unit.test_serving_models import Bench, request, run

CRASH = EngineCrashedError("the engine was killed by SIGSEGV")


class Held:
    """The requests of one engine: they say what the test says."""

    def __init__(self, engine: ScriptedEngine) -> None:
        self.engine = engine
        self.sinks: dict[str, Callable[[str, Any], None]] = {}
        engine.start_request = self._start  # type: ignore[method-assign]

    def _start(self, request: GenerateRequest, sink: Callable[[str, Any], None]) -> None:
        if self.engine.failure is not None:
            raise self.engine.failure
        self.sinks[request.request_id] = sink

    def says(self, request_id: str, text: str) -> None:
        self.sinks[request_id](request_id, TextEvent(request_id=request_id, text=text, n_tokens=1))

    def ends(self, request_id: str) -> None:
        done = self.engine.done(request(request_id), 1)
        self.sinks.pop(request_id)(request_id, done)

    def dies(self, failure: LoadmasterError = CRASH) -> None:
        self.engine.failure = failure
        for name, sink in self.sinks.items():
            sink(name, _failed(name, failure))


def _failed(name: str, failure: LoadmasterError) -> DoneEvent:
    return DoneEvent(
        request_id=name, finish_reason="failed", n_prompt=2, n_cached=0, n_generated=0,
        prefill_s=0.0, decode_s=0.0, error=failure.message,
    )  # fmt: skip


class Stage:
    """A server, model `a` loaded, and every engine it gets."""

    def __init__(self, serving: Serving, engines: list[Held]) -> None:
        self.serving = serving
        self.engines = engines

    @property
    def model(self) -> ServedModel:
        return self.serving.models["a"]

    def ask(self, name: str) -> Answer:
        return self.serving.submit(self.model, [request(name)])

    async def until_engine(self, n: int) -> Held:
        while len(self.engines) < n or self.model.state != "ready":
            await asyncio.sleep(0.005)
        return self.engines[n - 1]

    def texts(self) -> list[str]:
        return [event.text for event in self.serving.events.since(0)]


async def text_of(answer: Answer) -> str:
    events = [item.event async for item in answer.events()]
    return "".join(event.text for event in events if isinstance(event, TextEvent))


async def error_of(answer: Answer) -> LoadmasterError:
    with pytest.raises(LoadmasterError) as raised:
        await text_of(answer)
    return raised.value


def on_stage(work: Callable[[Stage], Awaitable[None]]) -> None:
    """Work on a server whose models run two requests at a time."""
    bench = Bench()
    engines: list[Held] = []
    bench.scripted = lambda engine: engines.append(Held(engine))

    async def main(serving: Serving) -> None:
        stage = Stage(serving, engines)
        await serving.ensure(stage.model)
        await work(stage)

    run(bench, main)


def test_what_had_no_text_yet_goes_on_with_the_next_worker() -> None:
    async def work(stage: Stage) -> None:
        seen, unseen, queued = (stage.ask(name) for name in ("seen", "unseen", "queued"))
        stage.engines[0].says("seen", "Hel")
        await asyncio.sleep(0)
        stage.engines[0].dies()
        second = await stage.until_engine(2)
        assert sorted(second.sinks) == ["queued", "unseen"]
        for name in ("unseen", "queued"):
            second.says(name, name)
            second.ends(name)
        assert await text_of(unseen) == "unseen"
        assert await text_of(queued) == "queued"
        assert (await error_of(seen)) is CRASH

    on_stage(work)


def test_it_keeps_its_place_before_those_who_came_later() -> None:
    async def work(stage: Stage) -> None:
        answers = [stage.ask(name) for name in "abcd"]
        stage.engines[0].dies()
        second = await stage.until_engine(2)
        assert sorted(second.sinks) == ["a", "b"]
        for answer in answers:
            answer.cancel()

    on_stage(work)


def test_what_two_workers_died_of_is_not_begun_a_third_time() -> None:
    async def work(stage: Stage) -> None:
        poison, other = stage.ask("poison"), stage.ask("other")
        stage.engines[0].ends("other")
        await text_of(other)
        stage.engines[0].dies()
        (await stage.until_engine(2)).dies()
        assert (await error_of(poison)) is CRASH
        assert (await stage.until_engine(3)).sinks == {}

    on_stage(work)


def test_a_client_that_is_gone_is_not_begun_anew() -> None:
    async def work(stage: Stage) -> None:
        gone = stage.ask("gone")
        gone.cancel()
        stage.engines[0].dies()
        assert (await stage.until_engine(2)).sinks == {}
        assert stage.model.n_waiting == 0

    on_stage(work)


def test_the_breaker_leaves_nobody_waiting() -> None:
    async def work(stage: Stage) -> None:
        for n in (1, 2):
            (await stage.until_engine(n)).dies()
        third = await stage.until_engine(3)
        answers = [stage.ask(name) for name in "abc"]
        third.dies()
        errors = [await error_of(answer) for answer in answers]
        assert [error.code for error in errors] == ["model_failed"] * 3
        assert stage.model.state == "failed"

    on_stage(work)


def test_a_death_while_the_server_drains_ends_what_waits() -> None:
    async def work(stage: Stage) -> None:
        answer = stage.ask("a")
        stage.serving.closing = True
        stage.engines[0].dies()
        assert (await error_of(answer)).code == "shutting_down"

    on_stage(work)


def test_a_worker_that_dies_while_it_loads_counts_and_is_replaced() -> None:
    bench = Bench()
    loads = iter([True, True, False])

    def dies(engine: ScriptedEngine) -> None:
        if next(loads):
            raise CRASH

    async def work(serving: Serving) -> None:
        bench.scripted = dies
        model = serving.models["a"]
        await serving.ensure(model)
        assert serving.counts["a"].deaths == 2
        assert model.state == "ready"

    run(bench, work)


def test_one_that_always_dies_while_it_loads_is_down() -> None:
    bench = Bench()

    def dies(engine: ScriptedEngine) -> None:
        raise EngineCrashedError("the engine ran out of memory while loading the model")

    async def work(serving: Serving) -> None:
        bench.scripted = dies
        model = serving.models["a"]
        with pytest.raises(LoadmasterError) as down:
            await serving.ensure(model)
        assert down.value.code == "model_failed"
        assert model.state == "failed"
        assert bench.shares[-1].at_most == {CPU: 36 * MIB}  # each plan was smaller
        assert await serving.unload(model)
        bench.scripted = lambda engine: None
        await serving.ensure(model)
        assert bench.shares[-1].at_most is None  # somebody looked at it

    run(bench, work)


def test_the_next_plan_says_how_much_less_it_takes() -> None:
    async def work(stage: Stage) -> None:
        stage.engines[0].dies(EngineCrashedError("the engine ran out of memory"))
        await stage.until_engine(2)
        assert any(
            "a tenth less memory for the engine, at most cpu 36.00 MiB" in text
            for text in stage.texts()
        )

    on_stage(work)
