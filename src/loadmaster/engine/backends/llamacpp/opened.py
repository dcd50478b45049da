"""An open model and its context: handles, what they report, and the cells."""

import ctypes as c
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loadmaster.engine.backends.llamacpp.library import Library
from loadmaster.engine.backends.llamacpp.params import context_params
from loadmaster.engine.backends.llamacpp.vocabulary import tokenize
from loadmaster.engine.types import Capabilities, LoadedModel
from loadmaster.errors import BusyError, EngineError, EngineRefusedError, UsageError
from loadmaster.plan.types import BufferSizes, EngineSettings

_NO_TOKEN = -1
_NO_VOCABULARY = 0  # LLAMA_VOCAB_TYPE_NONE: the engine asserts when such a model is asked for text
_PIECE_BYTES = 256
_MAX_SEQ_IDS = 256  # LLAMA_MAX_SEQ: of a unified cache of attention, whatever n_seq_max is
_TAIL_ID = _MAX_SEQ_IDS - 1  # for a moment, while the end of a sequence is restored
# Sparse attention: beside the cells they have caches of their own (llama_model::create_memory),
# which were not tried with more ids than n_seq_max.
_OWN_CACHES = frozenset({"deepseek32", "deepseek4", "glm-dsa", "hy_v4", "minimax-m3"})


class OpenModel:
    """Owns a `llama_model` and its `llama_context`."""

    def __init__(self, library: Library, model: int, settings: EngineSettings) -> None:
        self._library = library
        self._api = library.api
        self._handle = model
        self._settings = settings
        self._adapters: list[Any] = []
        self.context = 0
        self.vocab = self._api.llama_model_get_vocab(model)
        self.n_vocab: int = self._api.llama_vocab_n_tokens(self.vocab)
        self._has_text = self._api.llama_vocab_type(self.vocab) != _NO_VOCABULARY
        self._n_swa: int = 0 if settings.swa_full else self._api.llama_model_n_swa(model)
        architecture = self._metadata("general.architecture")
        if settings.pooling == "rank" and self._metadata(f"{architecture}.pooling_type") != "4":
            raise EngineRefusedError("the model does not rank: its header names no such pooling")
        self._recurrent = bool(
            self._api.llama_model_is_recurrent(model) or self._api.llama_model_is_hybrid(model)
        )
        own_caches = architecture in _OWN_CACHES
        self._is_plain = not (self._recurrent or self._n_swa or own_caches)
        self.pooling = settings.pooling
        self.n_embd: int = self._vector_width()
        is_eog = self._api.llama_vocab_is_eog
        self.eog = frozenset(t for t in range(self.n_vocab) if is_eog(self.vocab, t))

    def _metadata(self, key: str) -> str:
        value = c.create_string_buffer(64)
        self._api.llama_model_meta_val_str(self._handle, key.encode(), value, len(value))
        return value.value.decode("utf-8", "replace")

    def open_context(self) -> None:
        """Allocate the caches and compute buffers.

        Raises:
            EngineRefusedError: an allocation was refused.
        """
        params = context_params(self._library, self._settings)
        self.context = self._api.llama_init_from_model(self._handle, params.struct) or 0
        if not self.context:
            reason = self._library.error()
            self.close()
            raise EngineRefusedError(
                f"the engine cannot open n_ctx {self._settings.n_ctx}: {reason}"
            )
        self.n_batch: int = self._api.llama_n_batch(self.context)
        self.n_ubatch: int = self._api.llama_n_ubatch(self.context)
        self.n_ctx: int = self._api.llama_n_ctx(self.context)
        self.n_ctx_seq: int = self._api.llama_n_ctx_seq(self.context)
        self._memory = self._api.llama_get_memory(self.context)

    def apply_adapters(self) -> None:
        """Load the LoRA files and switch them on.

        Raises:
            EngineRefusedError: a file does not belong to this model.
        """
        wanted = self._settings.adapters
        for adapter in wanted:
            handle = self._api.llama_adapter_lora_init(self._handle, adapter.path.encode())
            if not handle:
                raise EngineRefusedError(
                    f"the engine cannot load adapter `{adapter.path}`: {self._library.error()}"
                )
            self._adapters.append(handle)
        if wanted:
            handles = (self._api.llama_adapter_lora_p_ctypes * len(wanted))(*self._adapters)
            scales = (c.c_float * len(wanted))(*(adapter.scale for adapter in wanted))
            self._api.llama_set_adapters_lora(self.context, handles, len(wanted), scales)

    def describe(self, load_s: float) -> LoadedModel:
        bos = self._api.llama_vocab_bos(self.vocab)
        return LoadedModel(
            n_ctx=self.n_ctx,
            n_ctx_seq=self.n_ctx_seq,
            n_vocab=self.n_vocab,
            load_s=load_s,
            eog_tokens=tuple(sorted(self.eog)),
            bos_token=_token(bos),
            add_bos=bool(self._api.llama_vocab_get_add_bos(self.vocab)),
            bos_text=self._special_text(bos),
            eos_text=self._special_text(self._api.llama_vocab_eos(self.vocab)),
            fim_prefix=_token(self._api.llama_vocab_fim_pre(self.vocab)),
            fim_suffix=_token(self._api.llama_vocab_fim_suf(self.vocab)),
            fim_middle=_token(self._api.llama_vocab_fim_mid(self.vocab)),
            pooling=self.pooling,
            n_embd=self.n_embd,
            n_embed_max=0 if self.pooling is None else self.n_ubatch,
        )

    def _vector_width(self) -> int:
        """Numbers in a pooled vector."""
        if self.pooling is None:
            return 0
        if self.pooling == "rank":
            return int(self._api.llama_model_n_cls_out(self._handle))
        return int(self._api.llama_model_n_embd_out(self._handle))

    def pair_tokens(self, query: str, document: str) -> list[int]:
        """As llama-server makes them: by the model's template for it, else by separators."""
        api, vocab = self._api, self.vocab
        template = api.llama_model_chat_template(self._handle, b"rerank")
        if template:
            text = template.decode("utf-8", "replace").replace("{query}", query)
            return self.tokenize(text.replace("{document}", document), False, True)
        begin = [api.llama_vocab_bos(vocab)] if api.llama_vocab_get_add_bos(vocab) else []
        end = [api.llama_vocab_eos(vocab)] if api.llama_vocab_get_add_eos(vocab) else []
        between = [api.llama_vocab_sep(vocab)] if api.llama_vocab_get_add_sep(vocab) else []
        asked, offered = (self.tokenize(text, False, False) for text in (query, document))
        tokens = [*begin, *asked, *end, *between, *offered, *end]
        return [token for token in tokens if token != _NO_TOKEN]

    def _special_text(self, token: int) -> str:
        if token == _NO_TOKEN:
            return ""
        text: bytes = self._api.llama_vocab_get_text(self.vocab, token)
        return text.decode("utf-8", "replace")

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of a token; none without a vocabulary. Of a control token if `special`."""
        if not self._has_text:
            return b""
        buffer = c.create_string_buffer(_PIECE_BYTES)
        read = self._api.llama_token_to_piece
        n = read(self.vocab, token, buffer, len(buffer), 0, special)
        if n < 0:
            buffer = c.create_string_buffer(-n)
            n = read(self.vocab, token, buffer, len(buffer), 0, special)
        return buffer.raw[: max(0, n)]

    def grammar_tokenizer(self) -> Any:
        """The vocabulary as an `LLTokenizer` of llguidance; a second for 200,000 tokens.

        Raises:
            UsageError: no text of this model can end.
        """
        from llguidance import LLTokenizer

        if not self._has_text or not self.eog:
            raise UsageError("the model has no token that ends a text: no schema can be followed")
        pieces = [self.piece(token, special=True) for token in range(self.n_vocab)]
        return LLTokenizer.from_llamacpp(  # type: ignore[attr-defined]
            tokens=[self._marked(token, text) for token, text in enumerate(pieces)],
            vocab_ptr=self.vocab,
            tokenize_fptr=c.cast(self._api._lib.llama_tokenize, c.c_void_p).value,
            eos_token=sorted(self.eog),
            slices=LLTokenizer.json_slices()[-1:],  # any text: 67 µs for 128,000 tokens, not 4 ms
        )

    def _marked(self, token: int, text: bytes) -> bytes:
        """What is no text (control tokens, tags) begins with 0xFF, for llguidance."""
        return b"\xff" + text if self._is_tag(token, text) else text

    def _is_tag(self, token: int, text: bytes) -> bool:
        attributes = self._api.llama_vocab_get_attr(self.vocab, token)
        if attributes & self._api.LLAMA_TOKEN_ATTR_CONTROL:
            return True
        defined = bool(attributes & self._api.LLAMA_TOKEN_ATTR_USER_DEFINED)
        return defined and text.startswith(b"<") and text.endswith(b">")

    def capabilities(self) -> Capabilities:
        n_seq_max: int = self._api.llama_n_seq_max(self.context)
        shared = self._settings.kv_unified or n_seq_max == 1
        partial_state = shared and self._is_plain and n_seq_max < _MAX_SEQ_IDS
        return Capabilities(
            n_seq_max=n_seq_max,
            shared_prefix=shared,
            partial_removal=not self._recurrent,
            state_save=True,
            n_seq_ids=_MAX_SEQ_IDS - 1 if partial_state else n_seq_max,
            shared_at_end=self._recurrent or self._n_swa > 0,
            partial_state=partial_state,
            drafts=not self._recurrent,
        )

    @property
    def filler_token(self) -> int:
        """Some token of the vocabulary."""
        return max(0, int(self._api.llama_vocab_bos(self.vocab)))

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        return tokenize(self._api, self.vocab, text, add_special, parse_special)

    def buffers(self) -> tuple[BufferSizes, ...]:
        return self._library.buffers(self.context)

    # -- cells

    def remove(self, seq_id: int, start: int) -> bool:
        """Drop cells from `start` on. False: all are dropped, the tail alone cannot be."""
        if start == 0:
            return bool(self._api.llama_memory_seq_rm(self._memory, seq_id, -1, -1))
        drop = self._api.llama_memory_seq_rm
        if self._reaches(seq_id, start) and drop(self._memory, seq_id, start, -1):
            return True
        self._api.llama_memory_seq_rm(self._memory, seq_id, -1, -1)
        return False

    def clear(self) -> None:
        """Forget all sequences. Recurrent state is zeroed, too: the engine starts a sequence by
        scaling the old state by 0, which leaves a NaN a NaN (seen with random weights)."""
        self._api.llama_memory_clear(self._memory, self._recurrent)

    def share(self, source: int, seq_id: int, n: int) -> bool:
        """Give an empty sequence the first `n` cells of another; False when it gets none."""
        if n == 0:
            return True
        if not self._reaches(source, n):
            return False
        self._api.llama_memory_seq_cp(self._memory, source, seq_id, 0, n)
        at_end = self._api.llama_memory_seq_pos_max(self._memory, source) + 1 == n
        if not self._n_swa or self._recurrent or not at_end or self._copy_window(source, seq_id):
            return True
        self.remove(seq_id, 0)
        return False

    def _copy_window(self, source: int, seq_id: int) -> bool:
        """Give a sequence a window of its own in place of the shared cells.

        The engine takes a cell behind the window of its one sequence for new tokens, but never one
        that several have (llama_kv_cache::find_slot): shared windows would fill the cache up.
        """
        flags = self._api.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        size = self._api.llama_state_seq_get_size_ext(self.context, source, flags)
        buffer = (c.c_uint8 * size)()
        get, put = self._api.llama_state_seq_get_data_ext, self._api.llama_state_seq_set_data_ext
        written = get(self.context, buffer, size, source, flags)
        return bool(written) and bool(put(self.context, buffer, written, seq_id, flags))

    def _reaches(self, seq_id: int, n: int) -> bool:
        """Whether a sequence has all that the tokens after its first `n` need.

        With a sliding window, cells before it are gone; recurrent state is that of its end.
        """
        last: int = self._api.llama_memory_seq_pos_max(self._memory, seq_id)
        if self._recurrent:
            return last + 1 == n
        first: int = self._api.llama_memory_seq_pos_min(self._memory, seq_id)
        # llama_hparams::is_masked_swa: the token at `n` sees `n_swa` positions, its own included.
        return last + 1 >= n and (self._n_swa == 0 or first <= max(0, n + 1 - self._n_swa))

    def save_state(self, seq_id: int) -> bytes:
        """Raises EngineError when the engine cannot, or when all ids that can run are in use."""
        with self._runnable(seq_id) as home:
            return self._state(home)

    def take_state(self, seq_id: int, start: int, limit_bytes: int) -> bytes | None:
        """Drop a sequence; return its cells from `start` on if they take no more than so much."""
        drop, state = self._api.llama_memory_seq_rm, None
        if limit_bytes:
            if start:  # what is left is all that the engine writes
                drop(self._memory, seq_id, 0, start)
            if self._api.llama_state_seq_get_size(self.context, seq_id) <= limit_bytes:
                state = self._state(seq_id)
        drop(self._memory, seq_id, -1, -1)
        return state

    def _state(self, seq_id: int) -> bytes:
        size = self._api.llama_state_seq_get_size(self.context, seq_id)
        buffer = (c.c_uint8 * size)()
        written = self._api.llama_state_seq_get_data(self.context, buffer, size, seq_id)
        if written == 0:
            raise EngineError(f"the engine cannot save sequence {seq_id}")
        return bytes(memoryview(buffer)[:written])

    @contextmanager
    def _runnable(self, seq_id: int) -> Iterator[int]:
        """An id that can run with the cells of one that may not be able to: only those are
        written whole (llama_kv_cache::state_write_meta)."""
        last, n_seq_max = self._api.llama_memory_seq_pos_max, self.capabilities().n_seq_max
        if seq_id < n_seq_max:
            yield seq_id
            return
        empty = (i for i in range(n_seq_max) if last(self._memory, i) < 0)
        home = next(empty, None)
        if home is None:
            raise BusyError("every sequence is running: there is none to save through")
        self._api.llama_memory_seq_cp(self._memory, seq_id, home, -1, -1)
        try:
            yield home
        finally:
            self._api.llama_memory_seq_rm(self._memory, home, -1, -1)

    def restore_state(self, seq_id: int, state: bytes, start: int = 0) -> None:
        """Raises EngineRefusedError when the state belongs to another model or n_ctx is short."""
        buffer = (c.c_uint8 * len(state)).from_buffer_copy(state)
        home = _TAIL_ID if start else seq_id
        if not self._api.llama_state_seq_set_data(self.context, buffer, len(state), home):
            self._api.llama_memory_seq_rm(self._memory, home, -1, -1)
            raise EngineRefusedError(
                f"the engine refused a saved state of {len(state)} bytes: {self._library.error()}"
            )
        if start:
            self._api.llama_memory_seq_cp(self._memory, _TAIL_ID, seq_id, start, -1)
            self._api.llama_memory_seq_rm(self._memory, _TAIL_ID, -1, -1)

    def close(self) -> None:
        if self.context:
            self._api.llama_free(self.context)
            self.context = 0
        for adapter in self._adapters:
            self._api.llama_adapter_lora_free(adapter)
        self._adapters.clear()
        if self._handle:
            self._api.llama_model_free(self._handle)
            self._handle = 0


def _token(token: int) -> int | None:
    return None if token == _NO_TOKEN else token
