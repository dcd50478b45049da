"""A thousand clients at once, and clients that hardly read or hardly send."""

import asyncio
import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from benchmarks.serving.client import HOST, LIMIT_S, Asking, Seen, ask, chat, verdict
from benchmarks.serving.server import Ends, Server, serving
from benchmarks.serving.tally import Tally, fake_truth

CROWD = 1000
QUEUE = 64  # the server's default
STALL_S = 60.0  # after which the server gives a client up that takes nothing
HEAD_S = 30.0  # after which it gives up a request whose head has not come
_CREEPERS = 200
_SHORT = 8  # tokens of an answer in a crowd
_SLOW_TOKENS = 1500
_QUICK = {"tok_s": 100.0, "prefill_tok_s": 100_000.0}


async def crowd(
    ends: Ends,
    tally: Tally,
    *,
    fake: Mapping[str, object] | None,
    queue: int,
    n: int = CROWD,
    killed: bool = False,
) -> dict[str, int]:
    """So many requests at once; what the queue does not take is told to come back."""
    words = ["--parallel", "4", "--queue", str(queue)]
    async with serving(*words, ends=ends, fake=fake) as server:
        body = chat("one of many", max_tokens=_SHORT)
        limit_s = LIMIT_S if fake is not None else 4 * LIMIT_S  # the last one waits for all others
        asked = [
            asyncio.create_task(ask(server.port, {**body, "stream": i % 2 == 0}, limit_s))
            for i in range(n)
        ]
        if killed:
            await _kill_amid(server, asked, n_waiting=n // 2)
        seen = await asyncio.gather(*asked)
        await server.until_idle()
    return _count(tally, seen, fake is not None, room=queue + 4 if queue < n else n)


async def _kill_amid(server: Server, asked: Sequence[asyncio.Task[Seen]], n_waiting: int) -> None:
    """Kill the worker when so many wait, or when the queue gets shorter already."""
    worker, most = server.worker(), 0
    async with asyncio.timeout(60):
        while most < n_waiting and not all(one.done() for one in asked):
            waiting = (await server.row()).get("n_waiting", 0)
            if waiting < most:
                break
            most = waiting
            await asyncio.sleep(0.01)
    if worker is not None:
        os.kill(worker, signal.SIGKILL)


def _count(tally: Tally, seen: list[Seen], is_fake: bool, room: int) -> dict[str, int]:
    found = Counter(tally.add(one, fake_truth(_SHORT) if is_fake else None) for one in seen)
    for one in seen:
        if verdict(one) == "refused" and one.status == 429:
            tally.expect(int(one.headers.get("retry-after", 0)) > 0, "429 without Retry-After")
    # Some are answered while others still come, so more than the room may be taken.
    turned_away = sum(one.status == 429 for one in seen)
    tally.expect(len(seen) - turned_away >= min(room, len(seen)), f"turned away {turned_away}")
    return dict(found)


def _large(text: str) -> dict[str, Any]:
    """An answer of some 6 MiB, far more than sockets hold."""
    return chat(text, max_tokens=_SLOW_TOKENS, n=4, logprobs=True, top_logprobs=20)


async def slow_readers(ends: Ends, tally: Tally, duration_s: float) -> dict[str, float]:
    """Four clients that hardly read beside four that do: whether these notice, what it takes."""
    words = ["--parallel", "24", "--ctx", "2048"]
    async with serving(*words, ends=ends, fake=_QUICK) as server:
        alone = await _gaps(server, tally, duration_s / 2)
        before = server.own_mib()
        body = _large("slow")
        lazy = [Asking(server.port, body, receive_bytes=2048) for _ in range(4)]
        for one in lazy:
            await one.send()
        reading = asyncio.gather(*(one.read_slowly(0.25, duration_s) for one in lazy))
        beside = await _gaps(server, tally, duration_s)
        await reading
        grown = server.own_mib() - before
        for seen in await asyncio.gather(*(one.finish() for one in lazy)):
            found = tally.add(seen, fake_truth(_SLOW_TOKENS))
            tally.expect(found == "whole", f"a slow reader's answer ended as {found}")
    return {
        "gap_p99_ms_alone": alone,
        "gap_p99_ms_beside_slow": beside,
        "server_growth_mib_for_4_slow": round(grown, 1),
    }


async def _gaps(server: Server, tally: Tally, duration_s: float) -> float:
    """The 99th percentile of the pauses between texts of four streams at a time."""
    gaps: list[float] = []
    until = time.monotonic() + duration_s
    while time.monotonic() < until:
        asked = [ask(server.port, chat(f"quick {i}", max_tokens=400)) for i in range(4)]
        for seen in await asyncio.gather(*asked):
            tally.add(seen, fake_truth(400))
            gaps += [after - before for before, after in itertools.pairwise(seen.text_times)]
    gaps.sort()
    return round(1e3 * gaps[len(gaps) * 99 // 100], 1)


async def stalled(ends: Ends, tally: Tally) -> float:
    """A client that takes nothing at all: its sequence is free at the end of its answer, and its
    connection ends after a minute. How long that took."""
    async with serving("--parallel", "4", "--ctx", "2048", ends=ends, fake=_QUICK) as server:
        one = Asking(server.port, _large("stalled"), receive_bytes=2048)
        await one.send()
        began = time.monotonic()
        await server.until(n_running=4)
        await server.until(n_running=0)
        while (await server.row())["idle_s"] is None and time.monotonic() < began + 2 * STALL_S:
            await asyncio.sleep(0.2)
        taken_s = time.monotonic() - began
        await one.finish()
        tally.expect(not one.seen.dones, "a client that took nothing for a minute was kept")
        one.seen.left = True  # it broke the connection, as far as anybody can see
        tally.add(one.seen, None)
        tally.expect(taken_s < STALL_S + 15, f"a stalled client was kept for {taken_s:.0f} s")
        return round(taken_s, 1)


async def creeping(ends: Ends, tally: Tally) -> float:
    """Clients whose heads never end, and one that sends a body slowly beside them: they are given
    up, it is answered. How long the last of them was kept."""
    async with serving("--parallel", "4", ends=ends, fake=_QUICK) as server:
        slow = Asking(server.port, chat("slow", max_tokens=_SHORT))
        sending = asyncio.create_task(slow.send_slowly(pieces=4, every_s=HEAD_S / 3))
        kept_s = max(await asyncio.gather(*(_creep(server.port) for _ in range(_CREEPERS))))
        await sending
        found = tally.add(await slow.finish(), fake_truth(_SHORT))
    tally.expect(found == "whole", f"a body that came slowly ended as {found}")
    tally.expect(kept_s < HEAD_S + 5, f"a head that does not end was waited for {kept_s:.0f} s")
    return round(kept_s, 1)


async def _creep(port: int) -> float:
    """A byte of a head every second, as long as the server takes them; how long it did."""
    reader, writer = await asyncio.open_connection(HOST, port)
    began = time.monotonic()
    ended = asyncio.create_task(reader.read())
    writer.write(b"GET /health HTTP/1.1\r\nx: ")
    while not ended.done() and time.monotonic() < began + 3 * HEAD_S:
        writer.write(b"x")
        await asyncio.wait({ended}, timeout=1.0)
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    ended.cancel()
    with suppress(OSError, asyncio.CancelledError):
        await ended
    return time.monotonic() - began
