"""Part `faults`: deaths, stops, hangs, clients that leave, are slow, or come a thousand at once.

Everything runs on the fake engine, whose answers are known to the letter and whose steps have a set
length, and the kills, the leaving and the crowds on the demo model as well. There a step's length
is measured first, and what streams said is proved afterwards by feeding it again, alone.
"""

import asyncio
import random

from benchmarks.serving import crowds, kills, leaving, truth
from benchmarks.serving.client import Seen, chat
from benchmarks.serving.kills import Load
from benchmarks.serving.leaving import Ground
from benchmarks.serving.server import Ends, Server, serving
from benchmarks.serving.tally import Tally, fake_truth

N_KILLS = {"fake": 45, "demo": 15}  # multiples of three: the breaker's cycles
N_ROUNDS = {"fake": 6, "demo": 4}  # of ten ways to leave
N_STOPS = 4
SLOW_S = 16.0
MOST_PROVED = 160  # streams that are fed again

# A decode step takes 20 ms, a prefill step of 512 tokens 148 ms.
_STEADY = {"tok_s": 50.0, "prefill_tok_s": 4_000.0}
_BESIDE_TOKENS = {"fake": 60, "demo": 350}
_DEMO_WORDS = ("--parallel", "4", "--ctx", "2048", "--threads", "1")
_LONG = "The quick brown fox jumps over the lazy dog. "
_DEMO_ANSWER = 120


def run(*, seed: int, quick: bool) -> dict[str, object]:
    """All of it, or about a tenth; the figures."""
    return asyncio.run(_run(random.Random(seed), 0.1 if quick else 1.0))


async def _run(chance: random.Random, share: float) -> dict[str, object]:
    tally, ends = Tally(), Ends()
    figures: dict[str, object] = {}
    waiting = [  # these take a minute and hardly anything of the machine
        asyncio.create_task(kills.hang(ends, tally, idle=False)),
        asyncio.create_task(kills.hang(ends, tally, idle=True)),
        asyncio.create_task(crowds.stalled(ends, tally)),
        asyncio.create_task(crowds.creeping(ends, tally)),
    ]
    await asyncio.gather(*(kills.stop(ends, tally, kills.FAST) for _ in range(N_STOPS - 1)))
    await kills.stop(ends, tally, None)
    _say("stops", tally)
    await kills.drain(ends, tally)
    await _on_fake(ends, tally, chance, share)
    streams = await _on_demo(ends, tally, chance, share)
    figures |= await _crowds(ends, tally, share)
    figures |= await crowds.slow_readers(ends, tally, max(4.0, SLOW_S * share))
    _say("slow readers", tally)
    *_, stalled_s, creeping_s = await asyncio.gather(*waiting)
    figures |= {"stalled_until_dropped_s": stalled_s, "slow_heads_until_dropped_s": creeping_s}
    _say("hangs", tally)
    figures |= await asyncio.to_thread(_proved, streams, tally)
    _say("proof", tally)
    return {**tally.figures(), **figures, "server_deaths": ends.deaths, "orphans": ends.orphans}


def _say(what: str, tally: Tally) -> None:
    counts = ", ".join(f"{n} {name}" for name, n in sorted(tally.verdicts.items()))
    print(f"{what}: so far {counts}; {len(tally.surprises)} surprises", flush=True)
    for surprise in tally.surprises[tally.told :]:
        print(f"  {surprise}", flush=True)
    tally.told = len(tally.surprises)


def _times(n: int, share: float, least: int = 1) -> int:
    return max(least, round(n * share))


async def _on_fake(ends: Ends, tally: Tally, chance: random.Random, share: float) -> None:
    async with serving("--parallel", "4", ends=ends, fake=kills.FAST) as server:
        n = _times(N_KILLS["fake"], share, least=kills.BREAKER)
        await kills.kills(server, kills.fake_load(), n, tally, chance)
    _say("kills on the fake engine", tally)
    async with serving("--parallel", "4", ends=ends, fake=_STEADY) as server:
        n_tokens, n_ubatch = _BESIDE_TOKENS["fake"], await _n_ubatch(server)
        ground = Ground(
            server=server,
            tally=tally,
            truth=fake_truth(n_tokens),
            beside_tokens=n_tokens,
            long_prompt=_LONG * 30,
            decode_step_s=1 / _STEADY["tok_s"],
            prefill_step_s=n_ubatch / _STEADY["prefill_tok_s"] + 1 / _STEADY["tok_s"],
        )
        await leaving.leave_all(ground, _times(N_ROUNDS["fake"], share), chance)
    _say("leaving the fake engine", tally)


async def _on_demo(
    ends: Ends, tally: Tally, chance: random.Random, share: float
) -> list[tuple[list[int], Seen]]:
    """The same on a real engine; the streams beside the faults, with their prompts."""
    streams: list[tuple[list[int], Seen]] = []
    async with serving(*_DEMO_WORDS, ends=ends, model=str(truth.EXACT_DEMO)) as server:
        bodies = [
            chat(f"{i}. {_LONG * 20}", max_tokens=_DEMO_ANSWER, logprobs=True) for i in range(12)
        ]
        prompts = [await truth.prompt_of(server, body) for body in bodies]
        load = Load(bodies=bodies, truth=None, latest_s=2.0)
        n = _times(N_KILLS["demo"], share, least=kills.BREAKER)
        seen = await kills.kills(server, load, n, tally, chance)
        streams += [(prompts[i % len(prompts)], one) for i, one in enumerate(seen)]
        _say("kills on the demo model", tally)
        streams += await _leave_demo(server, tally, chance, share)
    _say("leaving the demo model", tally)
    return streams


async def _leave_demo(
    server: Server, tally: Tally, chance: random.Random, share: float
) -> list[tuple[list[int], Seen]]:
    long_prompt = _LONG * 70
    await server.until_idle()
    decode_s, prefill_s = await leaving.step_times(server, long_prompt, await _n_ubatch(server))
    print(f"demo model: a decode step {decode_s * 1e3:.1f} ms, prefill {prefill_s * 1e3:.0f} ms")
    ground = Ground(
        server=server,
        tally=tally,
        truth=None,
        beside_tokens=_BESIDE_TOKENS["demo"],
        long_prompt=long_prompt,
        decode_step_s=decode_s,
        prefill_step_s=prefill_s,
    )
    await leaving.leave_all(ground, _times(N_ROUNDS["demo"], share), chance)
    found: list[tuple[list[int], Seen]] = []
    for text in sorted({name for name, _ in ground.others}):
        prompt = await truth.prompt_of(server, chat(text))
        found += [(prompt, seen) for name, seen in ground.others if name == text]
    return found


async def _n_ubatch(server: Server) -> int:
    plans = (await server.ask("GET", "/loadmaster/v1/plan"))[1]["plans"]
    n_ubatch: int = next(iter(plans.values()))["engine"]["n_ubatch"]
    return n_ubatch


async def _crowds(ends: Ends, tally: Tally, share: float) -> dict[str, object]:
    """A thousand at once: most refused, all served, and with a death in between."""
    fast = {"prefill_tok_s": 1e6, "tok_s": 5_000.0}
    n = _times(crowds.CROWD, share)
    found = {
        "crowd": await crowds.crowd(ends, tally, fake=fast, queue=crowds.QUEUE, n=n),
        "crowd_served": await crowds.crowd(ends, tally, fake=fast, queue=n, n=n),
        "crowd_killed": await crowds.crowd(ends, tally, fake=fast, queue=n, n=n, killed=True),
        "crowd_demo": await crowds.crowd(ends, tally, fake=None, queue=n, n=n, killed=True),
    }
    _say("crowds", tally)
    return dict(found)


def _proved(streams: list[tuple[list[int], Seen]], tally: Tally) -> dict[str, object]:
    """Feed what the demo model's streams said again, alone."""
    wrong, n_tokens, largest = truth.wrong_streams(streams[-MOST_PROVED:])
    tally.changed += wrong
    tally.checked += min(MOST_PROVED, len(streams))
    return {"tokens_proved": n_tokens, "largest_gap_logits": round(largest, 4)}
