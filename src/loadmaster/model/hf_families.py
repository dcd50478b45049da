"""Which model families of transformers are planned, and in what each differs from Llama.

Read off `modeling_*.py` and `configuration_*.py` of transformers 5.23.0, and checked against loaded
random models (`benchmarks/hf_accuracy.py`). A family that is not here is refused: a matrix that the
engine keeps unquantized, or a layer with another cache, would make every figure wrong.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

# Where a layer's sliding window comes from when the config has no `layer_types`.
Windows = Literal["none", "all", "from-layer", "every-second", "pattern"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The defaults of a family's config class, and the names of what is no `nn.Linear`."""

    tied: bool = False
    n_head_kv: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: width / heads
    n_ctx: int = 2048
    windows: Windows = "none"
    window: int | None = None  # where the config names none
    pattern: int = 0  # of `pattern`: every so manieth layer sees all cells
    routers: tuple[str, ...] = ()  # endings of modules that keep a plain parameter
    n_expert: int = 0
    n_expert_used: int = 0
    n_rope: int = 1  # sets of rotary tables
    rope_factor: float = 1.0
    embed_scale: bool = False
    softcap: bool = False


_QWEN_MOE = Family(
    n_head_kv=16, n_ctx=32768, windows="from-layer", window=4096, routers=("mlp.gate",),
    n_expert=60, n_expert_used=4,
)  # fmt: skip
_GEMMA = Family(tied=True, n_head_kv=16, head_dim=256, n_ctx=8192, embed_scale=True)

FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family(n_head_kv=8, n_ctx=131072, windows="all", window=4096),
    "qwen2": Family(n_head_kv=32, n_ctx=32768, windows="from-layer", window=4096),
    "qwen3": Family(
        n_head_kv=32, head_dim=128, n_ctx=32768, windows="from-layer", window=4096
    ),
    "gemma": _GEMMA,
    "gemma2": Family(
        tied=True, n_head_kv=4, head_dim=256, n_ctx=8192, windows="every-second", window=4096,
        embed_scale=True, softcap=True,
    ),
    "gemma3_text": Family(
        tied=True, n_head_kv=4, head_dim=256, n_ctx=131072, windows="pattern", window=4096,
        pattern=6, n_rope=2, embed_scale=True,
    ),
    "phi": Family(rope_factor=0.5),
    "phi3": Family(n_ctx=4096, windows="all"),
    "olmo2": Family(),
    "granite": Family(),
    "smollm3": Family(tied=True, n_head_kv=4, n_ctx=32768),
    "starcoder2": Family(tied=True, n_head_kv=2, n_ctx=4096, windows="all"),
    "cohere2": Family(
        tied=True, n_ctx=8192, windows="pattern", window=4096, pattern=4
    ),
    "mixtral": Family(
        n_head_kv=8, n_ctx=131072, windows="all", routers=("block_sparse_moe.gate",),
        n_expert=8, n_expert_used=2,
    ),
    "qwen2_moe": _QWEN_MOE,
    "qwen3_moe": Family(
        n_head_kv=4, n_ctx=32768, windows="from-layer", window=4096, routers=("mlp.gate",),
        n_expert=128, n_expert_used=8,
    ),
}  # fmt: skip
