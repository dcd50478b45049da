"""What is counted over all scenarios, and when something counts as a fault."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.serving.client import FAULTS, Seen, verdict
from loadmaster.engine.backends.fake_spec import ANSWER

GRACE_S = 0.05  # beside one step, for a sequence to be free again

# Whether a text is what the request has to get, or the beginning of it.
Truth = Callable[[Seen], bool]


@dataclass(slots=True, kw_only=True)
class Tally:
    """Sums of everything that was asked and everything that was done to the server."""

    verdicts: Counter[str] = field(default_factory=Counter)
    changed: int = 0  # texts other than those of an undisturbed run
    checked: int = 0  # texts that were compared
    lost: int = 0  # requests without a text yet that did not outlive a worker
    detection_s: list[float] = field(default_factory=list)
    stop_detection_s: list[float] = field(default_factory=list)
    hang_detection_s: list[float] = field(default_factory=list)
    over_step_s: list[float] = field(default_factory=list)  # beyond one step until free
    late: Counter[str] = field(default_factory=Counter)  # by phase
    surprises: list[str] = field(default_factory=list)  # in words, what should not have been
    told: int = 0  # of them, for those who print

    def add(self, seen: Seen, truth: Truth | None) -> str:
        """Count how a request ended, and whether its text is right."""
        found = verdict(seen)
        self.verdicts[found] += 1
        if found in FAULTS:
            self.surprises.append(f"{found}: status {seen.status}, {len(seen.text)} characters")
        if truth is not None and (seen.text or found == "whole"):
            self.checked += 1
            if not truth(seen):
                self.changed += 1
                self.surprises.append(f"changed: {seen.text[:80]!r}")
        return found

    def freed(self, phase: str, taken_s: float, free_s: float, step_s: float) -> None:
        """A client of this phase left. A question asked after `taken_s` was answered that its
        sequence is still taken, one that was answered after `free_s` that it is free."""
        self.over_step_s.append(free_s - step_s)
        if taken_s > step_s + GRACE_S:
            self.late[phase] += 1
            self.surprises.append(f"late: {phase}, {taken_s:.3f} s, a step takes {step_s:.3f} s")

    def expect(self, holds: bool, what: str) -> None:
        """Something else that must be so."""
        if not holds:
            self.surprises.append(what)

    def figures(self) -> dict[str, object]:
        """The sums, as the last line has them."""
        return {
            "requests": sum(self.verdicts.values()),
            **{name: self.verdicts[name] for name in ("whole", "error", "refused", "left")},
            "hung": self.verdicts["hung"],
            "unclear_ends": self.verdicts["cut"] + self.verdicts["double"],
            "slowest_detection_s": _most(self.detection_s),
            "slowest_stop_detection_s": _most(self.stop_detection_s),
            "slowest_hang_detection_s": _most(self.hang_detection_s),
            "late_frees": self.late.total(),
            "frees": len(self.over_step_s),
            "slowest_free_over_step_ms": round(1e3 * max(self.over_step_s, default=0.0), 1),
            "other_streams_changed": self.changed,
            "streams_compared": self.checked,
            "queued_lost": self.lost,
            "surprises": len(self.surprises),
        }


def _most(seconds: Sequence[float]) -> float:
    return round(max(seconds, default=0.0), 3)


def fake_truth(n: int) -> Truth:
    """A greedy answer of the fake engine with so many tokens."""
    whole = (ANSWER * (n // len(ANSWER) + 1))[:n]

    def holds(seen: Seen) -> bool:
        if verdict(seen) == "whole":
            return seen.text == whole
        return whole.startswith(seen.text)

    return holds
