"""An open model and its context: handles, what they report, and the cells."""

import ctypes as c
from typing import Any

from loadmaster.engine.backends.llamacpp.library import Library
from loadmaster.engine.backends.llamacpp.params import context_params
from loadmaster.engine.types import Capabilities, LoadedModel
from loadmaster.errors import EngineError, EngineRefusedError
from loadmaster.plan.types import BufferSizes, EngineSettings

_NO_TOKEN = -1
_NO_VOCABULARY = 0  # LLAMA_VOCAB_TYPE_NONE: the engine asserts when such a model is asked for text
_PIECE_BYTES = 256


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
        self._recurrent = bool(
            self._api.llama_model_is_recurrent(model) or self._api.llama_model_is_hybrid(model)
        )
        is_eog = self._api.llama_vocab_is_eog
        self.eog = frozenset(t for t in range(self.n_vocab) if is_eog(self.vocab, t))

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
            bos_token=None if bos == _NO_TOKEN else bos,
            add_bos=bool(self._api.llama_vocab_get_add_bos(self.vocab)),
            bos_text=self._special_text(bos),
            eos_text=self._special_text(self._api.llama_vocab_eos(self.vocab)),
        )

    def _special_text(self, token: int) -> str:
        if token == _NO_TOKEN:
            return ""
        text: bytes = self._api.llama_vocab_get_text(self.vocab, token)
        return text.decode("utf-8", "replace")

    def piece(self, token: int) -> bytes:
        """The bytes of a token; none for a control token, or without a vocabulary."""
        if not self._has_text:
            return b""
        buffer = c.create_string_buffer(_PIECE_BYTES)
        read = self._api.llama_token_to_piece
        n = read(self.vocab, token, buffer, len(buffer), 0, False)
        if n < 0:
            buffer = c.create_string_buffer(-n)
            n = read(self.vocab, token, buffer, len(buffer), 0, False)
        return buffer.raw[: max(0, n)]

    def capabilities(self) -> Capabilities:
        unified = self._settings.kv_unified
        return Capabilities(
            n_seq_max=self._api.llama_n_seq_max(self.context),
            shared_prefix=unified and not self._recurrent,
            partial_removal=not self._recurrent,
            state_save=True,
        )

    @property
    def filler_token(self) -> int:
        """Some token of the vocabulary."""
        return max(0, int(self._api.llama_vocab_bos(self.vocab)))

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        if not self._has_text:
            raise EngineRefusedError(
                "the model has no vocabulary: it takes tokens, not text",
                hint="use a file with a tokenizer; `no_vocab` files are for sizing",
            )
        raw = text.encode()
        tokens = (c.c_int32 * (len(raw) + 8))()
        arguments = (self.vocab, raw, len(raw), tokens, len(tokens), add_special, parse_special)
        n = self._api.llama_tokenize(*arguments)
        if n < 0:  # more tokens than bytes: the vocabulary adds its own
            tokens = (c.c_int32 * -n)()
            n = self._api.llama_tokenize(
                self.vocab, raw, len(raw), tokens, len(tokens), add_special, parse_special
            )
        return list(tokens[: max(0, n)])

    def buffers(self) -> tuple[BufferSizes, ...]:
        return self._library.buffers(self.context)

    # -- cells

    def remove(self, seq_id: int, start: int) -> bool:
        """Drop cells from `start` on. False: all are dropped, the tail alone cannot be."""
        if start == 0:
            return bool(self._api.llama_memory_seq_rm(self._memory, seq_id, -1, -1))
        whole = self._api.llama_memory_seq_pos_max(self._memory, seq_id) + 1 >= start
        # With a sliding window, cells before it are gone: the tokens after `start` need them.
        first = self._api.llama_memory_seq_pos_min(self._memory, seq_id)
        windowed = self._n_swa > 0 and first > max(0, start - self._n_swa)
        if (
            whole
            and not windowed
            and self._api.llama_memory_seq_rm(self._memory, seq_id, start, -1)
        ):
            return True
        self._api.llama_memory_seq_rm(self._memory, seq_id, -1, -1)
        return False

    def clear(self) -> None:
        """Forget all sequences. Recurrent state is zeroed, too: the engine starts a sequence by
        scaling the old state by 0, which leaves a NaN a NaN (seen with random weights)."""
        self._api.llama_memory_clear(self._memory, self._recurrent)

    def save_state(self, seq_id: int) -> bytes:
        size = self._api.llama_state_seq_get_size(self.context, seq_id)
        buffer = (c.c_uint8 * size)()
        written = self._api.llama_state_seq_get_data(self.context, buffer, size, seq_id)
        if written == 0:
            raise EngineError(f"the engine cannot save sequence {seq_id}")
        return bytes(memoryview(buffer)[:written])

    def restore_state(self, seq_id: int, state: bytes) -> None:
        """Raises EngineRefusedError when the state belongs to another model or n_ctx is short."""
        buffer = (c.c_uint8 * len(state)).from_buffer_copy(state)
        if not self._api.llama_state_seq_set_data(self.context, buffer, len(state), seq_id):
            raise EngineRefusedError(
                f"the engine refused a saved state of {len(state)} bytes: {self._library.error()}"
            )

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
