"""Streams and what their times come to."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class Stream:
    """One answer as its reader saw it."""

    start_s: float
    end_s: float = 0.0
    times: list[float] = field(default_factory=list)  # of every text that arrived
    text: str = ""
    n_prompt: int = 0
    n_cached: int = 0
    n_generated: int = 0

    def add(self, time_s: float, text: str) -> None:
        self.times.append(time_s)
        self.text += text
        self.end_s = time_s

    @property
    def ttft_s(self) -> float:
        """From the request to its first text."""
        return self.times[0] - self.start_s if self.times else self.end_s - self.start_s

    @property
    def gaps_s(self) -> list[float]:
        """Between texts that follow each other. Texts that arrive at once count as one."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False) if b > a]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All streams of one round, and the processor time that it took."""

    streams: Sequence[Stream]
    client_cpu_s: float  # of the process that asked; of a bare engine's parent: all of it
    parent_cpu_s: float = 0.0  # of the server's own process, or llama-server's only one
    worker_cpu_s: float = 0.0

    @property
    def seconds(self) -> float:
        """From the first request to the end of the last stream."""
        return max(s.end_s for s in self.streams) - min(s.start_s for s in self.streams)

    @property
    def n_generated(self) -> int:
        return sum(stream.n_generated for stream in self.streams)

    @property
    def n_prefilled(self) -> int:
        """Prompt tokens that were computed."""
        return sum(stream.n_prompt - stream.n_cached for stream in self.streams)

    @property
    def tok_s(self) -> float:
        return self.n_generated / self.seconds

    @property
    def ttfts_s(self) -> list[float]:
        return [stream.ttft_s for stream in self.streams]


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that so large a share of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def median(values: Iterable[float]) -> float:
    return statistics.median(values)
