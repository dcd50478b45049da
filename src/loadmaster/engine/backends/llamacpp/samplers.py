"""The sampler of every sequence: its chain, and what a schema or log-probabilities add to it."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

from loadmaster.engine.backends.grammar import Constraint, Grammars
from loadmaster.engine.backends.llamacpp.library import Library
from loadmaster.engine.backends.llamacpp.logprobs import Chooser, Logits
from loadmaster.engine.backends.llamacpp.opened import OpenModel
from loadmaster.engine.backends.llamacpp.sampling import make_chain
from loadmaster.engine.backends.sampled import Choice, follow, step_result
from loadmaster.engine.types import OutputRules, SamplingParams, StepResult


class Samplers:
    """The sampler of every sequence of an open context."""

    def __init__(
        self,
        library: Library,
        opened: OpenModel,
        grammars: Grammars,
        token_bytes: Callable[[int], bytes],
    ) -> None:
        self._api, self._opened = library.api, opened
        self._logits = Logits(library, opened.context, opened.n_vocab)
        self._grammars, self._token_bytes = grammars, token_bytes
        self._chains: dict[int, Any] = {}
        self._choosers: dict[int, Chooser] = {}  # of the sequences that need one

    def start(
        self, seq_id: int, sampling: SamplingParams, recent: Sequence[int], rules: OutputRules
    ) -> None:
        """A new sampler in place of the sequence's last one."""
        self.free(seq_id)
        opened, context = self._opened, self._opened.context
        chain = make_chain(self._api, opened.n_vocab, opened.n_ctx_seq, sampling, recent)
        self._chains[seq_id] = chain
        if (rules.json_schema, rules.top_logprobs) != (None, None):
            constraint = None
            if rules.json_schema is not None:
                constraint = self._grammars.start(rules.json_schema)
            sample = self._api.llama_sampler_sample
            self._choosers[seq_id] = Chooser(
                self._logits,
                lambda row: sample(chain, context, row),
                self._token_bytes,
                constraint,
                rules.top_logprobs,
            )

    def chain(self, seq_id: int) -> Any:
        """The `llama_sampler` of a sequence."""
        return self._chains[seq_id]

    def choose(self, outputs: Sequence[tuple[int, int]]) -> StepResult:
        """A token for each (sequence, row) of the step that has just run."""
        if not self._choosers:
            sample, context = self._api.llama_sampler_sample, self._opened.context
            chains = self._chains
            return StepResult(tokens={s: sample(chains[s], context, row) for s, row in outputs})
        chosen = {seq_id: [self._choose(seq_id, row)] for seq_id, row in outputs}
        return step_result(chosen, self._constraints(chosen))

    def check(
        self, outputs: Sequence[tuple[int, int]], drafts: Mapping[int, Sequence[int]]
    ) -> StepResult:
        """As `choose`; a sequence with a draft goes on with its next row as `follow` says."""
        chosen = {
            s: follow(partial(self._choose, s), row, drafts.get(s, ()), self._constraint(s))
            for s, row in outputs
        }
        return step_result(chosen, self._constraints(chosen), chosen)

    def _choose(self, seq_id: int, row: int) -> Choice:
        chooser = self._choosers.get(seq_id)
        if chooser is not None:
            return chooser.choose(row)
        sample = self._api.llama_sampler_sample
        return sample(self._chains[seq_id], self._opened.context, row), None

    def _constraint(self, seq_id: int) -> Constraint | None:
        chooser = self._choosers.get(seq_id)
        return None if chooser is None else chooser.constraint

    def _constraints(self, chosen: Collection[int]) -> dict[int, Constraint | None]:
        return {seq_id: self._constraint(seq_id) for seq_id in chosen}

    def move(self, source: int, target: int) -> None:
        """The sampler of `source` is that of `target` now, wherever it stands."""
        self.free(target)
        self._chains[target] = self._chains.pop(source)
        if source in self._choosers:
            self._choosers[target] = self._choosers.pop(source)

    def free(self, seq_id: int) -> None:
        """Forget the sequence's sampler."""
        self._choosers.pop(seq_id, None)
        chain = self._chains.pop(seq_id, None)
        if chain is not None:
            self._api.llama_sampler_free(chain)

    def free_all(self) -> None:
        for seq_id in tuple(self._chains):
            self.free(seq_id)
