"""config.json of a checkpoint: what planning needs of it, checked; code it wants is refused."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loadmaster.errors import DamagedFileError
from loadmaster.model.checkpoint import Stored
from loadmaster.model.damage import damaged, quoted, refused
from loadmaster.model.hf_families import FAMILIES, Family
from loadmaster.model.hf_stored import stored_of
from loadmaster.model.types import LayerKind, LayerSpec
from loadmaster.units import MIB

CONFIG = "config.json"
MAX_CONFIG_BYTES = 1 * MIB
# Keys by which a config makes transformers import or download code.
CODE_KEYS = ("auto_map", "custom_pipelines", "_attn_implementation_internal")
_MAX_LAYERS = 4096
_MAX_NUMBER = 1 << 31
_WINDOW = "sliding_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimensions:
    """The numbers of a config, with the family's defaults where it names none."""

    architecture: str
    family: Family
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_ff_expert: int
    n_vocab: int
    n_ctx_train: int
    n_expert: int
    n_expert_used: int
    window: int
    slides: tuple[bool, ...]  # of each layer
    tied: bool
    rope_width: int
    softcap: bool
    stored: Stored | None
    dtype: str | None  # as the config names it: `bfloat16`

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """What each layer remembers."""
        width = self.n_head_kv * self.head_dim
        return tuple(
            LayerSpec(
                index=index,
                kind=LayerKind.SWA if slides else LayerKind.FULL,
                n_head=self.n_head,
                n_head_kv=self.n_head_kv,
                k_width=width,
                v_width=width,
            )
            for index, slides in enumerate(self.slides)
        )


def parse_config(raw: bytes, label: str) -> Dimensions:
    """Read a config.

    Raises:
        DamagedFileError: it is no config, wants code to run, or is of a model that is not planned.
    """
    config = _object(raw, label)
    _check_code(config, label)
    _check_kind(config, label)
    architecture = str(config.get("model_type"))
    family = FAMILIES.get(architecture)
    if family is None:
        raise _unknown_family(architecture, label)
    numbers = _Numbers(config, label)
    n_layer = numbers.count("num_hidden_layers", most=_MAX_LAYERS)
    n_embd, n_head = numbers.count("hidden_size"), numbers.count("num_attention_heads")
    head_dim = numbers.optional("head_dim") or family.head_dim or n_embd // n_head
    window = _window(config, numbers, family)
    n_ff = numbers.count("intermediate_size")
    experts = numbers.first("num_local_experts", "num_experts", default=family.n_expert)
    return Dimensions(
        architecture=architecture,
        family=family,
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=numbers.optional("num_key_value_heads") or family.n_head_kv or n_head,
        head_dim=head_dim,
        n_ff=n_ff,
        n_ff_expert=numbers.optional("moe_intermediate_size") or n_ff,
        n_vocab=numbers.count("vocab_size"),
        n_ctx_train=numbers.optional("max_position_embeddings") or family.n_ctx,
        n_expert=experts,
        n_expert_used=numbers.first("num_experts_per_tok", default=family.n_expert_used),
        window=window,
        slides=_slides(config, family, n_layer, window, label),
        tied=_flag(config, "tie_word_embeddings", family.tied, label),
        rope_width=int(head_dim * _rope_factor(config, family)) // 2,
        softcap=bool(config.get("attn_logit_softcapping", family.softcap)),
        stored=stored_of(config, label),
        dtype=_text(config, "dtype") or _text(config, "torch_dtype"),
    )


def _object(raw: bytes, label: str) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        raise damaged("bad_config", label, "the file", "no JSON", "one object") from None
    if not isinstance(value, dict):
        raise damaged("bad_config", label, "the file", "no object", "one object")
    return value


def _check_code(config: Mapping[str, Any], label: str) -> None:
    for key in CODE_KEYS:
        if config.get(key):
            raise refused(
                "remote_code",
                f"`{key}` in {label} names code to run: loadmaster runs none of a model's",
                hint="take a checkpoint of a family that transformers has itself, or a GGUF of it",
            )


def _check_kind(config: Mapping[str, Any], label: str) -> None:
    """Checkpoints of other engines, and models that are not only text."""
    if "quantization" in config and "quantization_config" not in config:
        raise refused(
            "mlx_checkpoint",
            f"{label} is of an MLX checkpoint, which only mlx-lm on a Mac runs",
            hint="take the repository it was made from, or a GGUF of it",
        )
    if "vision_config" in config or "audio_config" in config or "text_config" in config:
        raise refused(
            "not_text",
            f"{label} is of a model with images or sound: what they take is not planned yet",
            hint="take a text-only checkpoint of it, or a GGUF: without its projector it is text",
        )
    if "block_configs" in config or config.get("pruned_heads") or _differ(config):
        raise refused(
            "pruned",
            f"{label} is of a pruned checkpoint, whose layers differ from one another",
            hint="take the model it was pruned from, quantized: `--quantize nf4`",
        )


def _differ(config: Mapping[str, Any]) -> bool:
    """Whether a width is given for each layer."""
    widths = ("intermediate_size", "num_attention_heads", "num_key_value_heads")
    return any(isinstance(config.get(width), list) for width in widths)


def _unknown_family(architecture: str, label: str) -> DamagedFileError:
    known = ", ".join(FAMILIES)
    return refused(
        "unknown_architecture",
        f"`model_type` {quoted(architecture)} in {label} is not planned: its matrices and caches "
        "would be guesses",
        hint=f"a GGUF of it may run: `loadmaster plan hf:…-GGUF`; planned are {known}",
    )


class _Numbers:
    """Whole numbers of a config, by name."""

    def __init__(self, config: Mapping[str, Any], label: str) -> None:
        self._config = config
        self._label = label

    def optional(self, key: str, *, least: int = 0) -> int | None:
        value = self._config.get(key)
        if value is None:
            return None
        if type(value) is not int or not least <= value < _MAX_NUMBER:
            raise damaged(
                "bad_config", self._label, key, quoted(str(value)), f"a whole number from {least}"
            )
        return value

    def count(self, key: str, *, most: int = _MAX_NUMBER) -> int:
        value = self.optional(key, least=1)
        if value is None:
            raise damaged("bad_config", self._label, key, "missing", "a whole number from 1")
        if value > most:
            raise damaged("bad_config", self._label, key, value, f"up to {most}")
        return value

    def first(self, *keys: str, default: int) -> int:
        """The first of these that is there."""
        for key in keys:
            value = self.optional(key)
            if value is not None:
                return value
        return default


def _text(config: Mapping[str, Any], key: str) -> str | None:
    value = config.get(key)
    return value if isinstance(value, str) else None


def _flag(config: Mapping[str, Any], key: str, default: bool, label: str) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise damaged("bad_config", label, key, quoted(str(value)), "true or false")
    return value


def _rope_factor(config: Mapping[str, Any], family: Family) -> float:
    """The part of a head that positions turn."""
    places = (config.get("rope_parameters"), config.get("rope_scaling"), config)
    for place in places:
        value = place.get("partial_rotary_factor") if isinstance(place, dict) else None
        if isinstance(value, int | float) and 0 < value <= 1:
            return float(value)
    return family.rope_factor


def _window(config: Mapping[str, Any], numbers: _Numbers, family: Family) -> int:
    """Tokens of the sliding window; 0 for none."""
    asked = "use_sliding_window" in config or family.windows == "from-layer"
    if asked and config.get("use_sliding_window") is not True:
        return 0
    if "sliding_window" in config:
        return numbers.optional("sliding_window") or 0
    return family.window or 0


def _slides(
    config: Mapping[str, Any], family: Family, n_layer: int, window: int, label: str
) -> tuple[bool, ...]:
    """Which layers see a window only."""
    if not window:
        return (False,) * n_layer
    types = config.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != n_layer:
            raise damaged("bad_config", label, "layer_types", "a list", f"{n_layer} entries")
        return tuple(one == _WINDOW for one in types)
    match family.windows:
        case "all":
            return (True,) * n_layer
        case "every-second":
            return tuple(index % 2 == 0 for index in range(n_layer))
        case "pattern":
            every = config.get("sliding_window_pattern")
            every = every if isinstance(every, int) and every > 0 else family.pattern
            return tuple((index + 1) % every != 0 for index in range(n_layer))
        case "from-layer":
            first = config.get("max_window_layers")
            first = first if isinstance(first, int) else 28
            return tuple(index >= first for index in range(n_layer))
    return (False,) * n_layer
