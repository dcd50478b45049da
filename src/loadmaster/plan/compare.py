"""Several plans side by side: which of them is beaten by another, and which one to take. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from loadmaster.plan.hf_weights import COMPUTE_BYTES
from loadmaster.plan.quality import Quality
from loadmaster.plan.types import CPU, DoesNotFit, Plan
from loadmaster.units import Bytes

Goal = Literal["speed", "quality", "context"]

# A person reads about five tokens a second; an answer that comes slower keeps them waiting.
READING_TOK_S = 5.0
# Published MMLU of Llama 3 70B falls by more than two points beyond this (IQ3_XXS, KL 0.18).
ENOUGH_KL = 0.2
# A q8_0 cache is shown beside f16 where it makes decode this much faster.
_WORTH_SHOWING = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One model in one quantization under one cache type, planned."""

    reference: str  # what to type as MODEL
    model: str  # the model's name without its quantization: candidates of one model share it
    quantization: str
    type_k: str
    type_v: str
    file_bytes: Bytes  # of safetensors before they are quantized
    quality: Quality
    outcome: Plan | DoesNotFit
    engine: str = "llama.cpp"
    largest_n_ctx: int | None = None  # with `--goal context`: the longest that keeps the limits

    @property
    def plan(self) -> Plan | None:
        return self.outcome if isinstance(self.outcome, Plan) else None

    @property
    def decode_tok_s(self) -> float | None:
        return None if self.plan is None else self.plan.predicted.decode_tok_s

    @property
    def kl(self) -> float | None:
        return self.quality.kl

    @property
    def mmlu(self) -> float | None:
        return None if self.quality.mmlu is None else self.quality.mmlu.value

    def weights_on(self, *, gpu: bool) -> int:
        """Weights on GPUs, or in RAM with mapped pages."""
        devices = [device for device in self.outcome.devices if (device.id != CPU) is gpu]
        return sum(device.of("model") + device.mapped_bytes for device in devices)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the user demands; None where they said nothing."""

    goal: Goal = "quality"
    min_speed: float | None = None  # decode tok/s
    max_kl: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The candidates that the rule picks, best first: one, or one for each model."""

    picked: tuple[Candidate, ...]
    rule: str


def dominated(candidates: Sequence[Candidate]) -> tuple[int | None, ...]:
    """For each candidate the index of one that is no worse in anything and better in something."""
    return tuple(
        next((j for j, other in enumerate(candidates) if _beats(other, one)), None)
        for one in candidates
    )


def _beats(a: Candidate, b: Candidate) -> bool:
    """Faster or as fast, as good or better, and one of both strictly.

    Within a model quality is the KL divergence; across models it is MMLU, where both have one.
    """
    if a.decode_tok_s is None:
        return False
    if b.decode_tok_s is None:
        return b.plan is None and a.model == b.model and _no_worse(a, b)
    if a.decode_tok_s < b.decode_tok_s or not _no_worse(a, b):
        return False
    return a.decode_tok_s > b.decode_tok_s or _worth(a, b) != _worth(b, a)


def _no_worse(a: Candidate, b: Candidate) -> bool:
    mine, theirs = _worth(a, b), _worth(b, a)
    return mine is not None and theirs is not None and mine >= theirs


def _worth(one: Candidate, other: Candidate) -> float | None:
    """A figure that is higher for the better of two; None where they cannot be compared. Of one
    model the KL divergence says more, where it is published of both."""
    if one.model == other.model and one.kl is not None and other.kl is not None:
        return -one.kl
    return one.mmlu


def shown(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Without the smaller caches that change nothing: they fit as well and are hardly faster."""
    exact = {
        (one.reference, one.quantization): one
        for one in candidates
        if one.type_k in COMPUTE_BYTES and one.decode_tok_s is not None
    }

    def adds(one: Candidate) -> bool:
        rival = exact.get((one.reference, one.quantization))
        if rival is None or rival is one or one.decode_tok_s is None:
            return rival is None or rival is one
        assert rival.decode_tok_s is not None
        longer = (one.largest_n_ctx or 0) > (rival.largest_n_ctx or 0)
        return longer or one.decode_tok_s > rival.decode_tok_s * (1 + _WORTH_SHOWING)

    return tuple(one for one in candidates if adds(one))


def choose(candidates: Sequence[Candidate], limits: Limits) -> Choice:
    """Which to take. Limits that were asked for are kept; where none was, a default guides, and is
    dropped when nothing keeps it. `picked` is empty when nothing keeps what was asked for."""
    asked = [one for one in candidates if _keeps(one, limits.min_speed, limits.max_kl)]
    speed, kl = _guides(limits, rated=any(one.decode_tok_s is not None for one in candidates))
    guided = [one for one in asked if _keeps(one, speed, kl)]
    if not asked:
        return Choice(picked=(), rule="")
    if not guided:
        return Choice(picked=_first(asked, _speed), rule=f"the fastest, for {_missed(speed, kl)}")
    match limits.goal:
        case "speed":
            picked = _first(guided, _speed)
            rated = picked[0].decode_tok_s is not None
            measure = "the fastest" if rated else "speeds are unknown here: the smallest file"
        case "context":
            picked, measure = _first(guided, _length), "the longest n_ctx"
        case _:
            picked, measure = _finest(guided)
    return Choice(picked=picked, rule=measure + _within(speed, kl))


def _guides(limits: Limits, *, rated: bool) -> tuple[float | None, float | None]:
    """The limits that hold where the user named none: a speed to read at, a quality to keep.

    `rated` false: no speed is known on this machine, so none is asked for.
    """
    speed = limits.min_speed
    kl = limits.max_kl
    if limits.goal in ("quality", "context") and speed is None and rated:
        speed = READING_TOK_S
    if limits.goal in ("speed", "context") and kl is None:
        kl = ENOUGH_KL
    return speed, kl


def _keeps(one: Candidate, min_speed: float | None, max_kl: float | None) -> bool:
    if one.plan is None:
        return False
    if min_speed is not None and (one.decode_tok_s is None or one.decode_tok_s < min_speed):
        return False
    return max_kl is None or (one.kl is not None and one.kl <= max_kl)


def _first(
    pool: Sequence[Candidate], worth: Callable[[Candidate], tuple[float, ...]]
) -> tuple[Candidate, ...]:
    return (max(pool, key=worth),)


def _speed(one: Candidate) -> tuple[float, ...]:
    """Where speeds are unknown, fewer bytes are the faster ones."""
    return (one.decode_tok_s or 0.0, -one.file_bytes)


def _length(one: Candidate) -> tuple[float, ...]:
    """Of equally long ones the better, then the faster."""
    return (one.largest_n_ctx or 0, -_kl(one), one.decode_tok_s or 0.0)


def _kl(one: Candidate) -> float:
    return float("inf") if one.kl is None else one.kl


def _finest(pool: Sequence[Candidate]) -> tuple[tuple[Candidate, ...], str]:
    """The lowest KL divergence of one model. Of several models the highest MMLU where all have
    one, else the lowest KL divergence of each: nothing ranks them."""
    groups = [
        [c for c in pool if c.model == model] for model in dict.fromkeys(c.model for c in pool)
    ]
    closest = tuple(min(group, key=lambda c: (_kl(c), -(c.decode_tok_s or 0))) for group in groups)
    if len(groups) == 1:
        return closest, "the lowest KL divergence"
    known = [[c for c in group if c.mmlu is not None] for group in groups]
    if not all(known):
        return closest, "the lowest KL divergence of each model"
    ranked = [c for group in known for c in group]
    return _first(ranked, lambda c: (c.mmlu or 0, -_kl(c))), "the highest published MMLU"


def _within(speed: float | None, kl: float | None) -> str:
    floor = f" at {speed:g} tok/s or more" if speed is not None else ""
    cap = f" with a KL divergence up to {kl:g}" if kl is not None else ""
    return floor + cap


def _missed(speed: float | None, kl: float | None) -> str:
    """The guide that nothing keeps, in words."""
    parts = []
    if speed is not None:
        parts.append(f"reaches {speed:g} tok/s, a speed to read at")
    if kl is not None:
        parts.append(f"has a KL divergence up to {kl:g}")
    return "nothing " + " and ".join(parts)
