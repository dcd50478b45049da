"""The configurations that headers are checked under: seeded, every architecture, every knob."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from loadmaster.engine.types import VirtualDevice
from loadmaster.machine.types import SizingRules
from loadmaster.model.types import LayerKind, ModelSpec
from loadmaster.plan.types import CPU, EngineSettings, Override
from loadmaster.units import GIB, Bytes

CUDA = SizingRules(alignment_bytes=128, row_padding=512, offload_min_batch=32, pinned_host=True)
PLAIN = SizingRules(alignment_bytes=64, row_padding=0, offload_min_batch=0, pinned_host=False)

QUANTS = ("q4_K_M", "q8_0", "f16", "q6_K", "q5_K_M", "q4_0", "iq4_xs", "q3_K")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSet:
    """The virtual devices of one sizing child."""

    name: str
    devices: tuple[VirtualDevice, ...]

    @property
    def rules(self) -> Mapping[str, SizingRules]:
        return {device.id: device.rules for device in self.devices}


def _devices(*rules: SizingRules) -> tuple[VirtualDevice, ...]:
    return tuple(
        VirtualDevice(id=f"gpu:{i}", total_bytes=Bytes(2048 * GIB), rules=rule)
        for i, rule in enumerate(rules)
    )


DEVICE_SETS = (
    DeviceSet(name="cpu", devices=()),
    DeviceSet(name="one", devices=_devices(CUDA)),
    DeviceSet(name="one plain", devices=_devices(PLAIN)),
    DeviceSet(name="two", devices=_devices(CUDA, CUDA)),
    DeviceSet(name="three", devices=_devices(CUDA, PLAIN, CUDA)),
)

BASE = EngineSettings(
    n_gpu_layers=0, layers_per_device=(), overrides=(), n_ctx=4096, n_seq_max=1, n_batch=2048,
    n_ubatch=512, n_outputs_max=2048, type_k="f16", type_v="f16", flash_attn=True, offload_kqv=True,
    op_offload=True, op_offload_min_batch=32, swa_full=False, kv_unified=True, load_mode="none",
    use_extra_bufts=True, n_threads=2, n_threads_batch=2,
)  # fmt: skip

_N_CTX = (512, 2048, 4096, 8192, 16384, 32768, 131072)
_KV_TYPES = ("f16", "q8_0", "q4_0", "f32", "bf16", "q5_1", "iq4_nl")


def cases(
    model: ModelSpec, devices: DeviceSet, count: int, dice: random.Random
) -> Iterator[EngineSettings]:
    """`count` settings for one model on one set of devices; the corners come first."""
    n = len(devices.devices)
    for number in range(count):
        corner = {0: 0, 1: model.n_layer + 1}.get(number)
        layers = dice.randint(0, model.n_layer + 1) if corner is None else corner
        layers = layers if n else 0
        knobs = BASE if number < 2 else _random_knobs(model, dice)
        yield replace(
            knobs,
            n_gpu_layers=layers,
            layers_per_device=_split(layers, n, dice),
            overrides=() if number < 2 else _overrides(model, n, dice),
        )


def _split(layers: int, n_devices: int, dice: random.Random) -> tuple[int, ...]:
    if not n_devices:
        return ()
    cuts = sorted(dice.randint(0, layers) for _ in range(n_devices - 1))
    return tuple(b - a for a, b in zip([0, *cuts], [*cuts, layers], strict=True))


def _random_knobs(model: ModelSpec, dice: random.Random) -> EngineSettings:
    # A dry run really allocates recurrent state, and the sizing child has a limit for it.
    n_seq_max = dice.choice((1, 1, 1, 2, 4, 4 if model.is_recurrent else 16))
    flash_attn = dice.random() < 0.75
    type_v = dice.choice(_KV_TYPES) if flash_attn else dice.choice(("f16", "f32", "bf16"))
    fits = [kv for kv in _KV_TYPES if _divides(model, kv)]
    type_k = dice.choice(fits)
    if any(layer.kind is LayerKind.MLA for layer in model.layers):
        type_k = type_v if type_v in fits else "f16"  # the engine wants one type there
    return replace(
        BASE,
        n_ctx=dice.choice(_N_CTX) * (n_seq_max if n_seq_max <= 2 else 1),
        n_seq_max=n_seq_max,
        n_ubatch=dice.choice((16, 128, 512, 512, 1024, 2048)),
        n_outputs_max=dice.choice((2048, n_seq_max, max(32, n_seq_max))),
        type_k=type_k,
        type_v=type_v if type_v in fits else "f16",
        flash_attn=flash_attn,
        offload_kqv=dice.random() < 0.8,
        op_offload=dice.random() < 0.7,
        swa_full=dice.random() < 0.25,
        kv_unified=n_seq_max == 1 or dice.random() < 0.5,
        use_extra_bufts=dice.random() < 0.8,
    )


def _divides(model: ModelSpec, kv_type: str) -> bool:
    """A quantized cache needs heads of whole blocks."""
    if kv_type in ("f16", "f32", "bf16"):
        return True
    heads = [layer.k_width // layer.n_head_kv for layer in model.layers if layer.n_head_kv]
    return all(head % 32 == 0 for head in heads)


def _overrides(model: ModelSpec, n_devices: int, dice: random.Random) -> tuple[Override, ...]:
    """None; feed-forwards or experts of some layers on the CPU; parts of layers anywhere."""
    kind = dice.choice(("none", "none", "ffn", "experts", "parts")) if n_devices else "none"
    layers = sorted(dice.sample(range(model.n_layer), dice.randint(1, model.n_layer)))
    if kind == "ffn":
        return _each(layers, r"ffn_(up|gate|down)\.weight$", CPU)
    if kind == "experts":
        return (Override(pattern=r"\.ffn_(up|down|gate)_exps\.", device=CPU),)
    if kind == "parts":
        part = dice.choice((r"ffn_down", r"attn_(q|k|v)\.", r"ffn_(gate|up)(_exps)?\.weight$"))
        device = dice.choice([CPU, *(f"gpu:{i}" for i in range(n_devices))])
        return _each(layers, part, device) + _each(layers, "ffn", CPU)[:1]
    return ()


def _each(layers: Sequence[int], part: str, device: str) -> tuple[Override, ...]:
    return tuple(Override(pattern=rf"^blk\.{il}\.{part}", device=device) for il in layers)
