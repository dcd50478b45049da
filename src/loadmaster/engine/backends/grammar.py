"""JSON schemas as constraints on the next token, through llguidance: imported at first use.

llguidance compiles a schema into a parser over the model's own tokens. Its limits are set here, so
that a hostile schema costs milliseconds and a few MiB, not the worker.
"""

import ctypes as c
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from loadmaster.engine.types import SCHEMA_FAILED
from loadmaster.errors import UsageError

# A space, or a line break with indentation. Without a limit a small model writes spaces for ever.
WHITESPACE = r"( |\n[ \t]{0,20})?"
# Symbols of the grammar and states of its lexer (400 bytes each). An ordinary schema has hundreds;
# a string of bounded length takes 9 states for each character, as far as a text gets. 10,000
# symbols take 0.1 s and 5 MiB to compile, 100,000 took 1 s and 60 MiB (docs/log.md); objects with
# so many optional properties fail at their first step anyway.
MAX_GRAMMAR_SIZE = 10_000
MAX_LEXER_STATES = 50_000
_KEPT_SCHEMAS = 4
_ERROR_LENGTH = 300


class ByteVocabulary:
    """A vocabulary of bytes and one token more that ends a text, for `LLTokenizer`."""

    bos_token_id = None
    eos_token_id = 256
    special_token_ids = (256,)
    tokens = (*(bytes([i]) for i in range(256)), b"\xff<end>")

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def byte_tokenizer() -> Any:
    """The `LLTokenizer` of a model whose tokens are bytes."""
    from llguidance import LLTokenizer
    from llguidance._tokenizer import TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(ByteVocabulary()))


class Grammars:
    """The compiled schemas of one model. `open_tokenizer` gives its `LLTokenizer`, once."""

    def __init__(self, open_tokenizer: Callable[[], Any]) -> None:
        self._open_tokenizer = open_tokenizer
        self._tokenizer: Any = None
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    def check(self, schema: str) -> None:
        """Compile it. Raises UsageError when it is not valid or not supported."""
        self._matcher(schema)

    def start(self, schema: str) -> "Constraint":
        """The constraint at the start of a text."""
        # Copies share the lexer: one that is full serves nobody any more.
        matcher = self._matcher(schema).deep_copy()
        matcher.compute_bitmask()
        if matcher.is_error():
            del self._compiled[schema]
            matcher = self._matcher(schema).deep_copy()
        return Constraint(
            matcher,
            self._tokenizer.vocab_size,
            on_failure=lambda: self._compiled.pop(schema, None),
        )

    def _matcher(self, schema: str) -> Any:
        if schema not in self._compiled:
            self._compiled[schema] = self._compile(schema)
            if len(self._compiled) > _KEPT_SCHEMAS:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(schema)
        return self._compiled[schema]

    def _compile(self, schema: str) -> Any:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(
            max_grammar_size=MAX_GRAMMAR_SIZE,
            max_lexer_states=MAX_LEXER_STATES,
            verbose_errors=False,  # an error may be shown to others: not the schema, not the text
        )
        try:
            grammar = LLMatcher.grammar_from_json_schema(
                schema, defaults={"whitespace_pattern": WHITESPACE}
            )
        except ValueError as error:
            raise _refusal(str(error)) from None
        if self._tokenizer is None:
            self._tokenizer = self._open_tokenizer()
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        # The first mask finds what cannot be begun at all: `{"$ref": "#"}`.
        matcher.compute_bitmask()
        if matcher.is_error():
            raise _refusal(matcher.get_error())
        return matcher


def _refusal(reason: str) -> UsageError:
    words = _words(reason)
    if "oneOf" in words:
        words = "`oneOf` is supported only where its members exclude each other; use `anyOf`"
    elif not words or words.startswith("NoExtension"):
        words = "no text fulfils it"
    return UsageError(
        f"the JSON schema cannot be used: {words}",
        hint="docs/generation.md lists what a schema may use",
    )


def _words(reason: str) -> str:
    """llguidance's reason on one line; it may be a listing."""
    return " ".join(reason.removesuffix("<non-verbose/>").split())[:_ERROR_LENGTH]


class Constraint:
    """Where one text stands in its schema."""

    def __init__(
        self, matcher: Any, n_vocab: int, *, on_failure: Callable[[], object] = lambda: None
    ) -> None:
        self._matcher = matcher
        self._on_failure = on_failure
        self._bits = (c.c_uint32 * ((n_vocab + 31) // 32))()
        self._address = c.addressof(self._bits)
        self._n_bytes = c.sizeof(self._bits)
        self.failure: str | None = None  # why it cannot go on

    @property
    def ended(self) -> bool:
        """Nothing can follow any more: the value is complete, or it failed."""
        return self.failure is not None or bool(self._matcher.is_stopped())

    def allowed(self) -> "c.Array[c.c_uint32]":
        """A bit for each token that may come next; overwritten by the next call."""
        self._matcher.unsafe_compute_mask_ptr(self._address, self._n_bytes)
        self._note_error()
        return self._bits

    def accept(self, token: int) -> None:
        """The token that was taken, of those allowed."""
        if self.failure is None:
            self._matcher.consume_token(token)
            self._note_error()

    def _note_error(self) -> None:
        if self.failure is None and self._matcher.is_error():
            reason = _words(self._matcher.get_error())
            self.failure = f"{SCHEMA_FAILED}: {reason}"
            self._on_failure()
