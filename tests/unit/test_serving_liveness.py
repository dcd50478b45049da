"""An idle model is asked to decode now and then, and given up when it does not."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from loadmaster.engine.exchange import Exchange
from loadmaster.engine.types import DoneEvent, GenerateRequest
from loadmaster.engine.watch import WEDGED_S, Watcher
from loadmaster.errors import EngineStalledError, LoadmasterError
from loadmaster.plan.types import CPU, Prediction
from loadmaster.tasks.opening import Opened
from loadmaster.tasks.serving.answer import Mailbox
from loadmaster.tasks.serving.liveness import STEP_FLOOR_S, Liveness, step_deadline_s
from loadmaster.units import MIB
from tests.cli_parts import ScriptedEngine, device, plan, report, settings
from tests.engine_parts import request


class Silent(ScriptedEngine):
    """Takes requests and says nothing."""

    def start_request(self, request: GenerateRequest, sink: Any) -> None:
        self.requests.append(request)
        self.sink = sink


def opened_with(engine: ScriptedEngine, pooling: str | None = None) -> Opened:
    made: Any = type("Opened", (), {})()
    made.session = type("Session", (), {})()
    made.session.engine, made.session.plan = engine, plan(devices=(device(CPU, 300, model=10),))
    made.session.loaded = replace(engine.load(None), pooling=pooling)  # type: ignore[arg-type]
    found: Opened = made
    return found


def silent() -> Silent:
    return Silent(report(plan()))


def looking(work: Callable[[Liveness], Awaitable[None]], every_s: float = 30.0) -> None:
    async def main() -> None:
        mailbox = Mailbox(asyncio.get_running_loop())
        await work(Liveness(every_s=every_s, mailbox=mailbox))

    asyncio.run(main())


def pass_time(live: Liveness, opened: Opened | None, start_s: float, seconds: float) -> float:
    """Look every quarter of a second, with nobody asking; the time it is then."""
    for tick in range(1, round(seconds * 4) + 1):
        now = start_s + tick / 4
        live.look(opened, idle_s=now, now=now)
    return start_s + seconds


def test_it_decodes_after_so_long_without_and_not_before() -> None:
    async def work(live: Liveness) -> None:
        engine = silent()
        now = pass_time(live, opened_with(engine), 0, 30)
        assert engine.requests == []
        pass_time(live, opened_with(engine), now, 1)
        (probe,) = engine.requests
        assert (probe.max_tokens, len(probe.prompt), probe.prefix_scope) == (1, 1, "probe")

    looking(work)


def test_it_does_not_while_somebody_asks() -> None:
    async def work(live: Liveness) -> None:
        engine = silent()
        opened = opened_with(engine)
        for tick in range(400):
            live.look(opened, idle_s=0.25 * (tick % 100), now=tick / 4)
        assert engine.requests == []

    looking(work)


def test_zero_is_never() -> None:
    async def work(live: Liveness) -> None:
        engine = silent()
        pass_time(live, opened_with(engine), 0, 200)
        assert engine.requests == []

    looking(work, every_s=0)


def test_a_model_that_does_not_decode_is_given_up() -> None:
    async def work(live: Liveness) -> None:
        engine = silent()
        opened = opened_with(engine)
        now = pass_time(live, opened, 0, 31)
        now = pass_time(live, opened, now, step_deadline_s(opened.session.plan) - 2)
        assert engine.failure is None
        pass_time(live, opened, now, 3)
        assert isinstance(engine.failure, EngineStalledError)
        assert "not decoded one token" in engine.failure.message

    looking(work)


def test_time_in_which_nobody_looked_does_not_count() -> None:
    async def work(live: Liveness) -> None:
        engine = silent()
        opened = opened_with(engine)
        now = pass_time(live, opened, 0, 31)
        live.look(opened, idle_s=now, now=now + 3600)  # the machine slept
        assert engine.failure is None

    looking(work)


def test_one_that_decodes_is_asked_again_a_while_later() -> None:
    async def work(live: Liveness) -> None:
        engine = silent()
        opened = opened_with(engine)
        now = pass_time(live, opened, 0, 30.25)
        engine.sink(engine.requests[0].request_id, engine.done(engine.requests[0], 1))
        await asyncio.sleep(0)
        now = pass_time(live, opened, now, 29)
        assert len(engine.requests) == 1
        pass_time(live, opened, now, 3)
        assert len(engine.requests) == 2
        assert engine.failure is None

    looking(work)


def test_a_slow_model_is_asked_more_rarely() -> None:
    async def work(live: Liveness) -> None:
        engine = silent()
        opened = opened_with(engine)
        now = pass_time(live, opened, 0, 31)
        now = pass_time(live, opened, now, 10)  # its token took 10 s
        engine.sink(engine.requests[0].request_id, engine.done(engine.requests[0], 1))
        await asyncio.sleep(0)
        now = pass_time(live, opened, now, 900)
        assert len(engine.requests) == 1

    looking(work)


def test_a_new_worker_does_not_answer_for_the_old_one() -> None:
    async def work(live: Liveness) -> None:
        first, second = silent(), silent()
        now = pass_time(live, opened_with(first), 0, 31)
        now = pass_time(live, None, now, 1)
        pass_time(live, opened_with(second), now, 20)
        assert first.failure is second.failure is None
        assert second.requests == []

    looking(work)


def test_a_model_for_vectors_embeds() -> None:
    async def work(live: Liveness) -> None:
        engine = silent()
        embedded = asyncio.Event()
        loop = asyncio.get_running_loop()

        def embed(prompts: Any, **_: Any) -> list[list[float]]:
            loop.call_soon_threadsafe(embedded.set)
            return [[1.0] for _ in prompts]

        engine.embed = embed  # type: ignore[method-assign]
        opened = opened_with(engine, pooling="mean")
        pass_time(live, opened, 0, 31)
        await asyncio.wait_for(embedded.wait(), 60)
        assert engine.requests == []

    looking(work)


def test_the_deadline_of_a_step_grows_with_what_it_has_to_do() -> None:
    fast = Prediction(
        decode_tok_s=100.0, prefill_tok_s=1e6, ttft_s=None, bound_by="overhead", basis="table"
    )
    small = plan(devices=(device(CPU, 300, model=0),), predicted=fast, engine=settings(n_seq_max=1))
    assert step_deadline_s(small) == pytest.approx(STEP_FLOOR_S + 0.5, abs=0.1)
    slow = replace(small, predicted=replace(fast, decode_tok_s=0.1))
    assert step_deadline_s(slow) == pytest.approx(STEP_FLOOR_S + 500, abs=1)
    large = replace(small, devices=(device(CPU, 30_000, model=20_000),))
    assert step_deadline_s(large) > STEP_FLOOR_S + 20_000 * MIB / 60e6


def watcher(sink: Callable[[str, Any], None] = lambda name, event: None) -> Watcher:
    """One without a process, with a request open for twenty seconds."""
    made = object.__new__(Watcher)
    made.exchange, made.step_deadline_s, made._fatal = Exchange(), 60.0, None
    made.exchange.begin_request(request("r", [1]), sink)
    next(iter(made.exchange._requests.values())).began_s -= 2 * WEDGED_S
    return made


def beat(made: Watcher, doing: str, age_s: float) -> LoadmasterError | None:
    made._check_deadline({"doing": doing, "age_s": age_s})
    return made._fatal


def test_a_worker_that_has_nothing_to_do_beside_an_open_request_lost_it() -> None:
    assert beat(watcher(), "a step", 2 * WEDGED_S) is None
    assert beat(watcher(), "idle", WEDGED_S / 2) is None  # it ended a moment ago
    assert isinstance(beat(watcher(), "idle", 2 * WEDGED_S), EngineStalledError)


def test_an_idle_worker_without_requests_is_fine() -> None:
    ended: list[object] = []
    made = watcher(lambda name, event: ended.append(event))
    made.exchange.fail_all(EngineStalledError("gone"))
    assert isinstance(ended[0], DoneEvent)
    assert beat(made, "idle", 3600.0) is None
