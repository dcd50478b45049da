"""The least Python around llama.cpp: a greedy decode loop. Prints tokens per second.

    bare_loop.py MODEL N_CTX N_UBATCH N_THREADS N_TOKENS

Run with the engine build's `python` folder on the path and LLAMA_CPP_LIB_PATH set.
"""

import sys
import time

from llama_cpp import llama_cpp as api


def main() -> None:
    path = sys.argv[1]
    n_ctx, n_ubatch, n_threads, n_tokens = map(int, sys.argv[2:])
    api.llama_backend_init()
    model_params = api.llama_model_default_params()
    model_params.load_mode = 0  # none: weights in private memory, repacked where there is a kernel
    model = api.llama_model_load_from_file(path.encode(), model_params)
    params = api.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_ubatch, n_ubatch
    params.n_threads = params.n_threads_batch = n_threads
    params.flash_attn_type, params.n_outputs_max, params.swa_full = 1, 1, False
    context = api.llama_init_from_model(model, params)
    sampler = api.llama_sampler_init_greedy()
    batch = api.llama_batch_init(n_ubatch, 0, 1)
    batch.n_tokens, batch.n_seq_id[0], batch.seq_id[0][0], batch.logits[0] = 1, 1, 0, 1
    token = 1

    def step(position: int, token: int) -> int:
        batch.token[0], batch.pos[0] = token, position
        if api.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        return int(api.llama_sampler_sample(sampler, context, 0))

    for position in range(16):  # warm up, as the worker's peak commit and llama-bench do
        token = step(position, token)
    api.llama_memory_clear(api.llama_get_memory(context), False)
    token = step(0, 1)
    start = time.perf_counter()
    for position in range(1, n_tokens + 1):
        token = step(position, token)
    seconds = time.perf_counter() - start
    print(n_tokens / seconds)


if __name__ == "__main__":
    main()
