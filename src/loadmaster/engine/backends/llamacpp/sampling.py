"""Sampler chains of llama.cpp, in llama.cpp's own order."""

from collections.abc import Sequence
from typing import Any

from loadmaster.engine.types import SamplingParams

_KEEP_AT_LEAST = 1
_SEED_MASK = 0xFFFF_FFFF


def make_chain(api: Any, n_vocab: int, sampling: SamplingParams, recent: Sequence[int] = ()) -> Any:
    """A new `llama_sampler` chain; the caller frees it."""
    params = api.llama_sampler_chain_default_params()
    params.no_perf = True
    chain = api.llama_sampler_chain_init(params)
    for sampler in _samplers(api, n_vocab, sampling):
        api.llama_sampler_chain_add(chain, sampler)
    if sampling.repeat_penalty != 1.0:
        for token in recent[-sampling.repeat_last_n :]:
            api.llama_sampler_accept(chain, token)
    return chain


def _samplers(api: Any, n_vocab: int, sampling: SamplingParams) -> list[Any]:
    samplers = []
    if sampling.repeat_penalty != 1.0 and sampling.repeat_last_n:
        samplers.append(
            api.llama_sampler_init_penalties(
                n_vocab, sampling.repeat_last_n, sampling.repeat_penalty, 0.0, 0.0
            )
        )
    if sampling.temperature <= 0:
        return [*samplers, api.llama_sampler_init_greedy()]
    if sampling.top_k > 0:
        samplers.append(api.llama_sampler_init_top_k(sampling.top_k))
    if sampling.top_p < 1.0:
        samplers.append(api.llama_sampler_init_top_p(sampling.top_p, _KEEP_AT_LEAST))
    if sampling.min_p > 0.0:
        samplers.append(api.llama_sampler_init_min_p(sampling.min_p, _KEEP_AT_LEAST))
    samplers.append(api.llama_sampler_init_temp(sampling.temperature))
    samplers.append(api.llama_sampler_init_dist(sampling.seed & _SEED_MASK))
    return samplers
