"""The scheduler's vocabulary: what happens (events) and what to do about it (actions).

KV cells are the currency: one cell holds one token of one sequence. A slot is a sequence id of the
backend; its cells stay after a request ends, so that the next prompt can go on from them.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled", "failed"]
# What the tokens of a stream end with:
#   stop       an end-of-generation token or a stop string
#   length     `max_tokens` reached, or `n_ctx` full
#   cancelled  the client asked
#   failed     the engine could not go on


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an open engine has to share out."""

    n_ctx: int  # cells in all
    n_ctx_seq: int  # cells that one sequence may fill
    n_seq_max: int
    n_batch: int  # tokens of one step
    n_ubatch: int  # tokens of one step while another sequence is decoding
    partial_removal: bool  # the tail of a sequence can be dropped


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceWork:
    """One sequence's part of a step: feed `tokens` at `position`; sample after the last one?"""

    seq_id: int
    tokens: tuple[int, ...]
    position: int
    sample: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """A request arrived. `max_tokens` None: until its cells are full."""

    request_id: str
    prompt: tuple[int, ...]
    max_tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled:
    """The client asked for the end of a request; unknown ids are ignored."""

    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """The backend has prepared a slot; it kept the cells before `n_kept`."""

    slot: int
    n_kept: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    """A step ended: the sampled token of each slot, and the slots whose stream stops with it.

    `run` are the tokens that a repeated step sampled after the first, in its one slot.
    """

    tokens: Mapping[int, int]
    stopped: Collection[int] = ()
    run: Sequence[int] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """An idle slot got its cells from a saved state."""

    slot: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCut:
    """A step was cut short by a cancellation, or not even begun: nothing of it counts."""

    begun: bool = True


Event = Submitted | Cancelled | Admitted | Stepped | StepCut | Restored


@dataclass(frozen=True, slots=True, kw_only=True)
class Admit:
    """Prepare a slot for a request: drop its cells from `n_keep` on, then answer `Admitted`."""

    slot: int
    request_id: str
    n_keep: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evict:
    """Drop all cells of an idle slot."""

    slot: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Run one step, then answer `Stepped` or `StepCut`.

    A sequence that decodes alone may go on, each step feeding what the last one sampled: up to
    `repeat` steps in all, as long as nothing else happens.
    """

    work: tuple[SequenceWork, ...]
    repeat: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A long prompt got on."""

    request_id: str
    n_done: int
    n_prompt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """The prompt does not fit in `n_ctx`; nothing of it was fed."""

    request_id: str
    n_prompt: int
    n_ctx: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The end of a request, once for each."""

    request_id: str
    slot: int | None  # None when it ended in the queue
    finish_reason: FinishReason
    n_prompt: int
    n_cached: int
    n_generated: int
    prefill_s: float
    decode_s: float


Action = Admit | Evict | Step | Progress | Refuse | Finish
