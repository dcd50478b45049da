"""Teacher-forced solo runs: how far below the best every token was that a batch chose.

    forced.py MODEL N_CTX N_THREADS < [{"prompt": […], "output": […]}, …]

Prints one list for each request: the best logit less that of the token taken, at every position,
in a sequence of its own. Run with the engine build's `python` folder on the path and
LLAMA_CPP_LIB_PATH set.
"""

import json
import sys
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as api

N_BATCH = 256


class Solo:
    """A context of one sequence."""

    def __init__(self, path: str, n_ctx: int, n_threads: int) -> None:
        api.llama_backend_init()
        model_params = api.llama_model_default_params()
        model_params.load_mode = 0  # none, as the worker
        model = api.llama_model_load_from_file(path.encode(), model_params)
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, N_BATCH, N_BATCH
        params.n_threads = params.n_threads_batch = n_threads
        params.flash_attn_type, params.n_outputs_max = 1, 1
        self._context = api.llama_init_from_model(model, params)
        self._n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self._batch = api.llama_batch_init(N_BATCH, 0, 1)

    def gaps(self, prompt: list[int], output: list[int]) -> list[float]:
        """Best logit less the chosen one, for every token of `output`: fed as a run alone would
        feed them, the prompt in chunks and then one by one."""
        api.llama_memory_clear(api.llama_get_memory(self._context), False)
        for start in range(0, len(prompt), N_BATCH):
            self._decode(prompt[start : start + N_BATCH], start)
        gaps = [self._gap(output[0])]
        for index, token in enumerate(output[:-1]):
            self._decode([token], len(prompt) + index)
            gaps.append(self._gap(output[index + 1]))
        return gaps

    def _decode(self, tokens: list[int], start: int) -> None:
        batch: Any = self._batch
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index], batch.pos[index] = token, start + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = index == len(tokens) - 1
        if api.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")

    def _gap(self, token: int) -> float:
        pointer = api.llama_get_logits_ith(self._context, -1)
        logits = np.ctypeslib.as_array(pointer, (self._n_vocab,))
        return float(logits.max() - logits[token])


def main() -> None:
    path, n_ctx, n_threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    solo = Solo(path, n_ctx, n_threads)
    requests = json.load(sys.stdin)
    print(json.dumps([solo.gaps(each["prompt"], each["output"]) for each in requests]))


if __name__ == "__main__":
    main()
