"""Workers that are killed, stopped or hang while clients wait, run and queue."""

import asyncio
import os
import random
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.serving.client import Asking, Seen, ask, chat, verdict
from benchmarks.serving.server import Ends, Server, serving
from benchmarks.serving.tally import Tally, Truth, fake_truth

KILLS = (signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV)
BREAKER = 3  # deaths in ten minutes
FAKE_TOKENS = 100
FAST = {"tok_s": 200.0, "prefill_tok_s": 20_000.0}
# A step without an end: after some tokens of four streams, or after as many probes as that.
HANG = {False: {"at_step": 60, "seconds": 1e6}, True: {"at_step": 20, "seconds": 1e6}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What clients ask while the worker dies: more than runs at a time."""

    bodies: Sequence[Mapping[str, Any]]
    truth: Truth | None
    latest_s: float  # the worker is hit at a random moment up to here


def fake_load() -> Load:
    """Streams and whole answers of the fake engine, three times as many as run."""
    return Load(
        bodies=[chat(f"load {i}", stream=i % 3 != 2, max_tokens=FAKE_TOKENS) for i in range(12)],
        truth=fake_truth(FAKE_TOKENS),
        latest_s=1.2,
    )


async def kills(
    server: Server, load: Load, n: int, tally: Tally, chance: random.Random
) -> list[Seen]:
    """Kill the worker `n` times under load; every third death brings the model down."""
    seen: list[Seen] = []
    for number in range(n):
        last = number % BREAKER == BREAKER - 1
        seen += await _one_kill(server, load, KILLS[number % 3], tally, chance, broken=last)
        if last:
            await _check_down(server, tally)
            await server.reset()
    return seen


async def _one_kill(
    server: Server, load: Load, number: int, tally: Tally, chance: random.Random, *, broken: bool
) -> list[Seen]:
    worker = await _idle_worker(server)
    asked = [asyncio.create_task(ask(server.port, dict(body))) for body in load.bodies]
    await asyncio.sleep(chance.uniform(0, load.latest_s))
    os.kill(worker, number)
    struck = time.monotonic()
    seen = await asyncio.gather(*asked)
    _count(seen, struck, load, tally, broken=broken)
    return seen


async def _idle_worker(server: Server) -> int:
    """The one that waits for work. One that was hit after its last answer is gone before the
    server says so."""
    while True:
        await server.until_idle()
        worker = server.worker()
        if worker is not None:
            return worker
        await asyncio.sleep(0.02)


def _count(seen: Sequence[Seen], struck: float, load: Load, tally: Tally, *, broken: bool) -> None:
    for one in seen:
        found = tally.add(one, load.truth)
        crashed = found in ("error", "refused") and one.errors[0] != "model_failed"
        if crashed:
            tally.detection_s.append(one.ended_s - struck)
        # A whole answer has no text before its end: it may have had some when the worker died.
        streamed = one.headers.get("content-type", "").startswith("text/event-stream")
        if streamed and not one.text and found != "whole" and not broken:
            tally.lost += 1
            tally.surprises.append(f"lost: {one.errors}")


async def _check_down(server: Server, tally: Tally) -> None:
    row = await server.until(state="failed")
    tally.expect("3 times in 10 minutes" in str(row["reason"]), f"down, because {row['reason']}")
    refused = await ask(server.port, chat("is it up?"))
    tally.add(refused, None)
    tally.expect(
        (refused.status, refused.headers.get("x-should-retry")) == (503, "false"),
        f"a model that is down answers {refused.status}",
    )


async def stop(ends: Ends, tally: Tally, fake: Mapping[str, object] | None) -> None:
    """SIGSTOP: the process is there and does nothing."""
    async with serving("--parallel", "4", ends=ends, fake=fake) as server:
        load = fake_load()
        worker = server.worker()
        asked = [asyncio.create_task(ask(server.port, dict(body))) for body in load.bodies]
        await asyncio.sleep(0.4)
        assert worker is not None
        os.kill(worker, signal.SIGSTOP)
        struck = time.monotonic()
        seen = await asyncio.gather(*asked)
        for one in seen:
            found = tally.add(one, load.truth if fake is not None else None)
            if found in ("error", "refused"):
                tally.stop_detection_s.append(one.ended_s - struck)
        tally.expect(any(verdict(one) == "whole" for one in seen), "nobody outlived a stop")


async def hang(ends: Ends, tally: Tally, *, idle: bool) -> None:
    """A step that does not end, in a process that beats: while clients wait, or while nobody asks
    and the server's own probe is the one to find out."""
    words = ["--parallel", "4", *(["--probe", "0.2"] if idle else [])]
    async with serving(*words, ends=ends, fake={**FAST, "step_s": HANG[idle]}) as server:
        started = time.monotonic()
        if not idle:
            asked = [ask(server.port, chat(max_tokens=80)) for _ in range(4)]
            for one in await asyncio.gather(*asked):
                tally.add(one, fake_truth(80))
        while not await server.events("crashed"):
            await asyncio.sleep(1.0)
        tally.hang_detection_s.append(time.monotonic() - started)
        await server.until_idle()
        tally.add(await ask(server.port, chat(max_tokens=10)), fake_truth(10))


async def drain(ends: Ends, tally: Tally) -> None:
    """SIGTERM: what runs and what waits is answered, nothing new is taken, nothing is left."""
    async with serving("--parallel", "2", ends=ends, fake=FAST) as server:
        asked = [Asking(server.port, chat(max_tokens=FAKE_TOKENS)) for _ in range(6)]
        for one in asked:
            await one.send()
        await server.until(n_running=2, n_waiting=4)
        server.process.send_signal(signal.SIGTERM)
        for seen in await asyncio.gather(*(one.finish() for one in asked)):
            found = tally.add(seen, fake_truth(FAKE_TOKENS))
            tally.expect(found == "whole", f"a request ended as {found} in a drain")
        tally.expect(
            await asyncio.to_thread(server.process.wait, 20) == 0, "SIGTERM did not end it well"
        )
