"""What drafts are worth: tokens per step, how many are accepted, and speed beside none.

    python -m benchmarks.drafting [--model demo|1b|FILE] [--tokens 96] [--rounds 3]

One model is opened once, in this process, on the CPU. The same greedy request then runs with and
without drafts, in turns; figures are medians over rounds of the ratio within a round.

    repetitive   a prompt that says its text three times, guesses looked up
    free         a prompt that says nothing twice, guesses looked up
    synthetic    guesses that are right with a set chance for each token, whatever the text; they
                 cost nothing, as those of a draft model on another device

`always` feeds the longest drafts there are, whether they pay or not; `rule` is what a user gets,
by the step costs measured at the start (seconds of steps of 1, 2, 4, 8, 16 tokens). `same` counts
the answers that equal those without drafts. The last line is one JSON object.
"""

import argparse
import json
import os
import platform
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.decode import model_file, settings_for
from loadmaster.engine.backends import open_backend
from loadmaster.engine.builds import find_build
from loadmaster.engine.drafts import step_costs
from loadmaster.engine.driver import Driver
from loadmaster.engine.types import (
    Backend,
    DoneEvent,
    GenerateEvent,
    GenerateRequest,
    LoadRequest,
    SamplingParams,
)
from loadmaster.model.source import read_model
from loadmaster.model.stamp import model_stamp
from loadmaster.plan.types import DRAFT_STEP_TOKENS
from loadmaster.scheduler.types import DraftWanted, Limits, StepCosts

SHARES = (0.0, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0)
# A step of many tokens costs what one does: every draft is as long as it may be.
ALWAYS = StepCosts(costs=((1, 1.0), (16, 1.0)))
TEXT = (
    "def area(width, height):\n    return width * height\n\n\n"
    "def volume(width, height, depth):\n    return area(width, height) * depth\n\n\n"
)
FREE = "Describe how a program finds the files that it was asked to read, and what may go wrong."


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One answer."""

    tokens: tuple[int, ...]
    decode_s: float
    n_steps: int
    n_drafted: int
    n_accepted: int


class Synthetic:
    """A backend with a draft model that knows the answer, and is right by chance."""

    def __init__(
        self, backend: Backend, answer: Sequence[int], n_prompt: int, share: float
    ) -> None:
        self._backend, self._answer, self._n_prompt = backend, answer, n_prompt
        self._share, self._random = share, random.Random(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def draft(self, wanted: Sequence[DraftWanted]) -> Mapping[int, Sequence[int]]:
        """The tokens to come, each wrong with the chance that is left."""
        guesses = {}
        for one in wanted:
            start = len(one.tokens) - self._n_prompt
            known = self._answer[start : start + one.n]
            guesses[one.seq_id] = [
                token if self._random.random() < self._share else (token + 1) % 256
                for token in known
            ]
        return guesses


class Bench:
    """An open model, and what its steps cost."""

    def __init__(self, path: Path) -> None:
        engine = find_build()
        os.environ["LLAMA_CPP_LIB_PATH"] = str(engine.lib_dir)  # as a worker's environment has it
        self.backend = open_backend(
            "llamacpp", lib_dir=engine.lib_dir, python_dir=engine.python_dir, devices=[], options={}
        )
        settings = settings_for(path, 2)
        settings = replace(settings, n_draft=DRAFT_STEP_TOKENS - 1, n_outputs_max=DRAFT_STEP_TOKENS)
        model = read_model(path)
        request = LoadRequest(
            model_path=path, model_stamp=model_stamp(model), settings=settings, ram_cap_bytes=None
        )
        self.loaded = self.backend.load(request, lambda _: True)
        self.settings = settings
        self.costs = step_costs(self.backend, DRAFT_STEP_TOKENS)

    def prompt(self, text: str) -> tuple[int, ...]:
        """Its tokens; of random weights, any few hundred will do."""
        return tuple(self.backend.tokenize(text, add_special=True, parse_special=False))

    def run(
        self,
        prompt: tuple[int, ...],
        n_tokens: int,
        costs: StepCosts | None,
        backend: Any = None,
    ) -> Run:
        """One greedy answer; without drafts if no costs are given."""
        events: list[GenerateEvent] = []
        driver = Driver(
            backend or self.backend,
            self._limits(drafts=costs is not None, by_model=backend is not None),
            report=events.append,
            refuse=_refuse,
        )
        if costs is not None:
            driver.note_costs(costs)
        driver.submit(
            GenerateRequest(
                request_id="r", prompt=prompt, max_tokens=n_tokens, ignore_eos=True,
                sampling=SamplingParams(temperature=0),
            )
        )  # fmt: skip
        while not driver.idle:
            driver.step()
        stats = driver.stats()
        tokens, _ = driver.save()
        driver.forget()
        done = next(event for event in events if isinstance(event, DoneEvent))
        return Run(
            tokens=tokens[len(prompt) :],
            decode_s=done.decode_s,
            n_steps=stats.n_decode_steps,
            n_drafted=done.n_drafted,
            n_accepted=done.n_accepted,
        )

    def _limits(self, *, drafts: bool, by_model: bool) -> Limits:
        settings = self.settings
        return Limits(
            n_ctx=self.loaded.n_ctx,
            n_ctx_seq=self.loaded.n_ctx_seq,
            n_seq_max=1,
            n_batch=settings.n_batch,
            n_ubatch=settings.n_ubatch,
            partial_removal=True,
            n_draft=settings.n_draft if drafts else 0,
            n_draft_step=DRAFT_STEP_TOKENS,
            draft_model=by_model,
        )


def _refuse(request_id: str, error: Exception) -> None:
    raise error


def compared(
    bench: Bench, prompt: tuple[int, ...], n_tokens: int, rounds: int, costs: StepCosts,
    share: float | None = None,
) -> dict[str, object]:  # fmt: skip
    """With drafts beside without, in turns."""
    ratios, same, last = [], 0, None
    for _ in range(rounds):
        plain = bench.run(prompt, n_tokens, None)
        stand_in = None
        if share is not None:
            stand_in = Synthetic(bench.backend, plain.tokens, len(prompt), share)
        last = bench.run(prompt, n_tokens, costs, stand_in)
        ratios.append(plain.decode_s / last.decode_s)
        same += last.tokens == plain.tokens
    assert last is not None
    return {
        "tokens_per_step": round((n_tokens - 1) / last.n_steps, 2),
        "drafted": last.n_drafted,
        "accepted": round(last.n_accepted / last.n_drafted, 3) if last.n_drafted else None,
        "speed_ratio": round(statistics.median(ratios), 3),
        "same": f"{same} of {rounds}",
    }


def measured(bench: Bench, n_tokens: int, rounds: int) -> dict[str, object]:
    """All contests."""
    repetitive, free = bench.prompt(TEXT * 3), bench.prompt(FREE)
    found: dict[str, object] = {
        f"{name} {rule}": compared(bench, prompt, n_tokens, rounds, costs)
        for name, prompt in (("repetitive", repetitive), ("free", free))
        for rule, costs in (("rule", bench.costs), ("always", ALWAYS))
    }
    for share in SHARES:
        found[f"synthetic {share:g} rule"] = compared(
            bench, free, n_tokens, rounds, bench.costs, share
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    path = Path(given.model)
    bench = Bench(path if path.is_file() else model_file(given.model))
    contests = measured(bench, given.tokens, given.rounds)
    for name, figures in contests.items():
        print(f"{name:24} {figures}")
    print(
        json.dumps(
            {
                "benchmark": "drafting",
                "model": given.model,
                "n_tokens": given.tokens,
                "rounds": given.rounds,
                "cpu": platform.processor() or platform.machine(),
                "step_s": {n: round(seconds, 6) for n, seconds in bench.costs.costs},
                **contests,
            }
        )
    )


if __name__ == "__main__":
    main()
