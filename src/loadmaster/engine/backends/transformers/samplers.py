"""The sampler of every sequence, and what a schema or log-probabilities add to it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from loadmaster.engine.backends.grammar import Constraint, Grammars
from loadmaster.engine.backends.sampled import Choice, follow, step_result
from loadmaster.engine.backends.transformers.sampling import Sampler
from loadmaster.engine.types import OutputRules, SamplingParams, StepResult, TokenLogprob

MAX_TOP = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chooser:
    """How the tokens of one sequence are chosen."""

    sampler: Sampler
    constraint: Constraint | None
    n_top: int | None

    @property
    def is_greedy(self) -> bool:
        """Whether it is the likeliest token, and nothing else is asked."""
        return self.sampler.is_plain_greedy and (self.constraint, self.n_top) == (None, None)


class Samplers:
    """The samplers of an open model's sequences."""

    def __init__(self, grammars: Grammars, token_bytes: Callable[[int], bytes], n_ctx: int) -> None:
        self._grammars, self._token_bytes, self._n_ctx = grammars, token_bytes, n_ctx
        self._choosers: dict[int, _Chooser] = {}

    def start(
        self, seq_id: int, sampling: SamplingParams, recent: Sequence[int], rules: OutputRules
    ) -> None:
        """A new sampler in place of the sequence's last one."""
        schema = rules.json_schema
        self._choosers[seq_id] = _Chooser(
            sampler=Sampler(sampling, recent, self._n_ctx),
            constraint=None if schema is None else self._grammars.start(schema),
            n_top=rules.top_logprobs,
        )

    def move(self, source: int, target: int) -> None:
        """The sampler of `source` is that of `target` now, wherever it stands."""
        self._choosers[target] = self._choosers.pop(source)

    def free(self, seq_id: int) -> None:
        """Forget the sequence's sampler."""
        self._choosers.pop(seq_id, None)

    def choose(self, logits: Any, outputs: Sequence[tuple[int, int]]) -> StepResult:
        """A token for each (sequence, row) of a step's logits."""
        choosers = {seq_id: self._choosers[seq_id] for seq_id, _ in outputs}
        if all(one.is_greedy for one in choosers.values()):
            likeliest = logits.argmax(dim=-1).tolist()
            return StepResult(tokens={seq_id: likeliest[row] for seq_id, row in outputs})
        # A copy: samplers write to their rows, and a bfloat16's steps are too wide to add to.
        rows = logits.to(device="cpu", dtype=torch.float32, copy=True)
        chosen = {s: [self._choose(choosers[s], rows, row)] for s, row in outputs}
        return step_result(chosen, _constraints(choosers))

    def check(
        self,
        logits: Any,
        outputs: Sequence[tuple[int, int]],
        drafts: Mapping[int, Sequence[int]],
    ) -> StepResult:
        """As `choose`; a sequence with a draft goes on with its next row as `follow` says."""
        choosers = {seq_id: self._choosers[seq_id] for seq_id, _ in outputs}
        constraints = _constraints(choosers)
        rows = logits.to(device="cpu", dtype=torch.float32, copy=True)
        chosen = {
            s: follow(
                partial(self._choose, choosers[s], rows), row, drafts.get(s, ()), constraints[s]
            )
            for s, row in outputs
        }
        return step_result(chosen, constraints, chosen)

    def _choose(self, chooser: _Chooser, rows: Any, row: int) -> Choice:
        """A row's token; its log-probability is that before mask and sampling."""
        logits = rows[row]
        logs = None if chooser.n_top is None else torch.log_softmax(logits, dim=-1)
        if chooser.constraint is not None:
            logits[~_allowed(chooser.constraint, logits.numel())] = float("-inf")
        token = chooser.sampler.sample(logits)
        if chooser.constraint is not None:
            chooser.constraint.accept(token)
        return token, None if logs is None else self._reported(token, logs, chooser.n_top or 0)

    def _reported(self, token: int, logs: Any, n_top: int) -> TokenLogprob:
        values, tokens = torch.topk(logs, min(n_top, MAX_TOP, logs.numel()))
        top = zip(tokens.tolist(), values.tolist(), strict=True)
        raw = self._token_bytes
        return TokenLogprob(
            token=token,
            raw=tuple(raw(token)),
            logprob=float(logs[token]),
            top=tuple((one, tuple(raw(one)), logprob) for one, logprob in top),
        )


def _constraints(choosers: Mapping[int, _Chooser]) -> dict[int, Constraint | None]:
    return {seq_id: one.constraint for seq_id, one in choosers.items()}


def _allowed(constraint: Constraint, n_vocab: int) -> Any:
    """A truth value for each token: may it come next?"""
    words = torch.frombuffer(constraint.allowed(), dtype=torch.int32)
    bits = words[:, None].bitwise_right_shift(torch.arange(32, dtype=torch.int32)) & 1
    allowed = bits.reshape(-1)[:n_vocab].bool()
    missing = n_vocab - allowed.numel()  # rows of the output that no token has
    return allowed if missing <= 0 else torch.nn.functional.pad(allowed, (0, missing))
