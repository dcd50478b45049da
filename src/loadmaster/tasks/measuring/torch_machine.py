"""`doctor --measure` for safetensors: kernels of torch and bitsandbytes on this machine, and what
Python takes to launch a layer.

As for llama.cpp, products go over weights that overflow the caches, and the second shortest of a
few runs counts.
"""

import datetime
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from loadmaster.engine import probe_checkpoint
from loadmaster.engine.process import Engine
from loadmaster.engine.python_build import TRANSFORMERS
from loadmaster.engine.timing import TimeAttention, TimeProducts, TimeSmall, TimeSteps
from loadmaster.engine.types import EngineBuild, LoadRequest
from loadmaster.machine.measurements import (
    AttentionTime,
    DeviceTimes,
    LayerTime,
    Measurements,
    ProductTime,
)
from loadmaster.machine.types import Machine
from loadmaster.plan.hf_weights import COMPUTE_BYTES, four_bit_allocations, int8_allocations
from loadmaster.plan.types import CPU, Quantize, TransformersSettings
from loadmaster.tasks.measuring.asking import RUNS, Ask, Asker, best, undisturbed
from loadmaster.tasks.measuring.disk import disk_read_bytes_s
from loadmaster.tasks.measuring.operations import link_bytes_s, small_s
from loadmaster.tasks.measuring.scale import CARD_SCALE, Scale, cpu_scale

TIME_LIMIT_S = 60.0
# Products by what the weights are: as computed with and as bitsandbytes keeps them.
_KINDS = ("bf16", "nf4-double", "nf4", "int8", "f32")
_TOKENS = (512, 128, 32, 16, 8, 4, 2, 1)
# What bitsandbytes keeps is unpacked for every product: fewer weights overflow the caches as well.
_FEWER = 4
_ATTENTION = (  # head size, KV heads, query heads for each, tokens, cells
    (64, 8, 4, 1, 256), (64, 8, 4, 1, 2048), (64, 8, 4, 256, 512), (64, 8, 4, 256, 2048),
)  # fmt: skip
_CACHE_BYTES = 64 << 20
_LAYERS = (4, 12)  # a step of the one less that of the other is layers alone
_STEPS = 48
_PARTS = 8
_SAMPLED = 32_000
_PROBED: tuple[tuple[str, Quantize, bool], ...] = (
    ("none", "none", False), ("nf4", "nf4", False), ("nf4-double", "nf4", True),
    ("int8", "int8", False),
)  # fmt: skip


def measure_torch(
    build: EngineBuild,
    machine: Machine,
    folder: Path,
    *,
    report: Callable[[str], None] = lambda _: None,
) -> Measurements:
    """Time everything, in a worker of its own; `folder` is where models are kept.

    Raises:
        EngineError: the worker died.
    """
    threads = machine.cpu.physical_cores or machine.cpu.logical_cores
    start = time.monotonic()
    devices = [(gpu.id, gpu.name) for gpu in machine.gpus] or [(CPU, machine.cpu.name or "CPU")]
    rows = []
    steps_s: list[float] = []
    with Engine.start(build, backend=TRANSFORMERS) as engine:
        asker = Asker(engine.time, deadline=start + TIME_LIMIT_S)
        sample = _sample_s(asker, devices[0][0], threads)
        for index, (device, name) in enumerate(devices):
            report(f"torch on {device} {name}")
            asker.share(len(devices) - index)
            layers, step_s = _layer_times(engine, device, threads)
            steps_s.append(step_s)
            rows.append(_device(asker, device, name, threads, layers))
    return Measurements(
        taken=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - start, 1),
        disk_read_bytes_s=disk_read_bytes_s(folder),
        step_s=max(steps_s),
        sample_s=sample,
        spread=asker.spread,
        engine="transformers",
        devices=tuple(rows),
    )


def _device(
    ask: Asker, device: str, name: str, threads: int, layers: tuple[LayerTime, ...]
) -> DeviceTimes:
    scale = cpu_scale(threads) if device == CPU else CARD_SCALE
    norm, gate, rope = (small_s(ask, device, kind, scale) for kind in ("norm", "gate", "rope"))
    links = [link_bytes_s(ask, device, pinned=p) if device != CPU else None for p in (True, False)]
    attention = tuple(_attention(ask, device, scale))
    products = [row for kind in _KINDS for row in _products(ask, device, kind, scale)]
    timed = {row.type for row in products}
    return DeviceTimes(
        id=device,
        name=name,
        n_threads=threads if device == CPU else 0,
        products=tuple(products),
        attention=attention,
        norm_s=norm,
        gate_s=gate,
        rope_s=rope,
        pinned_bytes_s=links[0],
        pageable_bytes_s=links[1],
        layers=layers,
        not_measured=tuple(kind for kind in _KINDS if kind not in timed),
    )


def _products(ask: Ask, device: str, kind: str, scale: Scale) -> list[ProductTime]:
    size = _size_bytes(kind, scale.n_out, scale.n_in)
    weight_bytes = scale.weight_bytes // (_FEWER if kind not in COMPUTE_BYTES else 1)
    n_matrices = max(1, weight_bytes // size)
    flops = 2.0 * scale.n_in * scale.n_out
    points = tuple(
        (count, max(1, min(n_matrices, int(scale.flops / (flops * count))))) for count in _TOKENS
    )
    seconds = ask(
        TimeProducts(
            device=device, n_threads=scale.n_threads, type=kind, repacked=False, n_in=scale.n_in,
            n_out=scale.n_out, n_matrices=n_matrices, points=points, runs=RUNS,
        )
    )  # fmt: skip
    if seconds is None:
        return []
    return [
        ProductTime(
            type=kind,
            layout="plain",
            gathered=False,
            tokens=count,
            s_per_byte=undisturbed(seconds[i * RUNS : (i + 1) * RUNS]) / (size * used),
        )
        for i, (count, used) in enumerate(points)
    ]


def _size_bytes(kind: str, rows: int, columns: int) -> int:
    """What a matrix takes once it is loaded, scales included."""
    if kind == "int8":
        return sum(int8_allocations(rows, columns))
    if kind in ("nf4", "nf4-double"):
        return sum(four_bit_allocations(rows * columns, kind == "nf4-double"))
    return rows * columns * COMPUTE_BYTES[kind]


def _attention(ask: Ask, device: str, scale: Scale) -> Iterator[AttentionTime]:
    for head_dim, n_kv, group, n_tokens, n_cells in _ATTENTION:
        layer_bytes = 2 * 2 * n_kv * head_dim * n_cells
        n_layers = max(1, _CACHE_BYTES // layer_bytes) if n_tokens == 1 else 1
        seconds = best(
            ask(
                TimeAttention(
                    device=device, n_threads=scale.n_threads, type="bf16", head_dim=head_dim,
                    n_head=n_kv * group, n_head_kv=n_kv, n_cells=n_cells, n_tokens=n_tokens,
                    n_visible=n_cells, n_layers=n_layers, runs=RUNS,
                )
            )
        )  # fmt: skip
        if seconds is not None:
            elements = n_kv * group * head_dim * n_tokens * n_cells * n_layers
            yield AttentionTime(
                type="bf16", head_dim=head_dim, n_head_kv=n_kv, heads_per_kv=group,
                tokens=n_tokens, cells=n_cells, s_per_element=seconds / elements,
            )  # fmt: skip


def _sample_s(ask: Ask, device: str, threads: int) -> float | None:
    """Seconds of one token's sampling, by entries of the vocabulary."""
    question = TimeSmall(
        device=device, n_threads=threads, operation="sample", width=_SAMPLED, n_tokens=8, n_ops=1,
        runs=RUNS,
    )  # fmt: skip
    seconds = best(ask(question))
    return None if seconds is None else seconds / (question.width * question.n_tokens)


# ---- layers of a model with next to no weights


def _layer_times(engine: Engine, device: str, threads: int) -> tuple[tuple[LayerTime, ...], float]:
    """A layer of each kind, and a step without its layers."""
    few, many = _LAYERS
    short, _ = _probe(engine, device, threads, few, "none", double=False)
    found: list[LayerTime] = []
    step_s = 0.0
    for kind, quantize, double in _PROBED:
        whole, parts = _probe(engine, device, threads, many, quantize, double=double)
        if kind == "none":
            layer_s = max(0.0, whole - short) / (many - few)
            step_s = max(0.0, short - few * layer_s)
            part_s = max(0.0, parts[1] - parts[0]) / (_PARTS - 1) / many
            found.append(LayerTime(kind="part", seconds=part_s))
        found.append(LayerTime(kind=kind, seconds=max(0.0, whole - step_s) / many))
    return tuple(found), step_s


def _probe(
    engine: Engine, device: str, threads: int, n_layer: int, quantize: Quantize, *, double: bool
) -> tuple[float, tuple[float, float]]:
    """A decode step of a tiny model, and a step with one prompt and with several."""
    with tempfile.TemporaryDirectory(prefix="loadmaster-") as name:
        folder = probe_checkpoint.write(Path(name), n_layer)
        settings = _settings(device, threads, quantize, double=double)
        engine.load(
            LoadRequest(model_path=folder, model_stamp="", settings=settings, ram_cap_bytes=None)
        )
        steps = engine.time(TimeSteps(depth=8, n_sequences=1, n_steps=_STEPS)) or ()
        parts = [
            best(
                engine.time(
                    TimeSmall(
                        device=device, n_threads=threads, operation="part", width=0, n_tokens=n,
                        n_ops=1, runs=5,
                    )
                )
            )
            for n in (1, _PARTS)
        ]  # fmt: skip
    decode = sorted(steps[1:])
    return decode[len(decode) // 4] if decode else 0.0, (parts[0] or 0.0, parts[1] or 0.0)


def _settings(
    device: str, threads: int, quantize: Quantize, *, double: bool
) -> TransformersSettings:
    return TransformersSettings(
        quantize=quantize,
        double_quant=double,
        compute_type="bf16",
        device_map=(("", device),),
        attention="sdpa",
        n_ctx=_PARTS * 128,
        n_seq_max=_PARTS,
        n_ubatch=64,
        type_k="bf16",
        type_v="bf16",
        n_threads=threads,
    )
