"""Whether a model still decodes: its process may answer and beat although nothing comes any more.

While requests run, the worker's heartbeat says for how long it has been at one step, and a step
beyond its deadline ends it. A model that nobody asks decodes one token now and then; one that does
not is given up and replaced like any other that died, before a client has to find out.
"""

import asyncio
import itertools
from contextlib import suppress
from functools import partial

from loadmaster.engine.types import DoneEvent, GenerateEvent, GenerateRequest, SamplingParams
from loadmaster.errors import EngineStalledError, LoadmasterError
from loadmaster.plan.types import CPU, Plan
from loadmaster.tasks.opening import Opened
from loadmaster.tasks.serving.answer import Mailbox

# A probe takes at most this part of the time, however slow the model is.
PROBE_SHARE = 0.01
# Predicted times are of an idle machine; other programs, swap and a cold disk are no faults.
STEP_FLOOR_S = 60.0
STEP_FACTOR = 50.0
SLOW_DISK_BYTES_S = 50_000_000  # weights whose pages were taken away are read again at this rate
_LOOK_S = 1.0  # the longest pause between two looks that counts as one in which it could answer
_SCOPE = "probe"  # shares no cells with a client's prompt


def step_deadline_s(plan: Plan) -> float:
    """How long one step of this plan may take before the worker is given up."""
    predicted = plan.predicted
    n_step = plan.engine.n_ubatch
    prefill_s = n_step / predicted.prefill_tok_s if predicted.prefill_tok_s else 0.0
    decode_s = plan.engine.n_seq_max / predicted.decode_tok_s if predicted.decode_tok_s else 0.0
    host = next((device for device in plan.devices if device.id == CPU), None)
    read_s = host.of("model") / SLOW_DISK_BYTES_S if host else 0.0
    return STEP_FLOOR_S + STEP_FACTOR * max(prefill_s, decode_s) + read_s


class Liveness:
    """The probes of one model. Everything but the engine's answer happens in the event loop."""

    def __init__(self, *, every_s: float, mailbox: Mailbox) -> None:
        """`every_s`: decode after so long without; 0 for never."""
        self._every_s = every_s
        self._mailbox = mailbox
        self._ids = itertools.count(1)
        self._opened: Opened | None = None  # whose probe is out
        self._waited_s = 0.0  # for that probe
        self._took_s = 0.0  # the last one
        self._idle_s = 0.0  # since the last use, or the last probe
        self._looked_s: float | None = None
        self._task: asyncio.Task[None] | None = None  # held: the loop alone would forget it

    def look(self, opened: Opened | None, *, idle_s: float, now: float) -> None:
        """To be called often: `idle_s` is for how long nobody has asked; 0 while somebody does."""
        passed = 0.0 if self._looked_s is None else min(_LOOK_S, now - self._looked_s)
        self._looked_s = now
        if self._opened is not None and self._opened is not opened:
            self._opened = None  # closed or dead: its end is told elsewhere
        if opened is None or not self._every_s:
            return
        if self._opened is not None:
            self._wait(opened, passed)
            return
        self._idle_s = min(idle_s, self._idle_s + passed)
        if self._idle_s >= max(self._every_s, self._took_s / PROBE_SHARE):
            self._ask(opened)

    def _wait(self, opened: Opened, passed: float) -> None:
        self._waited_s += passed
        deadline = step_deadline_s(opened.session.plan)
        if self._waited_s > deadline:
            self._opened = None
            opened.session.engine.give_up(
                EngineStalledError(
                    f"the engine has not decoded one token in {deadline:.0f} s, idle as it was",
                    numbers={"deadline_s": deadline},
                )
            )

    def _ask(self, opened: Opened) -> None:
        self._opened, self._waited_s, self._idle_s = opened, 0.0, 0.0
        loaded = opened.session.loaded
        token = loaded.bos_token if loaded.bos_token is not None else 0
        if loaded.pooling is not None:
            self._task = asyncio.create_task(self._embed(opened, token))
            return
        request = GenerateRequest(
            request_id=f"probe-{next(self._ids)}",
            prompt=(token,),
            max_tokens=1,
            sampling=SamplingParams(temperature=0),
            prefix_scope=_SCOPE,
        )
        try:
            opened.session.engine.start_request(request, partial(self._sink, opened))
        except LoadmasterError:  # it died a moment ago: others notice, too
            self._opened = None

    async def _embed(self, opened: Opened, token: int) -> None:
        with suppress(LoadmasterError):  # a death is told elsewhere
            await asyncio.to_thread(opened.session.engine.embed, [(token,)])
        self._ended(opened)

    def _sink(
        self, opened: Opened, request_id: str, outcome: GenerateEvent | LoadmasterError
    ) -> None:
        """On the watcher's thread."""
        if isinstance(outcome, DoneEvent | LoadmasterError):
            self._mailbox.post(partial(self._ended, opened))

    def _ended(self, opened: Opened) -> None:
        if self._opened is opened:
            self._opened, self._took_s = None, self._waited_s
