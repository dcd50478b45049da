"""What each layer of a model remembers: kinds and cache widths, as llama.cpp derives them.

Sources, llama.cpp 0c1e57098: `llama_model_base::load_hparams` (llama-model.cpp), the per-layer
getters of llama-hparams.cpp, `load_arch_hparams` of models/*.cpp for the attention patterns and
`llama_model::create_memory` (llama-model.cpp) for which layers own which cache.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loadmaster.model.types import LayerKind, LayerSpec, MetadataValue, TensorSpec

# Architectures whose caches are the plain ones of create_memory's default branch, every layer
# owning K and V of head_count_kv heads (llama_kv_cache).
_PLAIN = frozenset((
    "llama", "deci", "falcon", "grok", "gpt2", "gptneox", "mpt", "baichuan", "starcoder",
    "refact", "bloom", "stablelm", "qwen", "qwen2", "qwen2moe", "qwen2vl", "qwen3", "qwen3moe",
    "qwen3vl", "qwen3vlmoe", "phi2", "phi3", "phimoe", "plamo", "codeshell", "orion", "internlm2",
    "minicpm", "minicpm3", "gemma", "starcoder2", "xverse", "command-r", "dbrx", "olmo", "olmoe",
    "openelm", "arctic", "deepseek", "deepseek2-ocr", "chatglm", "glm4", "glm4moe", "bitnet",
    "jais", "jais2", "nemotron", "exaone", "granite", "granitemoe", "chameleon", "plm",
    "bailingmoe", "bailingmoe2", "dots1", "arcee", "ernie4_5", "ernie4_5-moe", "hunyuan-moe",
    "hunyuan-dense", "hunyuan_vl", "hy_v3", "smollm3", "seed_oss", "grovemoe", "apertus",
    "minimax-m2", "cogvlm", "pangu-embedded", "mistral3", "paddleocr", "llama-embed", "maincoder",
))  # fmt: skip
_MLA = frozenset({"deepseek2", "mistral4"})  # K only, once the file has the `_mla` lengths
# Encoders and diffusion models: create_memory gives them none.
_CACHELESS = frozenset((
    "bert", "jina-bert-v2", "jina-bert-v3", "nomic-bert", "nomic-bert-moe", "neo-bert", "eurobert",
    "modern-bert", "gemma-embedding", "dream", "llada", "llada-moe", "rnd1",
))  # fmt: skip
_RECURRENT = frozenset({"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"})
# Hybrids: recurrent where head_count_kv is 0, where an interval says so, or in every layer.
_HYBRID_BY_KV = frozenset({"jamba", "plamo2", "granitehybrid", "lfm2", "lfm2moe"})
_HYBRID_KDA = frozenset({"kimi-linear"})
_HYBRID_BY_INTERVAL = frozenset({"qwen3next", "qwen35", "qwen35moe"})
_HYBRID_BY_FFN = frozenset({"nemotron_h", "nemotron_h_moe"})
_HYBRID_BOTH = frozenset({"falcon-h1"})
_HYBRID = _HYBRID_BY_KV | _HYBRID_KDA | _HYBRID_BY_INTERVAL | _HYBRID_BY_FFN | _HYBRID_BOTH

# The ssm_* keys that a recurrent architecture reads; one it does not read stays 0.
_GROUPLESS = frozenset({"mamba", "jamba", "kimi-linear"})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Window:
    """How an architecture lays out sliding-window layers (llama_hparams::set_swa_pattern)."""

    period: int | None  # None: the file must have the pattern as an array
    dense_first: bool = False
    default: int | None = None  # the window when the file has none
    fixed: int | None = None  # the window whatever the file says
    optional: bool = False  # a file without a positive window has no such layers


_WINDOWS: Mapping[str, _Window] = {
    "gemma2": _Window(period=2, default=4096),
    "gemma3": _Window(period=6, optional=True),
    "gemma3n": _Window(period=5),
    "gemma4": _Window(period=None),
    "gpt-oss": _Window(period=2),
    "cohere2": _Window(period=4),
    "cohere2moe": _Window(period=4, dense_first=True),
    "olmo2": _Window(period=4, optional=True),
    "smallthinker": _Window(period=4, dense_first=True, fixed=4096, optional=True),
    "exaone-moe": _Window(period=4, default=128),
    "muse-glimmer": _Window(period=4),
    "mellum": _Window(period=4, optional=True),
    "afmoe": _Window(period=4, optional=True),
    "laguna": _Window(period=4, dense_first=True, optional=True),
    "plamo3": _Window(period=8, optional=True),
    "step35": _Window(period=None),
    "mimo2": _Window(period=None),
    "granite_swa": _Window(period=None),
    "maple": _Window(period=None),
    "spark2_5": _Window(period=None),
    "llama4": _Window(period=4, fixed=8192),
    "exaone4": _Window(period=4, default=4096),
}

# Layers from here on reuse the cache of an earlier one (hparams.n_layer_kv_from_start).
_GEMMA3N_OWN_KV = 20


class _Header:
    """Metadata by the part of the key after `<architecture>.`."""

    def __init__(self, architecture: str, metadata: Mapping[str, MetadataValue]) -> None:
        self._prefix = architecture + "."
        self._metadata = metadata

    def value(self, key: str) -> MetadataValue | None:
        return self._metadata.get(self._prefix + key)

    def number(self, key: str, default: int = 0) -> int:
        value = self.value(key)
        return int(value) if isinstance(value, int | float) else default

    def per_layer(self, key: str, n_layer: int, default: Sequence[int]) -> list[int]:
        """A scalar stands for every layer; an array gives each its own (get_key_or_arr)."""
        value = self.value(key)
        if isinstance(value, tuple):
            given = [int(one) for one in value[:n_layer]]
            return given + [0] * (n_layer - len(given))
        return [int(value)] * n_layer if isinstance(value, int | float) else list(default)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """The numbers that load_hparams reads for every architecture."""

    architecture: str
    header: _Header
    n_layer_all: int
    n_layer: int  # without the MTP layers at the end (nextn_predict_layers)
    n_head: tuple[int, ...]
    n_head_kv: tuple[int, ...]
    head_k: int
    head_v: int
    head_k_swa: int
    head_v_swa: int


def layers_of(
    architecture: str, metadata: Mapping[str, MetadataValue], tensors: Sequence[TensorSpec]
) -> tuple[tuple[LayerSpec, ...], bool]:
    """The cache-relevant shape of every layer, MTP layers included.

    The flag is False when no formula is known for the architecture: then the layers are the plain
    reading of the header, and only the engine's own sizing says what the caches take.
    """
    shape = _read_shape(architecture, metadata, _count_layers(tensors))
    layers = tuple(_layer(shape, window, index) for index, window in enumerate(_windows(shape)))
    return layers, has_formula(architecture)


def has_formula(architecture: str) -> bool:
    """Whether the caches of this architecture are known to the byte from the header."""
    known = _PLAIN | _MLA | _RECURRENT | _HYBRID | _CACHELESS
    return architecture in known or architecture in _WINDOWS


def window_of(architecture: str, metadata: Mapping[str, MetadataValue]) -> int:
    """The sliding window in tokens that the engine will use; 0 when no layer has one."""
    shape = _read_shape(architecture, metadata, 0)
    if not any(_windows(shape)):
        return 0
    rule = _WINDOWS.get(architecture)
    if rule is not None and rule.fixed is not None:
        return rule.fixed
    default = rule.default if rule is not None and rule.default is not None else 0
    return shape.header.number("attention.sliding_window", default)


def _count_layers(tensors: Sequence[TensorSpec]) -> int:
    return max((1 + t.layer for t in tensors if t.layer is not None), default=0)


def _read_shape(architecture: str, metadata: Mapping[str, MetadataValue], n_blocks: int) -> _Shape:
    header = _Header(architecture, metadata)
    n_layer_all = header.number("block_count", n_blocks)
    n_head = header.per_layer("attention.head_count", n_layer_all, [0] * n_layer_all)
    n_head_kv = header.per_layer("attention.head_count_kv", n_layer_all, n_head)
    # The engine looks at the first layer alone here (hparams.n_head() is n_head(0)).
    head = header.number("embedding_length") // n_head[0] if n_head and n_head[0] else 0
    head_k = header.number("attention.key_length", head) if head else 0
    head_v = header.number("attention.value_length", head) if head else 0
    return _Shape(
        architecture=architecture,
        header=header,
        n_layer_all=n_layer_all,
        n_layer=max(0, n_layer_all - header.number("nextn_predict_layers")),
        n_head=tuple(n_head),
        n_head_kv=tuple(n_head_kv),
        head_k=head_k,
        head_v=head_v,
        head_k_swa=header.number("attention.key_length_swa", head_k),
        head_v_swa=header.number("attention.value_length_swa", head_v),
    )


def _windows(shape: _Shape) -> list[bool]:
    """For each layer: does it attend to a window only? (load_swa_pattern, set_swa_pattern)"""
    none = [False] * shape.n_layer_all
    window = shape.header.number("attention.sliding_window")
    if shape.architecture == "lfm2":
        attends = [heads > 0 for heads in shape.n_head_kv]
        return [a and i < shape.n_layer for i, a in enumerate(attends)] if window > 0 else none
    rule = _WINDOWS.get(shape.architecture)
    if rule is None or not _has_windows(shape, rule, window):
        return none
    pattern = shape.header.value("attention.sliding_window_pattern")
    if isinstance(pattern, tuple):
        given = [bool(one) for one in pattern[: shape.n_layer_all]]
        return given + [False] * (shape.n_layer_all - len(given))
    return _periodic(shape, rule, int(pattern) if isinstance(pattern, int) else rule.period)


def _has_windows(shape: _Shape, rule: _Window, window: int) -> bool:
    if rule.optional:
        return window > 0
    if shape.architecture == "exaone4":  # the 32B model alone has windows
        return shape.n_layer == 64
    if shape.architecture == "llama4":  # an explicit 0 turns them off
        return shape.header.value("attention.sliding_window") != 0
    return True


def _periodic(shape: _Shape, rule: _Window, period: int | None) -> list[bool]:
    if period is None:
        return [False] * shape.n_layer_all
    dense = 0 if rule.dense_first else period - 1
    return [
        il < shape.n_layer and (period == 0 or il % period != dense)
        for il in range(shape.n_layer_all)
    ]


def _layer(shape: _Shape, windowed: bool, il: int) -> LayerSpec:
    kind = _kind(shape, windowed, il)
    heads = shape.n_head_kv[il]
    k_width = heads * (shape.head_k_swa if windowed else shape.head_k)
    v_width = heads * (shape.head_v_swa if windowed else shape.head_v)
    recurrent = kind is LayerKind.RECURRENT
    # Only falcon-h1 has attention and a recurrent state in one layer.
    if recurrent and shape.architecture not in _HYBRID_BOTH:
        k_width = v_width = 0
    return LayerSpec(
        index=il,
        kind=kind,
        n_head=shape.n_head[il],
        n_head_kv=heads,
        k_width=k_width,
        v_width=0 if kind is LayerKind.MLA else v_width,
        recurrent_r_width=_r_width(shape) if recurrent else 0,
        recurrent_s_width=_s_width(shape) if recurrent else 0,
    )


def _kind(shape: _Shape, windowed: bool, il: int) -> LayerKind:
    """Which cache of create_memory owns the layer."""
    if il >= shape.n_layer or not _owns_kv(shape, il):
        return LayerKind.NONE
    if _is_recurrent(shape, il):
        return LayerKind.RECURRENT
    if shape.architecture in _HYBRID_BY_FFN and _n_ff(shape, il) > 0:
        return LayerKind.NONE
    if _is_mla(shape):
        return LayerKind.MLA
    return LayerKind.SWA if windowed else LayerKind.FULL


def _owns_kv(shape: _Shape, il: int) -> bool:
    """llama_hparams::has_kv: the last layers of Gemma 3n and 4 reuse earlier caches."""
    if shape.architecture in _CACHELESS:
        return False
    if shape.architecture == "gemma3n":
        return il < _GEMMA3N_OWN_KV
    if shape.architecture == "gemma4":
        return il < shape.n_layer_all - shape.header.number("attention.shared_kv_layers")
    return True


def _is_mla(shape: _Shape) -> bool:
    return shape.architecture in _MLA | _HYBRID_KDA and all(
        shape.header.number(f"attention.{part}_length_mla") for part in ("key", "value")
    )


def _n_ff(shape: _Shape, il: int) -> int:
    return shape.header.per_layer("feed_forward_length", shape.n_layer_all, [0] * (il + 1))[il]


def _is_recurrent(shape: _Shape, il: int) -> bool:
    architecture = shape.architecture
    if architecture in _RECURRENT | _HYBRID_BOTH:
        return True
    if architecture in _HYBRID_BY_KV | _HYBRID_KDA:
        return shape.n_head_kv[il] == 0
    if architecture in _HYBRID_BY_FFN:
        return shape.n_head_kv[il] == 0 and _n_ff(shape, il) == 0
    if architecture in _HYBRID_BY_INTERVAL:
        interval = shape.header.number("full_attention_interval", 4)
        by_rule = [int((i + 1) % interval != 0) for i in range(shape.n_layer_all)]
        return bool(
            shape.header.per_layer("attention.recurrent_layers", shape.n_layer_all, by_rule)[il]
        )
    return False


def _r_width(shape: _Shape) -> int:
    """llama_hparams::n_embd_r: the convolution or token-shift state of one sequence."""
    number = shape.header.number
    if number("wkv.head_size"):
        return number("token_shift_count", 2) * number("embedding_length")
    if number("shortconv.l_cache"):
        return number("embedding_length") * (number("shortconv.l_cache") - 1)
    conv = number("ssm.conv_kernel")
    if shape.architecture in _HYBRID_KDA:
        return 3 * (conv - 1 if conv else 3) * shape.n_head[0] * number("kda.head_dim")
    groups = 0 if shape.architecture in _GROUPLESS else number("ssm.group_count")
    return max(0, conv - 1) * (number("ssm.inner_size") + 2 * groups * number("ssm.state_size"))


def _s_width(shape: _Shape) -> int:
    """llama_hparams::n_embd_s: the recurrent state of one sequence."""
    number = shape.header.number
    if number("wkv.head_size"):
        return number("embedding_length") * number("wkv.head_size")
    if shape.architecture in _HYBRID_KDA:
        return number("kda.head_dim") ** 2 * shape.n_head[0]
    return number("ssm.state_size") * number("ssm.inner_size")
