"""What a quantization costs in quality: published figures, each with its source. Pure.

KL divergence says how far a model's token probabilities are from those of its own unquantized
weights. It is measured on one model and tells nothing of another model's worth; MMLU does, and is
published for few.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

LLAMA_3_8B = "Llama 3 8B"
_PERPLEXITY = "llama.cpp tools/perplexity/README.md at 0c1e57098, LLaMA 3 8b scoreboard"
_KV_CACHE = "llama.cpp#7412, first results, Llama 3 8B"
_MMLU = "matt-c1/llama-3-quant-comparison at 0360e50, GGUF rows"
_MMLU_BITSANDBYTES = "matt-c1/llama-3-quant-comparison at 0360e50, transformers rows"
PUBLISHED = "the published weights themselves"

# Mean KL divergence of Llama 3 8B on Wikitext-2 from its FP16 logits; where a type has rows with
# and without an importance matrix, the best with one, as published files are made. The f16 row,
# 0.00055, is the rounding of the stored logits, so it counts as 0.
_WEIGHTS: Mapping[str, float] = {
    "F32": 0.0, "F16": 0.0, "Q8_0": 0.001355, "Q6_K": 0.005452, "Q5_K_M": 0.010762,
    "Q5_K_S": 0.016595, "Q5_1": 0.018045, "Q5_0": 0.022239, "Q4_K_M": 0.028152,
    "Q4_K_S": 0.031951, "IQ4_NL": 0.035742, "IQ4_XS": 0.036334, "Q4_1": 0.071683,
    "Q4_0": 0.071940, "Q3_K_L": 0.073077, "Q3_K_M": 0.084358, "IQ3_M": 0.102534,
    "IQ3_S": 0.111278, "IQ3_XS": 0.138693, "IQ3_XXS": 0.183625, "Q3_K_S": 0.199821,
    "IQ2_M": 0.325989, "Q2_K": 0.331393, "Q2_K_S": 0.403360, "IQ2_S": 0.439197,
    "IQ2_XS": 0.546290, "IQ2_XXS": 0.812022, "IQ1_M": 1.393084, "IQ1_S": 2.211278,
}  # fmt: skip
# BF16 weights are the published ones; as FP16 they differ by 0.000025 (same page).
_PUBLISHED_TYPES = frozenset({"BF16", "F32"})

# The same of the cache's types, K then V, with F16 weights. The f16 row, 0.000189, counts as 0.
_CACHE: Mapping[tuple[str, str], float] = {
    ("f32", "f32"): 0.0, ("f16", "f16"): 0.0, ("bf16", "bf16"): 0.0,
    ("f16", "q8_0"): 0.000743, ("q8_0", "f16"): 0.000944, ("q8_0", "q8_0"): 0.000980,
    ("f16", "q5_1"): 0.001759,
}  # fmt: skip

# MMLU in percent. The 8B's is the whole test, the 70B's 50 questions of each category.
_MMLU_BY_MODEL: Mapping[str, Mapping[str, float]] = {
    "llama-3-70b": {
        "Q5_K_M": 80.82, "IQ4_XS": 80.46, "IQ3_M": 80.06, "IQ3_XXS": 79.09, "IQ2_M": 77.01,
        "IQ2_S": 76.05, "IQ2_XS": 74.94, "IQ2_XXS": 72.31, "IQ1_M": 65.21, "IQ1_S": 61.18,
    },
    "llama-3-8b": {
        "F16": 65.20, "Q8_0": 65.23, "Q6_K": 65.06, "Q5_K_M": 64.90, "Q5_K_S": 64.88,
        "Q4_K_M": 64.64, "Q4_K_S": 64.63, "IQ4_NL": 64.33, "IQ4_XS": 64.39, "Q3_K_L": 62.85,
        "Q3_K_M": 62.89, "IQ3_M": 62.55, "IQ3_S": 62.13, "Q3_K_S": 59.14, "IQ3_XS": 61.19,
        "IQ3_XXS": 60.52, "Q2_K": 55.90, "IQ2_M": 57.56, "IQ2_S": 53.98, "IQ2_XS": 49.98,
        "IQ2_XXS": 43.50, "IQ1_M": 28.83, "IQ1_S": 26.47,
    },
}  # fmt: skip

# The same test through transformers, with bitsandbytes: no KL divergence from the same text is
# published of it, so it stays unknown.
_MMLU_BY_QUANTIZE: Mapping[str, Mapping[str, float]] = {
    "llama-3-8b": {"BF16": 65.21, "INT8": 64.53, "NF4": 63.42, "FP4": 61.75},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A published number: what it was measured on, and where it is written."""

    value: float
    measured_on: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What is known of a model in one quantization under one cache type; None: not published."""

    weights_kl: Figure | None
    cache_kl: Figure | None
    mmlu: Figure | None

    @property
    def kl(self) -> float | None:
        """Weights and cache together. Their errors are taken to add up: nobody measured both but
        for q8_0 over q8_0, where the sum, 0.0023, is above the measured 0.0016."""
        if self.weights_kl is None or self.cache_kl is None:
            return None
        return self.weights_kl.value + self.cache_kl.value


def quality_of(
    model_name: str, architecture: str, quantization: str, type_k: str, type_v: str
) -> Quality:
    """What is published of a model's quantization and of cache types."""
    label = quantization.upper().removeprefix("UD-")
    cache = _CACHE.get((type_k, type_v))
    return Quality(
        weights_kl=_weights(architecture, label),
        cache_kl=None
        if cache is None
        else Figure(value=cache, measured_on=LLAMA_3_8B, source=_KV_CACHE),
        mmlu=_mmlu(model_name, label),
    )


def _weights(architecture: str, label: str) -> Figure | None:
    native = architecture == "gpt-oss" and label.startswith("MXFP4")
    if label in _PUBLISHED_TYPES or native:
        return Figure(value=0.0, measured_on="every model", source=PUBLISHED)
    value = _WEIGHTS.get(label)
    if value is None:
        return None
    return Figure(value=value, measured_on=LLAMA_3_8B, source=_PERPLEXITY)


def _mmlu(model_name: str, label: str) -> Figure | None:
    key = family_key(model_name)
    tables = ((_MMLU_BY_MODEL, _MMLU), (_MMLU_BY_QUANTIZE, _MMLU_BITSANDBYTES))
    for table, source in tables:
        value = table.get(key, {}).get(label)
        if value is not None:
            return Figure(value=value, measured_on=key, source=source)
    return None


def family_key(model_name: str) -> str:
    """`Meta-Llama-3-8B-Instruct` and `llama-3-8b` are one model here."""
    text = re.sub(r"[^a-z0-9.]+", "-", model_name.lower()).strip("-")
    return text.removeprefix("meta-").removesuffix("-instruct")
