"""A model's vocabulary alone: text to tokens without loading a weight."""

import ctypes as c
from pathlib import Path
from typing import Any

from loadmaster.engine.backends.llamacpp.library import Library
from loadmaster.engine.types import LoadedModel
from loadmaster.errors import EngineRefusedError

_NO_TOKEN = -1
_NO_VOCABULARY = 0  # LLAMA_VOCAB_TYPE_NONE: the engine asserts when such a model is asked for text


class Vocabulary:
    """Owns a `llama_model` that was opened for its tokenizer."""

    def __init__(self, library: Library, path: Path) -> None:
        self._api = library.api
        params = self._api.llama_model_default_params()
        params.vocab_only = True
        self._model = self._api.llama_model_load_from_file(str(path).encode(), params) or 0
        if not self._model:
            raise EngineRefusedError(
                f"the engine cannot read the vocabulary of `{path.name}`: {library.error()}"
            )
        self._vocab = self._api.llama_model_get_vocab(self._model)

    def describe(self) -> LoadedModel:
        """What is known of a model without a context."""
        api, vocab = self._api, self._vocab
        bos, eos = api.llama_vocab_bos(vocab), api.llama_vocab_eos(vocab)
        n_vocab = int(api.llama_vocab_n_tokens(vocab))
        return LoadedModel(
            n_ctx=0,
            n_ctx_seq=0,
            n_vocab=n_vocab,
            load_s=0.0,
            eog_tokens=(),
            bos_token=None if bos == _NO_TOKEN else bos,
            add_bos=bool(api.llama_vocab_get_add_bos(vocab)),
            bos_text=self._text(bos),
            eos_text=self._text(eos),
        )

    def _text(self, token: int) -> str:
        if token == _NO_TOKEN:
            return ""
        text: bytes = self._api.llama_vocab_get_text(self._vocab, token)
        return text.decode("utf-8", "replace")

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """Tokens of a text."""
        return tokenize(self._api, self._vocab, text, add_special, parse_special)

    def close(self) -> None:
        """Free it. Idempotent."""
        if self._model:
            self._api.llama_model_free(self._model)
        self._model = 0


def tokenize(api: Any, vocab: Any, text: str, add_special: bool, parse_special: bool) -> list[int]:
    """Tokens of a text by a `llama_vocab`.

    Raises:
        EngineRefusedError: it has no texts.
    """
    if api.llama_vocab_type(vocab) == _NO_VOCABULARY:
        raise EngineRefusedError(
            "the model has no vocabulary: it takes tokens, not text",
            hint="use a file with a tokenizer; `no_vocab` files are for sizing",
        )
    raw = text.encode()
    tokens = (c.c_int32 * (len(raw) + 8))()
    arguments = (vocab, raw, len(raw), tokens, len(tokens), add_special, parse_special)
    n = api.llama_tokenize(*arguments)
    if n < 0:  # more tokens than bytes: the vocabulary adds its own
        tokens = (c.c_int32 * -n)()
        n = api.llama_tokenize(
            vocab, raw, len(raw), tokens, len(tokens), add_special, parse_special
        )
    return list(tokens[: max(0, n)])
