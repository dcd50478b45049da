"""What a step sampled: how far a sequence goes along with its draft, and the step's result."""

from collections.abc import Callable, Collection, Mapping, Sequence

from loadmaster.engine.backends.grammar import Constraint
from loadmaster.engine.types import Accepted, StepResult, TokenLogprob

Choice = tuple[int, TokenLogprob | None]


def follow(
    choose: Callable[[int], Choice], row: int, draft: Sequence[int], constraint: Constraint | None
) -> list[Choice]:
    """What a sequence chooses from `row` on: it goes on with its next row for as long as its token
    is the draft's, and its value is not complete."""
    chosen: list[Choice] = []
    for expected in (*draft, None):
        chosen.append(choose(row + len(chosen)))
        ended = constraint is not None and constraint.ended
        if ended or chosen[-1][0] != expected:
            break
    return chosen


def step_result(
    chosen: Mapping[int, Sequence[Choice]],
    constraints: Mapping[int, Constraint | None],
    drafted: Collection[int] = (),
) -> StepResult:
    """The result of a step in which each sequence chose these tokens, some of them to a draft."""
    first = {seq_id: row[0] for seq_id, row in chosen.items()}
    bound = {seq_id: one for seq_id, one in constraints.items() if one is not None}
    return StepResult(
        tokens={seq_id: token for seq_id, (token, _) in first.items()},
        logprobs={s: logprob for s, (_, logprob) in first.items() if logprob is not None},
        ended=[seq_id for seq_id, one in bound.items() if one.ended],
        failed={s: one.failure for s, one in bound.items() if one.failure is not None},
        accepted={seq_id: _accepted(chosen[seq_id][1:]) for seq_id in drafted},
    )


def _accepted(more: Sequence[Choice]) -> Accepted:
    return Accepted(
        tokens=tuple(token for token, _ in more),
        logprobs=tuple(logprob for _, logprob in more if logprob is not None),
    )
