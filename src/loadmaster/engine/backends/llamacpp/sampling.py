"""Sampler chains of llama.cpp, in llama.cpp's own order."""

from collections.abc import Sequence
from typing import Any

from loadmaster.engine.types import SamplingParams

_KEEP_AT_LEAST = 1
_SEED_MASK = 0xFFFF_FFFF
_NOTHING = 1e-30  # of the likeliest token's probability


def make_chain(
    api: Any, n_vocab: int, n_ctx: int, sampling: SamplingParams, recent: Sequence[int] = ()
) -> Any:
    """A new `llama_sampler` chain; the caller frees it.

    Where nothing but the likeliest token is asked for, it is the greedy sampler alone: a chain
    keeps 12 bytes for each token of the vocabulary, 1.5 MiB for each sequence of a large one.
    """
    if sampling.temperature <= 0 and not sampling.logit_bias and not sampling.penalized:
        return api.llama_sampler_init_greedy()
    params = api.llama_sampler_chain_default_params()
    params.no_perf = True
    chain = api.llama_sampler_chain_init(params)
    for sampler in (
        *_biases(api, n_vocab, sampling),
        *_penalties(api, n_vocab, n_ctx, sampling),
        *_choice(api, sampling),
    ):
        api.llama_sampler_chain_add(chain, sampler)
    if sampling.penalized:
        for token in recent[-_window(n_ctx, sampling) :]:
            api.llama_sampler_accept(chain, token)
    return chain


def _window(n_ctx: int, sampling: SamplingParams) -> int:
    return n_ctx if sampling.repeat_last_n < 0 else sampling.repeat_last_n


def _biases(api: Any, n_vocab: int, sampling: SamplingParams) -> list[Any]:
    if not sampling.logit_bias:
        return []
    biases = (api.llama_logit_bias * len(sampling.logit_bias))(*sampling.logit_bias)
    return [api.llama_sampler_init_logit_bias(n_vocab, len(biases), biases)]


def _penalties(api: Any, n_vocab: int, n_ctx: int, sampling: SamplingParams) -> list[Any]:
    if not sampling.penalized:
        return []
    return [
        api.llama_sampler_init_penalties(
            n_vocab,
            _window(n_ctx, sampling),
            sampling.repeat_penalty,
            sampling.frequency_penalty,
            sampling.presence_penalty,
        )
    ]


def _choice(api: Any, sampling: SamplingParams) -> list[Any]:
    if sampling.temperature <= 0:
        return [api.llama_sampler_init_greedy()]
    samplers = []
    if sampling.top_k > 0:
        samplers.append(api.llama_sampler_init_top_k(sampling.top_k))
    if sampling.typical_p < 1.0:
        # Its entropy is NaN if a probability is 0, as of what a schema forbids.
        samplers.append(api.llama_sampler_init_min_p(_NOTHING, _KEEP_AT_LEAST))
        samplers.append(api.llama_sampler_init_typical(sampling.typical_p, _KEEP_AT_LEAST))
    if sampling.top_p < 1.0:
        samplers.append(api.llama_sampler_init_top_p(sampling.top_p, _KEEP_AT_LEAST))
    if sampling.min_p > 0.0:
        samplers.append(api.llama_sampler_init_min_p(sampling.min_p, _KEEP_AT_LEAST))
    samplers.append(api.llama_sampler_init_temp(sampling.temperature))
    samplers.append(api.llama_sampler_init_dist(sampling.seed & _SEED_MASK))
    return samplers
