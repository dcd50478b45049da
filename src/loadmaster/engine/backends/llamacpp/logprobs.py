"""The logits of a step between the model and the sampler: masked by a schema, reported."""

import ctypes as c
from collections.abc import Callable
from typing import Any

from loadmaster.engine.backends.grammar import Constraint
from loadmaster.engine.backends.llamacpp.library import Library
from loadmaster.engine.types import TokenLogprob

MAX_TOP = 20
_Floats = c.POINTER(c.c_float)


class Logits:
    """Rows of logits of an open context, through the native library (logits.cpp)."""

    def __init__(self, library: Library, context: int, n_vocab: int) -> None:
        native = library.native
        native.lm_mask_logits.argtypes = [_Floats, c.c_int32, c.POINTER(c.c_uint32)]
        native.lm_mask_logits.restype = None
        native.lm_likeliest.argtypes = [
            _Floats, c.c_int32, c.c_int32, c.POINTER(c.c_int32), c.POINTER(c.c_double),
        ]  # fmt: skip
        self._mask, self._likeliest = native.lm_mask_logits, native.lm_likeliest
        self._row_of = library.api.llama_get_logits_ith
        self._context, self._n_vocab = context, n_vocab
        self._top = (c.c_int32 * MAX_TOP)()
        self._log_sum = c.c_double()

    def row(self, row: int) -> Any:
        """A row of the last step; what is written to it, the sampler sees."""
        return self._row_of(self._context, row)

    def mask(self, logits: Any, constraint: Constraint) -> None:
        """Leave only the tokens that the schema allows."""
        self._mask(logits, self._n_vocab, constraint.allowed())

    def likeliest(self, logits: Any, n_top: int) -> tuple[list[int], float]:
        """The `n_top` likeliest tokens, and what a logit exceeds its log-probability by."""
        n = self._likeliest(
            logits, self._n_vocab, min(n_top, MAX_TOP), self._top, c.byref(self._log_sum)
        )
        return self._top[: max(0, n)], self._log_sum.value


class Chooser:
    """Takes the next token of a sequence that follows a schema or reports log-probabilities."""

    def __init__(
        self,
        logits: Logits,
        sample: Callable[[int], int],
        token_bytes: Callable[[int], bytes],
        constraint: Constraint | None,
        n_top: int | None,
    ) -> None:
        """`sample` runs the sequence's sampler chain on a row."""
        self._logits, self._sample, self._token_bytes = logits, sample, token_bytes
        self._n_top = n_top
        self.constraint = constraint

    def choose(self, row: int) -> tuple[int, TokenLogprob | None]:
        """The next token; its log-probability is that before mask and sampling."""
        logits = self._logits.row(row)
        if self._n_top is None:
            return self._taken(logits, row), None
        likeliest, log_sum = self._logits.likeliest(logits, self._n_top)
        top = tuple((t, tuple(self._token_bytes(t)), logits[t] - log_sum) for t in likeliest)
        token = self._taken(logits, row)
        raw = tuple(self._token_bytes(token))
        return token, TokenLogprob(token=token, raw=raw, logprob=logits[token] - log_sum, top=top)

    def _taken(self, logits: Any, row: int) -> int:
        if self.constraint is None:
            return self._sample(row)
        self._logits.mask(logits, self.constraint)
        token = self._sample(row)
        self.constraint.accept(token)
        return token
