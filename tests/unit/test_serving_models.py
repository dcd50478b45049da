"""Who is loaded, who makes room and who waits, with engines of words and a budget of ones."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from loadmaster.engine.types import GenerateRequest, SamplingParams, TextEvent
from loadmaster.errors import BusyError, EngineCrashedError, EngineError, LoadmasterError
from loadmaster.plan.types import CPU, Plan
from loadmaster.tasks.opening import Opened
from loadmaster.tasks.planning import PlanOptions, PlanRefusedError
from loadmaster.tasks.serving.host import Serving
from loadmaster.tasks.serving.offers import Offers
from loadmaster.tasks.serving.opening import Ledger, Prepared, Share
from loadmaster.tasks.serving.types import Offer, ServeOptions
from loadmaster.units import MIB, Bytes
from tests.cli_parts import ScriptedEngine, device, opening, plan, refusal, report, settings

SIZES = {"a": 40, "b": 40, "c": 40, "big": 90, "huge": 200}  # MiB; the budget is 100


class Bench:
    """An opener, and everything it opened."""

    def __init__(self) -> None:
        self.engines: dict[str, list[ScriptedEngine]] = {}
        self.closed: list[str] = []
        self.shares: list[Share] = []
        self.scripted: Callable[[ScriptedEngine], None] = lambda engine: None

    def prepare(self, offer: Offer, share: Share) -> Prepared:
        self.shares.append(share)
        taken = sum(ledger[CPU] for ledger in share.taken)
        size = SIZES[offer.model]
        if taken + size * MIB > 100 * MIB:
            raise PlanRefusedError("no room", outcome=refusal(), hint=None)
        made = self._plan(offer.model, size)
        prepared: Any = type("Prepared", (), {})()
        prepared.plan = made
        prepared.open = lambda progress: self._open(offer.model, made)
        found: Prepared = prepared
        return found

    def _plan(self, name: str, size_mib: int) -> Plan:
        one = settings(n_seq_max=2, n_ctx=1024)
        return plan(model_name=name, engine=one, devices=(device(CPU, 300, model=size_mib),))

    def _open(self, name: str, made: Plan) -> Opened:
        from loadmaster.tasks.session import Session

        engine = ScriptedEngine(report(made), ["Hello you"] * 100)
        self.scripted(engine)
        self.engines.setdefault(name, []).append(engine)
        loaded = engine.load(None)  # type: ignore[arg-type]
        session = Session(plan=made, engine=engine, loaded=loaded, opening=opening(engine))
        opened: Any = type("Opened", (), {})()
        opened.session, opened.label, opened.name = session, "", name
        opened.close = engine.close
        one: Opened = opened
        return one

    def close(self, opened: Opened) -> Ledger:
        name: str = opened.name  # type: ignore[attr-defined]
        self.closed.append(name)
        opened.close()
        return {}


def request(request_id: str = "r", max_tokens: int = 8) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id, prompt=(1, 2), max_tokens=max_tokens, sampling=SamplingParams()
    )


def run(bench: Bench, work: Callable[[Serving], Awaitable[None]], **changes: Any) -> Serving:
    """Work with a server of all the models, until its end."""

    async def main() -> Serving:
        offers = Offers([Offer(id=name, model=name) for name in SIZES])
        options = replace(ServeOptions(plan=PlanOptions()), **changes)
        serving = Serving(offers, options, bench, close=bench.close)
        try:
            await asyncio.wait_for(work(serving), 120)
        finally:
            await serving.close()
        return serving

    return asyncio.run(main())


async def ask(serving: Serving, name: str) -> str:
    async with serving.use(name) as model:
        answer = serving.submit(model, [request(model.new_request_id())])
        events = [item.event async for item in answer.events()]
        return "".join(event.text for event in events if isinstance(event, TextEvent))


def ready(serving: Serving) -> list[str]:
    return sorted(m.id for m in serving.models.values() if m.state == "ready")


def test_what_fits_beside_the_others_closes_nobody() -> None:
    bench = Bench()

    async def work(serving: Serving) -> None:
        assert [await ask(serving, name) for name in "ab"] == ["Hello you"] * 2
        assert ready(serving) == ["a", "b"]
        assert bench.closed == []

    run(bench, work)


def test_the_least_recently_used_makes_room_and_no_more_than_needed() -> None:
    bench = Bench()

    async def work(serving: Serving) -> None:
        for name in ("a", "b", "a", "c"):
            await ask(serving, name)
        assert bench.closed == ["b"]
        await ask(serving, "big")
        assert bench.closed == ["b", "a", "c"]
        assert ready(serving) == ["big"]

    run(bench, work)


def test_what_would_not_fit_alone_is_refused_and_nobody_is_closed() -> None:
    bench = Bench()

    async def work(serving: Serving) -> None:
        await ask(serving, "a")
        with pytest.raises(PlanRefusedError) as refused:
            await ask(serving, "huge")
        assert refused.value.code == "insufficient_memory"
        assert bench.closed == []
        assert ready(serving) == ["a"]
        assert await ask(serving, "a") == "Hello you"

    run(bench, work)


def test_a_load_that_fails_leaves_the_model_to_be_asked_for_again() -> None:
    bench = Bench()

    def fails(engine: ScriptedEngine) -> None:
        raise OSError("a text that is for nobody")

    async def work(serving: Serving) -> None:
        bench.scripted = fails
        with pytest.raises(OSError, match="for nobody"):
            await ask(serving, "a")
        assert serving.models["a"].state == "unloaded"
        assert "for nobody" not in serving.events.since(0)[-1].text
        bench.scripted = lambda engine: None
        assert await ask(serving, "a") == "Hello you"

    run(bench, work)


def test_many_who_ask_for_one_model_cause_one_load() -> None:
    bench = Bench()

    async def work(serving: Serving) -> None:
        answers = await asyncio.gather(*(ask(serving, "a") for _ in range(20)))
        assert answers == ["Hello you"] * 20
        assert len(bench.engines["a"]) == 1

    run(bench, work)


def test_a_client_that_gives_up_does_not_stop_the_load() -> None:
    bench = Bench()

    async def work(serving: Serving) -> None:
        asking = asyncio.create_task(ask(serving, "a"))
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert serving.models["a"].users == 0
        while ready(serving) != ["a"]:
            await asyncio.sleep(0.01)

    run(bench, work)


def test_the_queue_has_an_end() -> None:
    bench = Bench()

    async def work(serving: Serving) -> None:
        model = serving.models["a"]
        await serving.ensure(model)
        for _ in range(3):
            model.hold()  # two run, one waits
        with pytest.raises(BusyError) as busy:
            model.hold()
        assert busy.value.http_status == 429
        for _ in range(3):
            model.release()

    run(bench, work, queue_cap=1)


def test_a_model_nobody_uses_is_unloaded() -> None:
    bench = Bench()

    async def work(serving: Serving) -> None:
        await ask(serving, "a")
        while not bench.closed:
            await asyncio.sleep(0.01)
        assert bench.closed == ["a"]
        assert not ready(serving)

    run(bench, work, keep_alive_s=0.05)


def test_after_an_out_of_memory_death_the_next_plan_is_smaller_and_says_so() -> None:
    bench = Bench()

    async def work(serving: Serving) -> None:
        await ask(serving, "a")
        bench.engines["a"][0].failure = EngineCrashedError("the engine ran out of memory")
        while len(bench.engines["a"]) < 2 or ready(serving) != ["a"]:
            await asyncio.sleep(0.01)
        assert bench.shares[-1].at_most == {CPU: Bytes(36 * MIB)}
        texts = [event.text for event in serving.events.since(0)]
        assert any("a tenth less" in text for text in texts)

    run(bench, work)


def test_three_deaths_in_ten_minutes_are_the_end_until_somebody_looks() -> None:
    bench = Bench()

    def dies(engine: ScriptedEngine) -> None:
        engine.failure = EngineCrashedError("the engine was killed by SIGSEGV")

    async def work(serving: Serving) -> None:
        model = serving.models["a"]
        bench.scripted = dies
        await serving.ensure(model)
        while model.state != "failed":
            await asyncio.sleep(0.01)
        assert len(bench.engines["a"]) == 3
        with pytest.raises(EngineError) as down:
            await ask(serving, "a")
        assert down.value.code == "model_failed"
        bench.scripted = lambda engine: None
        assert await serving.unload(model)
        assert await ask(serving, "a") == "Hello you"

    run(bench, work)


def test_a_server_that_ends_takes_no_more_and_closes_every_worker() -> None:
    bench = Bench()

    async def work(serving: Serving) -> None:
        await ask(serving, "a")
        await ask(serving, "b")
        await serving.drain(0)
        with pytest.raises(LoadmasterError) as refused:
            await ask(serving, "a")
        assert refused.value.code == "shutting_down"

    run(bench, work)
    assert all(engine.closed for engines in bench.engines.values() for engine in engines)
