"""The scheduler's vocabulary: what happens (events) and what to do about it (actions).

KV cells are the currency: one cell holds one token, for every sequence that begins with the same
tokens. A sequence id keeps its cells after its request ended, so that later prompts go on from
them, until the cells are needed.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
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
    n_seq_max: int  # requests that run at a time
    n_batch: int  # tokens of one step
    n_ubatch: int  # tokens of one step while another sequence is decoding
    partial_removal: bool  # the tail of a sequence can be dropped
    n_seq_ids: int | None = None  # ids from n_seq_max on keep cells, but cannot run
    shared_prefix: bool = False  # sequences can share cells
    shared_at_end: bool = False  # only where a sequence stands, not what lies behind it
    partial_state: bool = False  # the end of a sequence can be saved without its beginning
    state_bytes: int = 0  # host RAM for the states of preempted requests
    min_wait_tokens: int = 8  # a shared part must save so many tokens to be waited for
    answers_beside: int = 0  # beside a person's prompt, so many in the mean of steps; 0: all
    n_draft: int = 0  # tokens that a decoding sequence may bring into a step as a draft
    n_draft_step: int = 0  # tokens of a step with drafts, of all its sequences
    draft_model: bool = False  # drafts are asked for, and not looked up


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStats:
    """Counts since the model was opened, and what is in use now."""

    n_cells: int  # n_ctx
    n_cells_used: int  # cells that hold a token; one that several sequences share counts once
    n_cells_running: int  # those that running requests hold; the others can be evicted
    n_running: int
    n_queued: int  # preempted requests included
    n_kept: int  # ended sequences whose cells are kept
    n_submitted: int
    n_finished: int
    n_prefilled_tokens: int  # fed as prompts; what a preempted request feeds again included
    n_reused_tokens: int  # prompt tokens whose cells were there
    n_generated_tokens: int
    n_steps: int  # passes through the model
    n_decode_steps: int  # those in which some sequence decoded
    n_preempted: int
    n_restored: int  # preempted requests that went on from a saved state
    state_bytes: int  # saved states of preempted requests in host RAM now
    state_peak_bytes: int
    n_drafted_tokens: int = 0  # fed as drafts
    n_accepted_tokens: int = 0  # of them, those that were then sampled


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceWork:
    """One sequence's part of a step: feed `tokens` at `position`; sample after the last one?

    The last `n_draft` tokens are a draft. One token after the other is sampled from the token
    before the draft on, for as long as it is the draft's next.
    """

    seq_id: int
    tokens: tuple[int, ...]
    position: int
    sample: bool
    n_draft: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """A request arrived. `max_tokens` None: until its cells are full."""

    request_id: str
    prompt: tuple[int, ...]
    max_tokens: int | None
    priority: int = 0  # smaller goes first
    prefix_scope: str = ""  # cells are shared only among requests of one scope


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled:
    """The client asked for the end of a request; unknown ids are ignored."""

    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The backend is free: what is the next step? No step is outstanding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """The backend has prepared a sequence; it has the cells before `n_kept`."""

    seq_id: int
    n_kept: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Parked:
    """A request was preempted; its state takes `state_bytes`, 0 when none was saved."""

    request_id: str
    state_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    """A step ended: the sampled token of each sequence, and those whose stream stops with it.

    `run` are the tokens that a repeated step sampled after the first, in its one sequence.
    `accepted` are those that a sequence with a draft sampled after its first; the cells of what was
    not accepted are gone.
    """

    tokens: Mapping[int, int]
    stopped: Collection[int] = ()
    run: Sequence[int] = ()
    lost: Collection[int] = ()  # as in `StepCut`: a repeated step was cut, or a draft
    accepted: Mapping[int, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCut:
    """A step was cut short by a cancellation, or not even begun: nothing of it counts.

    `lost` are the sequences that have no cells any more because a tail could not be dropped.
    `no_room`: the engine found no cells, although they were free by our account (the caches of
    sliding windows keep an account of their own).
    """

    lost: Collection[int] = ()
    no_room: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """An ended sequence has no cells any more: its tail could not be dropped, or not be filled."""

    seq_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """A saved sequence from outside is to have cells; answered with `Adopt`, if there is room."""

    tokens: tuple[int, ...]
    prefix_scope: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateRoom:
    """From now on the states of preempted requests may take so much host RAM."""

    state_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """What steps of so many tokens cost, the fewest first: whether drafts pay.

    `drafted` is what a draft model takes for one token of every sequence, in the same unit.
    """

    costs: tuple[tuple[int, float], ...]
    drafted: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafted:
    """The answer to `Draft`: what each sequence may say next; less than was asked for, or nothing,
    is fine."""

    guesses: Mapping[int, Sequence[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forget:
    """Drop the cells of every ended sequence."""


Event = (
    Submitted
    | Cancelled
    | Ready
    | Admitted
    | Parked
    | Stepped
    | StepCut
    | Lost
    | Offered
    | StateRoom
    | StepCosts
    | Drafted
    | Forget
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Admit:
    """Prepare a sequence for a request, then answer `Admitted`.

    Its cells from `n_keep` on are dropped. With a `source`, it has none of its own and gets those
    before `n_keep` from that sequence. With `restore`, its saved state follows them.
    """

    seq_id: int
    request_id: str
    n_keep: int
    source: int | None = None
    restore: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Preempt:
    """Take the cells from a running request, then answer `Parked`.

    Those from `start` to `end`, its last one, are saved first if their state takes at most
    `limit_bytes`.
    """

    seq_id: int
    request_id: str
    start: int
    end: int
    limit_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Discard:
    """Drop the saved state of a request: it is fed again instead."""

    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evict:
    """Drop the cells of an ended sequence from `n_keep` on; `Lost` if only all can be dropped."""

    seq_id: int
    n_keep: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shelve:
    """Move the `n` cells of an ended sequence to another id, so that its own can run again."""

    seq_id: int
    to: int
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """Give a free id the first `n` cells of a running sequence; `Lost` if it gets none."""

    source: int
    to: int
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopt:
    """Put the saved cells that were offered into this sequence."""

    seq_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftWanted:
    """Guess `n` tokens after these, which are all of a sequence; the list is the scheduler's."""

    seq_id: int
    tokens: Sequence[int]
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """Have the draft model guess for the next step, then answer `Drafted`."""

    wanted: tuple[DraftWanted, ...]


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
    seq_id: int | None  # None when it held no cells
    finish_reason: FinishReason
    n_prompt: int
    n_cached: int
    n_generated: int
    n_preempted: int
    prefill_s: float
    decode_s: float
    n_drafted: int = 0  # tokens fed as drafts
    n_accepted: int = 0  # of them, those that were then sampled


Action = (
    Admit
    | Preempt
    | Discard
    | Evict
    | Shelve
    | Copy
    | Adopt
    | Draft
    | Step
    | Progress
    | Refuse
    | Finish
)
