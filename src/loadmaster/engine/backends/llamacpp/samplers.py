"""The sampler of every sequence: its chain, and what a schema or log-probabilities add to it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loadmaster.engine.backends.grammar import Grammars
from loadmaster.engine.backends.llamacpp.library import Library
from loadmaster.engine.backends.llamacpp.logprobs import Chooser, Logits
from loadmaster.engine.backends.llamacpp.opened import OpenModel
from loadmaster.engine.backends.llamacpp.sampling import make_chain
from loadmaster.engine.types import (
    Accepted,
    OutputRules,
    SamplingParams,
    StepResult,
    TokenLogprob,
)


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
        sample, context, chains = self._api.llama_sampler_sample, self._opened.context, self._chains
        if not self._choosers:
            return StepResult(tokens={s: sample(chains[s], context, row) for s, row in outputs})
        choosers = self._choosers
        tokens: dict[int, int] = {}
        logprobs: dict[int, TokenLogprob] = {}
        for seq_id, row in outputs:
            if seq_id not in choosers:
                tokens[seq_id] = sample(chains[seq_id], context, row)
                continue
            tokens[seq_id], logprob = choosers[seq_id].choose(row)
            if logprob is not None:
                logprobs[seq_id] = logprob
        return StepResult(tokens=tokens, logprobs=logprobs, **self._ends(tokens))

    def check(
        self, outputs: Sequence[tuple[int, int]], drafts: Mapping[int, Sequence[int]]
    ) -> StepResult:
        """As `choose`; a sequence with a draft goes on with its next row for as long as its token
        is the draft's, and its value is not complete."""
        tokens: dict[int, int] = {}
        logprobs: dict[int, TokenLogprob] = {}
        accepted: dict[int, Accepted] = {}
        for seq_id, row in outputs:
            chosen = self._follow(seq_id, row, drafts.get(seq_id, ()))
            found = [logprob for _, logprob in chosen if logprob is not None]
            tokens[seq_id] = chosen[0][0]
            accepted[seq_id] = Accepted(
                tokens=tuple(token for token, _ in chosen[1:]), logprobs=tuple(found[1:])
            )
            if found:
                logprobs[seq_id] = found[0]
        return StepResult(tokens=tokens, logprobs=logprobs, accepted=accepted, **self._ends(tokens))

    def _follow(
        self, seq_id: int, row: int, draft: Sequence[int]
    ) -> list[tuple[int, TokenLogprob | None]]:
        """The tokens that a sequence samples from `row` on."""
        chain, context = self._chains[seq_id], self._opened.context
        chooser = self._choosers.get(seq_id)
        chosen: list[tuple[int, TokenLogprob | None]] = []
        for expected in (*draft, None):
            if chooser is None:
                token = self._api.llama_sampler_sample(chain, context, row + len(chosen))
                chosen.append((token, None))
            else:
                chosen.append(chooser.choose(row + len(chosen)))
                if chooser.constraint is not None and chooser.constraint.ended:
                    break
            if chosen[-1][0] != expected:
                break
        return chosen

    def _ends(self, tokens: Mapping[int, int]) -> Any:
        """What of the step's sequences their schemas have ended."""
        constraints = {
            seq_id: chooser.constraint
            for seq_id, chooser in self._choosers.items()
            if seq_id in tokens and chooser.constraint is not None
        }
        return {
            "ended": [seq_id for seq_id, constraint in constraints.items() if constraint.ended],
            "failed": {s: one.failure for s, one in constraints.items() if one.failure is not None},
        }

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
