"""What the fake backend is told: its speed, what it says, and what goes wrong.

Options (JSON, all optional):

    tok_s            tokens per second of decoding (default: no delay)
    prefill_tok_s    tokens per second of prefill
    load_s           time to load
    n_vocab          size of the vocabulary (256 bytes and an end token at least)
    memory_bytes     process memory that it reports
    answer           what it says, over and over; the default names itself
    eog_after        end the generation after so many tokens
    fail_load        refuse to load, with this reason
    over_budget      {"gpu:0": bytes}: what `memory` reports as used on a device
    fault            {"kind": "raise" | "abort" | "segv" | "kill" | "stop" | "exit" | "garbage" |
                      "oom", "at_step": n}: what happens at the n-th step, counted from 1
    poison           a text that kills the process when a prompt with it has been fed
    step_s           {"at_step": n, "seconds": s}: one long step
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from loadmaster.engine.backends.fake_speech import N_BYTES
from loadmaster.errors import EngineError

ANSWER = "This is the fake engine: it has no model. "


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What goes wrong, and at which step."""

    kind: str
    at_step: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LongStep:
    """One step that takes its time."""

    seconds: float
    at_step: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeSpec:
    """The options above."""

    tok_s: float | None = None
    prefill_tok_s: float | None = None
    load_s: float = 0.0
    n_vocab: int = N_BYTES + 1
    memory_bytes: int | None = None
    answer: str = ANSWER
    eog_after: int | None = None
    fail_load: str | None = None
    over_budget: Mapping[str, int] = field(default_factory=dict)
    fault: Fault | None = None
    poison: str | None = None
    step_s: LongStep | None = None


def _raise() -> None:
    raise EngineError("the fake engine failed a step")


def _send_garbage() -> None:
    """Write what is no frame to every socket of this process."""
    for descriptor in range(3, 64):
        try:
            if os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:"):
                os.write(descriptor, b"\xff" * 64)
        except OSError:
            continue


def _run_out_of_memory() -> None:
    """As the CUDA backend does it."""
    print("CUDA error: out of memory", file=sys.stderr, flush=True)
    os.abort()


def _by_signal(number: int) -> Callable[[], Any]:
    return lambda: os.kill(os.getpid(), number)


FAULTS: dict[str, Callable[[], Any]] = {
    "raise": _raise,
    "abort": os.abort,
    "segv": lambda: ctypes.string_at(0),
    "kill": _by_signal(signal.SIGKILL),
    "stop": _by_signal(signal.SIGSTOP),
    "exit": lambda: os._exit(3),
    "garbage": _send_garbage,
    "oom": _run_out_of_memory,
}
