"""What a worker can be asked to time: the engine's kernels, its memory, and steps of a model.

Questions cross the border to the worker as data; the answer is the seconds of every run, the first
one that warms up left out.
"""

from dataclasses import dataclass
from typing import Any

from loadmaster.errors import EngineError
from loadmaster.schema import from_json, to_json


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeProducts:
    """Matrix products over weights of one type; `points` are (tokens, matrices) to time.

    With `n_expert` each matrix is a stack of experts of which a token takes `n_used`.
    """

    device: str  # `cpu`, `gpu:0`
    n_threads: int
    type: str
    repacked: bool
    n_in: int
    n_out: int
    n_matrices: int
    points: tuple[tuple[int, int], ...]
    runs: int
    n_expert: int = 0
    n_used: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeAttention:
    """Flash attention; each token sees `n_visible` of `n_cells` cells in each of `n_layers`."""

    device: str
    n_threads: int
    type: str
    head_dim: int
    n_head: int
    n_head_kv: int
    n_cells: int
    n_tokens: int
    n_visible: int
    n_layers: int
    runs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeSmall:
    """`n_ops` operations in a row: `norm`, `gate`, `rope` or `copy`."""

    device: str
    n_threads: int
    operation: str
    width: int
    n_tokens: int
    n_ops: int
    runs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeLink:
    """Copies from host memory to a device."""

    device: str
    size_bytes: int
    pinned: bool
    runs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeRead:
    """Reads of host memory."""

    n_threads: int
    size_bytes: int
    runs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeSteps:
    """Steps of the open model: a prompt of `depth` tokens for each of `n_sequences`, in chunks of
    n_ubatch, then `n_steps` decode steps of all of them together.

    The answer is the seconds of the first sequence's chunks and then those of the decode steps.
    """

    depth: int
    n_sequences: int
    n_steps: int


Question = TimeProducts | TimeAttention | TimeSmall | TimeLink | TimeRead | TimeSteps
_KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (TimeProducts, TimeAttention, TimeSmall, TimeLink, TimeRead, TimeSteps)
}


def question_to_json(question: Question) -> dict[str, object]:
    """The form that `question_from_json` reads."""
    return {"kind": type(question).__name__, "question": to_json(question)}


def question_from_json(body: dict[str, Any]) -> Question:
    """The question of a worker's call.

    Raises:
        EngineError: there is no such question.
    """
    kind = _KINDS.get(str(body.get("kind")))
    if kind is None:
        raise EngineError(f"there is nothing called `{body.get('kind')}` to time")
    question: Question = from_json(kind, body["question"])
    return question
