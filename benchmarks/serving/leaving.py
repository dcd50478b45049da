"""Clients that go away in five phases, politely and not: how soon their sequence is free again, and
whether anybody beside them notices."""

import asyncio
import itertools
import math
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.serving.client import Asking, Seen, chat
from benchmarks.serving.server import Server
from benchmarks.serving.tally import Tally, Truth

BESIDE = 2  # streams that go on beside the one who leaves
PARALLEL = 4
_LOOK_S = 0.002
_GIVE_UP_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """A server on which clients leave, and what its steps take."""

    server: Server
    tally: Tally
    truth: Truth | None  # of the streams beside
    beside_tokens: int
    long_prompt: str
    decode_step_s: float
    prefill_step_s: float
    numbers: Iterator[int] = field(default_factory=itertools.count)
    # The streams beside, as they ended, with what they were asked.
    others: list[tuple[str, Seen]] = field(default_factory=list)

    def new_prompt(self) -> str:
        """A long one whose beginning is nobody else's: none of it has been read before."""
        return f"{next(self.numbers)}: {self.long_prompt}"

    def asking(self, text: str = "leave", **changes: Any) -> Asking:
        return Asking(self.server.port, chat(text, **changes))

    @asynccontextmanager
    async def beside(self, n: int = BESIDE) -> AsyncGenerator[None]:
        """Streams that run meanwhile and are read to their ends."""
        port, tokens = self.server.port, self.beside_tokens
        asked = [
            Asking(port, chat(f"stay {i}", max_tokens=tokens, logprobs=self.truth is None))
            for i in range(n)
        ]
        for one in asked:
            await one.send()
        await asyncio.gather(*(one.until_text() for one in asked))
        yield
        for i, seen in enumerate(await asyncio.gather(*(one.finish() for one in asked))):
            found = self.tally.add(seen, self.truth)
            self.tally.expect(found == "whole", f"a stream beside one who left ended as {found}")
            self.others.append((f"stay {i}", seen))

    async def left(self, asking: Asking, phase: str, *, reset: bool, step_s: float) -> None:
        """The client leaves; count how long its place stays taken."""
        at = asking.leave(reset=reset)
        self.tally.add(asking.seen, None)
        await self.until_free(phase, at, step_s=step_s, n_running=BESIDE)

    async def until_free(self, phase: str, since: float, *, step_s: float, n_running: int) -> None:
        """Ask until no more than these run and nobody waits."""
        taken_s = 0.0
        while (asked_s := time.monotonic() - since) < _GIVE_UP_S:
            row = await self.server.row()
            if row["n_running"] <= n_running and row["n_waiting"] == 0:
                break
            taken_s = asked_s
            await asyncio.sleep(_LOOK_S)
        self.tally.freed(phase, taken_s, time.monotonic() - since, step_s)


async def in_body(ground: Ground, *, reset: bool) -> None:
    """Before half of the body was sent: nothing may have begun."""
    async with ground.beside():
        asking = ground.asking("x" * 2000)
        await asking.send(share=0.5)
        await asyncio.sleep(0.02)
        await ground.left(asking, "body", reset=reset, step_s=0.0)


async def in_queue(ground: Ground, *, reset: bool) -> None:
    """While all sequences are taken by others."""
    async with ground.beside(PARALLEL):
        asking = ground.asking(stream=not reset)
        await asking.send()
        await ground.server.until(20.0, n_waiting=1)
        at = asking.leave(reset=reset)
        ground.tally.add(asking.seen, None)
        await ground.until_free("queue", at, step_s=ground.decode_step_s, n_running=PARALLEL)


async def in_prefill(ground: Ground, *, reset: bool) -> None:
    """While its prompt is read."""
    async with ground.beside():
        asking = ground.asking(ground.new_prompt(), stream=not reset)
        await asking.send()
        await ground.server.until(20.0, n_running=BESIDE + 1)
        await asyncio.sleep(ground.prefill_step_s / 2)
        await ground.left(asking, "prefill", reset=reset, step_s=ground.prefill_step_s)


async def in_decode(ground: Ground, *, reset: bool) -> None:
    """In the middle of its answer."""
    async with ground.beside():
        asking = ground.asking(max_tokens=ground.beside_tokens)
        await asking.send()
        await asking.until_text(3)
        await ground.left(asking, "decode", reset=reset, step_s=ground.decode_step_s)


async def at_the_end(ground: Ground, *, reset: bool) -> None:
    """With the last tokens on their way, or after the end."""
    async with ground.beside():
        asking = ground.asking(max_tokens=4)
        await asking.send()
        await asking.until_text(1 if reset else 100)
        await ground.left(asking, "end", reset=reset, step_s=ground.decode_step_s)


PHASES: tuple[Callable[..., Awaitable[None]], ...] = (
    in_body, in_queue, in_prefill, in_decode, at_the_end,
)  # fmt: skip


async def leave_all(ground: Ground, rounds: int, chance: random.Random) -> None:
    """Every phase, by FIN and by RST, so often; in random order."""
    order = [(phase, reset) for phase in PHASES for reset in (False, True)] * rounds
    chance.shuffle(order)
    await ground.server.until_idle()
    for phase, reset in order:
        await phase(ground, reset=reset)
        await ground.server.until_idle()
    defects = [text for text in await ground.server.events("note") if text.startswith("defect")]
    ground.tally.expect(not defects, f"a client that leaves is called a {defects[:1]}")


async def step_times(server: Server, long_prompt: str, n_ubatch: int) -> tuple[float, float]:
    """Seconds of a decode step of four, and of a prefill step, as clients see them."""
    asked = [Asking(server.port, chat(f"t {i}", max_tokens=120)) for i in range(PARALLEL)]
    for one in asked:
        await one.send()
    seen = await asyncio.gather(*(one.finish() for one in asked))
    took = max(one.text_times[-1] - one.text_times[0] for one in seen)
    decode_s = took / (120 - 1)
    began = time.monotonic()
    alone = Asking(server.port, chat(long_prompt, max_tokens=1))
    await alone.send()
    prefill_s = (await alone.finish()).ended_s - began
    tokens = (await server.ask("POST", "/tokenize", {"content": long_prompt}))[1]["tokens"]
    return decode_s, prefill_s / math.ceil(len(tokens) / n_ubatch)
