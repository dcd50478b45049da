"""What a model of a server has done so far, in numbers that only grow, for `/metrics`."""

import time
from collections import Counter
from dataclasses import dataclass, field

from loadmaster.engine.types import DoneEvent, GenerateEvent, TextEvent
from loadmaster.errors import LoadmasterError

TTFT_BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(slots=True, kw_only=True)
class Counts:
    """Sums since the server started; one for each model."""

    loads: int = 0
    deaths: int = 0
    evictions: int = 0
    refused: int = 0  # the queue was full
    ends: Counter[str] = field(default_factory=Counter)  # by finish reason
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    ttft_s: float = 0.0
    ttft_count: int = 0
    ttft_buckets: Counter[float] = field(default_factory=Counter)  # cumulative, by upper bound

    def took(
        self, arrived_s: float, outcome: GenerateEvent | LoadmasterError, *, first: bool
    ) -> None:
        """Count an event of a request that arrived at `arrived_s`."""
        if isinstance(outcome, TextEvent) and first:
            self._first_text(time.monotonic() - arrived_s)
        elif isinstance(outcome, DoneEvent):
            self.ended(outcome.finish_reason)
            self.prompt_tokens += outcome.n_prompt
            self.cached_tokens += outcome.n_cached
            self.generated_tokens += outcome.n_generated
            self.drafted_tokens += outcome.n_drafted
            self.accepted_tokens += outcome.n_accepted
            self.prefill_s += outcome.prefill_s
            self.decode_s += outcome.decode_s
        elif isinstance(outcome, LoadmasterError):
            self.ended("failed")

    def ended(self, reason: str) -> None:
        """A request came to its end."""
        self.ends[reason] += 1

    def _first_text(self, seconds: float) -> None:
        self.ttft_s += seconds
        self.ttft_count += 1
        for bound in TTFT_BOUNDS_S:
            if seconds <= bound:
                self.ttft_buckets[bound] += 1
