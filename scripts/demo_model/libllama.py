"""A GGUF file read by libllama, as far as the evaluation needs it.

The library is found as llama-cpp-python finds it: LLAMA_CPP_LIB_PATH is its folder.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
import numpy.typing as npt

N_CTX = 2048


@llama.llama_log_callback  # type: ignore[untyped-decorator, unused-ignore]
def _no_log(level: int, text: bytes, user_data: object) -> None:
    pass


class LlamaFile:
    """One sequence at a time, on the CPU; the logits of every token."""

    def __init__(self, path: Path, n_thread: int = 2) -> None:
        llama.llama_log_set(_no_log, ctypes.c_void_p(0))
        llama.llama_backend_init()
        model_params: Any = llama.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model: Any = llama.llama_model_load_from_file(str(path).encode(), model_params)
        if not self._model:
            raise ValueError(f"`{path}` is not a model that libllama reads")
        params: Any = llama.llama_context_default_params()
        params.n_ctx = params.n_batch = N_CTX
        params.n_threads = params.n_threads_batch = n_thread
        self._context: Any = llama.llama_init_from_model(self._model, params)
        self._vocab: Any = llama.llama_model_get_vocab(self._model)
        self.n_vocab: int = llama.llama_vocab_n_tokens(self._vocab)

    def tokenize(self, text: str, parse_special: bool = True) -> list[int]:
        raw = text.encode()
        tokens = (llama.llama_token * (len(raw) + 8))()
        n_token: int = llama.llama_tokenize(
            self._vocab, raw, len(raw), tokens, len(tokens), True, parse_special
        )
        return list(tokens[:n_token])

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text, special tokens included."""
        buffer = ctypes.create_string_buffer(64)
        raw = b""
        for token in tokens:
            n_byte = llama.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
            raw += buffer.raw[:n_byte]
        return raw.decode(errors="replace")

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """One row for every token; what was decoded before is forgotten."""
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        batch: Any = llama.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i] = token, i
                batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
            status = llama.llama_decode(self._context, batch)
        finally:
            llama.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        rows = llama.llama_get_logits(self._context)
        return np.ctypeslib.as_array(rows, shape=(len(tokens), self.n_vocab)).copy()
