"""The next token from a row of logits, in llama.cpp's order: see `SamplingParams`."""

from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import torch

from loadmaster.engine.types import SamplingParams

_SEED_MASK = 0xFFFF_FFFF


class Sampler:
    """Draws the tokens of one sequence; the same seed and logits give the same tokens."""

    def __init__(self, sampling: SamplingParams, recent: Sequence[int], n_ctx: int) -> None:
        self._sampling = sampling
        self.is_plain_greedy = (
            sampling.temperature <= 0 and not sampling.logit_bias and not sampling.penalized
        )
        window = n_ctx if sampling.repeat_last_n < 0 else sampling.repeat_last_n
        self._recent = deque(recent if sampling.penalized else (), maxlen=window)
        self._random = torch.Generator().manual_seed(sampling.seed & _SEED_MASK)

    def sample(self, logits: Any) -> int:
        """`logits`: a row of floats on the CPU, which may be overwritten."""
        sampling = self._sampling
        for token, bias in sampling.logit_bias:
            logits[token] += bias
        if sampling.penalized:
            self._penalize(logits)
        token = int(logits.argmax()) if sampling.temperature <= 0 else self._draw(logits)
        if sampling.penalized:
            self._recent.append(token)
        return token

    def _penalize(self, logits: Any) -> None:
        counts = Counter(self._recent)
        if not counts:
            return
        sampling = self._sampling
        tokens = torch.tensor(list(counts))
        times = torch.tensor(list(counts.values()), dtype=logits.dtype)
        values = logits[tokens]
        repeat = sampling.repeat_penalty
        values = torch.where(values <= 0, values * repeat, values / repeat)
        values -= times * sampling.frequency_penalty + sampling.presence_penalty
        logits[tokens] = values

    def _draw(self, logits: Any) -> int:
        values, tokens = self._candidates(logits)
        shares = torch.softmax(values / self._sampling.temperature, dim=-1)
        return int(tokens[torch.multinomial(shares, 1, generator=self._random)])

    def _candidates(self, logits: Any) -> tuple[Any, Any]:
        """The logits that may be drawn, and their tokens."""
        sampling = self._sampling
        n = logits.numel()
        if 0 < sampling.top_k < n:
            values, tokens = torch.topk(logits, sampling.top_k)
        else:
            values, tokens = torch.sort(logits, descending=True)
        possible = values > float("-inf")  # the rest is what a schema forbids
        values, tokens = values[possible], tokens[possible]
        if sampling.typical_p < 1:
            values, tokens = _typical(values, tokens, sampling.typical_p)
        if sampling.top_p < 1:
            sums = torch.softmax(values, dim=-1).cumsum(0)
            kept = int((sums < sampling.top_p).sum()) + 1
            values, tokens = values[:kept], tokens[:kept]
        if sampling.min_p > 0:
            likely = values >= values[0] + torch.log(torch.tensor(sampling.min_p))
            likely[0] = True
            values, tokens = values[likely], tokens[likely]
        return values, tokens


def _typical(values: Any, tokens: Any, share: float) -> tuple[Any, Any]:
    """The tokens whose surprise is nearest the mean surprise, up to a share of probability."""
    logs = torch.log_softmax(values, dim=-1)
    shares = logs.exp()
    entropy = -(shares * logs).nan_to_num().sum()
    order = torch.argsort((-logs - entropy).abs())
    kept = int((shares[order].cumsum(0) <= share).sum()) + 1
    chosen = torch.sort(order[:kept]).values  # the likeliest first, as they were
    return values[chosen], tokens[chosen]
