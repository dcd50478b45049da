"""What a contestant did with a job, and the line that says so."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

MOST_OTHERS = 0.04  # a line is marked from here on


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One run of a job. Counts are of completed requests."""

    name: str  # `ours`, `-np 4`
    command: str
    n_requests: int
    seconds: float
    completed: int
    prefilled: int
    generated: int
    cut: bool = False  # stopped before the end: `seconds` is the least it would have taken
    failures: Counter[str] = field(default_factory=Counter)
    tokens: Sequence[tuple[int, ...]] = ()  # of each request, where they were kept
    notes: str = ""
    others: float = 0.0  # the share of the processors that other programs had meanwhile
    prefill_s: float = 0.0  # of all requests, from admission to the first token
    decode_s: float = 0.0

    @property
    def whole(self) -> bool:
        """Whether every request was answered."""
        return self.completed == self.n_requests

    def line(self) -> str:
        """The figures and the command, for a person."""
        what = "stopped at" if self.cut else "in"
        text = (
            f"{self.name:16} {self.completed:3} of {self.n_requests} {what} {self.seconds:7.1f} s  "
            f"prefilled {self.prefilled:6}  generated {self.generated:6}"
        )
        if self.others > MOST_OTHERS:
            text += f"  (others had {self.others:.0%} of the processors)"
        if self.failures:
            text += "  " + ", ".join(f"{n} × {why}" for why, n in self.failures.most_common(3))
        return f"{text}{'  ' + self.notes if self.notes else ''}\n    {self.command}"
