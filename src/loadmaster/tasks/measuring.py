"""`doctor --measure`: what this machine's memory, link, disk and kernels really do.

Every figure is timed by a worker with the engine's own kernels, on weights that overflow the
caches. What disturbs a run only lengthens it, so of a few runs the second shortest counts; a
disturbed question is asked again. The order is by importance: what the time limit cuts off is the
rarer types of weights.
"""

import contextlib
import datetime
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loadmaster.engine import probe_model
from loadmaster.engine.process import Engine
from loadmaster.engine.timing import (
    Question,
    TimeAttention,
    TimeLink,
    TimeProducts,
    TimeRead,
    TimeSmall,
    TimeSteps,
)
from loadmaster.engine.types import EngineBuild, LoadRequest, VirtualDevice
from loadmaster.machine.measurements import (
    DISTURBED_SPREAD,
    AttentionTime,
    DeviceTimes,
    Layout,
    Measurements,
    ProductTime,
)
from loadmaster.machine.types import Machine
from loadmaster.model.quants import BY_NAME
from loadmaster.plan.types import CPU, EngineSettings
from loadmaster.units import GIB, MIB

Ask = Callable[[Question], tuple[float, ...] | None]
Clock = Callable[[], float]

# What is timed at every number of tokens, and what at a few; the time limit cuts the end.
COMMON_TYPES = ("q4_K", "q6_K", "q8_0", "f16")
OTHER_TYPES = (
    "q5_K", "q4_0", "iq4_xs", "q3_K", "mxfp4", "iq3_xxs", "q2_K", "bf16", "iq2_xs", "q5_0",
    "iq4_nl",
)  # fmt: skip
REPACKED_TYPES = frozenset({"q4_0", "q4_K", "q2_K", "q5_K", "q6_K", "q8_0", "iq4_nl", "mxfp4"})
# The fewest tokens last: fresh weights are still on their way from the caches to memory at first.
_ALL_POINTS = (512, 64, 16, 8, 4, 2, 1)
_FEW_POINTS = (512, 8, 1)
# Timed a second time at the end: a neighbour on the same memory stays for seconds.
_SECOND_POINTS = (16, 4, 1)
_SAME = 1.1
_EXPERT_POINTS = (64, 8, 1)
# Types that published files have their experts in.
_EXPERT_TYPES = frozenset({"q4_K", "q6_K", "q8_0"})
_N_EXPERT = 8
_RUNS = 3
TIME_LIMIT_S = 17.0
_READ_BYTES = 256 * MIB
_LINK_BYTES = 256 * MIB
_DISK_BYTES = 256 * MIB
_DISK_BLOCK_BYTES = 8 * MIB
# A card does a 4096 × 4096 product of 64 tokens faster than this; nothing else does.
_CARD_S = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much work fills a device for some tens of milliseconds."""

    n_in: int
    n_out: int
    weight_bytes: int  # more than the caches hold
    flops: float  # of one run at most
    n_threads: int


def cpu_scale(n_threads: int) -> Scale:
    """For processors: a run is about 50 ms on two cores, and shorter on more."""
    return Scale(n_in=2048, n_out=4096, weight_bytes=192 * MIB, flops=3e9, n_threads=n_threads)


CARD_SCALE = Scale(n_in=4096, n_out=8192, weight_bytes=GIB, flops=2e12, n_threads=0)


def measure_machine(
    build: EngineBuild,
    machine: Machine,
    folder: Path,
    *,
    n_threads: int | None = None,
    devices: Sequence[VirtualDevice] = (),
    backend: str = "llamacpp",
    report: Callable[[str], None] = lambda _: None,
) -> Measurements:
    """Time everything, in a worker of its own; `folder` is where models are kept.

    Raises:
        EngineError: the worker died.
    """
    threads = n_threads or machine.cpu.physical_cores or machine.cpu.logical_cores
    start = time.monotonic()
    report("disk")
    disk = disk_read_bytes_s(folder)
    report("a step")
    with Engine.start(build, backend=backend) as engine:
        steps = _probe_steps(engine, threads)
    with Engine.start(build, devices=devices, backend=backend) as engine:
        asker = Asker(engine.time, deadline=start + TIME_LIMIT_S)
        names = {facts.id: facts.description for facts in engine.devices()}
        names = {CPU: machine.cpu.name or "CPU", **names}
        report("RAM")
        ram = ram_read(asker, threads)
        measured = []
        for index, (device, name) in enumerate(names.items()):
            report(f"{device} {name}")
            asker.share(len(names) - index)
            measured.append(measure_device(asker, device, name, threads))
    return Measurements(
        taken=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - start, 1),
        ram_read_bytes_s=ram,
        disk_read_bytes_s=disk,
        step_s=_step_s(steps, measured[0].node_s),
        spread=asker.spread,
        devices=tuple(measured),
    )


class Asker:
    """Asks until the time is up, and watches how much the runs of one timing differ."""

    def __init__(self, ask: Ask, *, deadline: float, clock: Clock = time.monotonic) -> None:
        self._ask = ask
        self._clock = clock
        self._end = self._until = deadline
        self._spreads: list[float] = []

    def share(self, n_left: int) -> None:
        """Give the next device its part of what is left of the time."""
        now = self._clock()
        self._until = now + max(0.0, self._end - now) / n_left

    @property
    def late(self) -> bool:
        return self._clock() >= self._until

    def __call__(self, question: Question) -> tuple[float, ...] | None:
        """Seconds of every run; None when the device cannot, or the time is up."""
        if self.late:
            return None
        seconds = self._ask(question)
        if seconds is None:
            return None
        spread = _spread(seconds)
        if spread > DISTURBED_SPREAD and not self.late:
            again = self._ask(question) or seconds
            seconds = tuple(map(min, seconds, again))
            spread = min(spread, _spread(again))
        self._spreads.append(spread)
        return seconds

    @property
    def spread(self) -> float:
        return round(statistics.fmean(self._spreads), 3) if self._spreads else 1.0


def _spread(seconds: Sequence[float]) -> float:
    """The median of a question's first timing over its least."""
    first = seconds[:_RUNS]
    return statistics.median(first) / min(first) if min(first) > 0 else 1.0


def measure_device(ask: Asker, device: str, name: str, threads: int) -> DeviceTimes:
    """One device: what every model needs first, then common types of weights, then rarer ones."""
    card = device != CPU and _is_card(ask, device)
    scale = CARD_SCALE if card else cpu_scale(threads)
    norm, gate, rope = (_small(ask, device, kind, scale) for kind in ("norm", "gate", "rope"))
    node, hidden = _node_s(ask, device, scale), _hidden_cell_s(ask, device, scale)
    links = [_link(ask, device, pinned=p) if device != CPU else None for p in (True, False)]
    products: list[ProductTime] = []
    missing = [] if device == CPU or links[0] else ["link from page-locked memory"]
    attention: tuple[AttentionTime, ...] = ()
    for quant in (*COMMON_TYPES, *OTHER_TYPES):
        common = quant in COMMON_TYPES
        if not common and not attention:
            attention = tuple(_attention(ask, device, scale))
        found = _products(ask, device, quant, scale, _ALL_POINTS if common else _FEW_POINTS)
        found += _experts(ask, device, quant, scale) if quant in _EXPERT_TYPES else []
        products += found
        missing += [] if found else [f"{quant} (time limit)" if ask.late else quant]
    again = [
        row
        for quant in COMMON_TYPES
        for row in _products(ask, device, quant, scale, _SECOND_POINTS)
    ]
    return DeviceTimes(
        id=device,
        name=name,
        n_threads=threads if device == CPU else 0,
        products=tuple(_merged(products, again)),
        attention=attention,
        hidden_cell_s=hidden,
        node_s=node,
        norm_s=norm,
        gate_s=gate,
        rope_s=rope,
        memory_bytes_s=_copy(ask, device, scale) if device != CPU else None,
        pinned_bytes_s=links[0],
        pageable_bytes_s=links[1],
        not_measured=tuple(missing),
    )


def _merged(products: Sequence[ProductTime], again: Sequence[ProductTime]) -> Iterator[ProductTime]:
    """Each time with what a second look some seconds later gave: their mean; the shorter one where
    they differ, for then something ran beside the other."""
    second = {(it.type, it.layout, it.gathered, it.tokens): it.s_per_byte for it in again}
    for row in products:
        key = (row.type, row.layout, row.gathered, row.tokens)
        low, high = sorted((row.s_per_byte, second.get(key, row.s_per_byte)))
        yield replace(row, s_per_byte=low if high > low * _SAME else (low + high) / 2)


def _is_card(ask: Ask, device: str) -> bool:
    seconds = ask(
        TimeProducts(
            device=device, n_threads=0, type="f16", repacked=False, n_in=4096, n_out=4096,
            n_matrices=1, points=((64, 1),), runs=2,
        )
    )  # fmt: skip
    return bool(seconds) and min(seconds or (1.0,)) < _CARD_S


# ---- products


def _products(
    ask: Ask, device: str, quant: str, scale: Scale, tokens: Sequence[int]
) -> list[ProductTime]:
    """Times of one type; in the CPU's own layout too, where it has one. Of the rarer types that
    one alone: the engine takes it wherever no GPU wants page-locked weights."""
    repacked: list[ProductTime] = []
    if device == CPU and quant in REPACKED_TYPES:
        repacked = _rows(ask, device, quant, "repacked", scale, tokens)
    if repacked and quant in OTHER_TYPES:
        return repacked
    return _rows(ask, device, quant, "plain", scale, tokens) + repacked


def _experts(ask: Ask, device: str, quant: str, scale: Scale) -> list[ProductTime]:
    layout: Layout = "plain"
    rows = _rows(ask, device, quant, layout, scale, _EXPERT_POINTS, n_expert=_N_EXPERT)
    if device == CPU and quant in REPACKED_TYPES:
        rows += _rows(ask, device, quant, "repacked", scale, _EXPERT_POINTS, n_expert=_N_EXPERT)
    return rows


def _rows(
    ask: Ask,
    device: str,
    quant: str,
    layout: Layout,
    scale: Scale,
    tokens: Sequence[int],
    *,
    n_expert: int = 0,
) -> list[ProductTime]:
    """Every token takes every expert, so that each expert gets a column from each token."""
    n_out = scale.n_out // max(1, n_expert)
    size = BY_NAME[quant].row_bytes(scale.n_in) * n_out * max(1, n_expert)
    n_matrices = max(1, scale.weight_bytes // size)
    flops = 2.0 * scale.n_in * n_out * max(1, n_expert)
    points = tuple(
        (count, max(1, min(n_matrices, int(scale.flops / (flops * count))))) for count in tokens
    )
    seconds = ask(
        TimeProducts(
            device=device,
            n_threads=scale.n_threads,
            type=quant,
            repacked=layout == "repacked",
            n_in=scale.n_in,
            n_out=n_out,
            n_matrices=n_matrices,
            points=points,
            runs=_RUNS,
            n_expert=n_expert,
            n_used=n_expert,
        )
    )
    if seconds is None:
        return []
    return [
        ProductTime(
            type=quant,
            layout=layout,
            gathered=n_expert > 0,
            tokens=count,
            s_per_byte=_undisturbed(seconds[i * _RUNS : (i + 1) * _RUNS]) / (size * used),
        )
        for i, (count, used) in enumerate(points)
    ]


# ---- attention and the rest


def _attention(ask: Ask, device: str, scale: Scale) -> Iterator[AttentionTime]:
    for point in _ATTENTION_POINTS:
        question = _attend(device, point, scale)
        seconds = _best(ask(question))
        if seconds is not None:
            quant, head_dim, n_head_kv, heads_per_kv, n_tokens, n_cells = point
            per_layer = n_head_kv * heads_per_kv * head_dim * n_tokens * n_cells
            yield AttentionTime(
                type=quant,
                head_dim=head_dim,
                n_head_kv=n_head_kv,
                heads_per_kv=heads_per_kv,
                tokens=n_tokens,
                cells=n_cells,
                s_per_element=seconds / (per_layer * question.n_layers),
            )


# Type, head size, KV heads, query heads for each, tokens, cells.
_AttentionPoint = tuple[str, int, int, int, int, int]
_ATTENTION_POINTS: tuple[_AttentionPoint, ...] = (
    *(("f16", 128, 4, 4, 1, cells) for cells in (256, 1024, 4096)),
    # A wider cell: the rows of one head lie further apart.
    *(("f16", 128, 8, 4, 1, cells) for cells in (1024, 4096)),
    # A row for each head: the same arithmetic reads four times as much.
    *(("f16", 128, 8, 1, 1, cells) for cells in (1024, 4096)),
    *(("f16", 64, 8, 4, 1, cells) for cells in (256, 1024, 4096)),
    # A narrower cell.
    *(("f16", 64, 4, 4, 1, cells) for cells in (1024, 4096)),
    *(("f16", 128, 4, 4, 256, cells) for cells in (512, 4096)),
    ("f16", 64, 8, 4, 256, 512),
    *(("q8_0", 128, 4, 4, 1, cells) for cells in (256, 4096)),
    ("q8_0", 128, 4, 4, 256, 512),
)
_CACHE_BYTES = 128 * MIB  # all layers of a decode together
_HIDDEN_TOKENS = 8


def _attend(
    device: str, point: _AttentionPoint, scale: Scale, n_visible: int | None = None
) -> TimeAttention:
    """A decode goes over layers that overflow the caches; a prompt's arithmetic takes long enough
    in one."""
    quant, head_dim, n_head_kv, heads_per_kv, n_tokens, n_cells = point
    layer_bytes = 2 * BY_NAME[quant].row_bytes(head_dim) * n_head_kv * n_cells
    return TimeAttention(
        device=device,
        n_threads=scale.n_threads,
        type=quant,
        head_dim=head_dim,
        n_head=n_head_kv * heads_per_kv,
        n_head_kv=n_head_kv,
        n_cells=n_cells,
        n_tokens=n_tokens,
        n_visible=n_cells if n_visible is None else n_visible,
        n_layers=max(1, _CACHE_BYTES // layer_bytes) if n_tokens == 1 else 1,
        runs=_RUNS,
    )


def _hidden_cell_s(ask: Ask, device: str, scale: Scale) -> float | None:
    """What a cell of another sequence costs: attention that sees next to nothing."""
    point = ("f16", 128, 4, 4, _HIDDEN_TOKENS, 2048)
    question = _attend(device, point, scale, n_visible=1)
    seconds = _best(ask(question))
    if seconds is None:
        return None
    passes = question.n_head * question.n_tokens * question.n_layers
    return seconds / (passes * question.n_cells)


def _small(ask: Ask, device: str, operation: str, scale: Scale) -> float | None:
    """Seconds per element of an operation over a prompt's activations."""
    width, n_tokens, n_ops = 2048, 512, 4
    seconds = _best(
        ask(
            TimeSmall(
                device=device, n_threads=scale.n_threads, operation=operation, width=width,
                n_tokens=n_tokens, n_ops=n_ops, runs=_RUNS,
            )
        )
    )  # fmt: skip
    return None if seconds is None else seconds / (width * n_tokens * n_ops)


def _node_s(ask: Ask, device: str, scale: Scale) -> float | None:
    """Seconds for an operation on next to nothing: handing it out and waiting for all threads."""
    n_ops = 500
    seconds = _best(
        ask(
            TimeSmall(
                device=device, n_threads=scale.n_threads, operation="gate", width=64, n_tokens=1,
                n_ops=n_ops, runs=_RUNS,
            )
        )
    )  # fmt: skip
    return None if seconds is None else seconds / n_ops


def _copy(ask: Ask, device: str, scale: Scale) -> float | None:
    """Bytes read and written per second inside a device."""
    width, n_tokens = 1 << 20, 64 if scale is CARD_SCALE else 8
    seconds = _best(
        ask(
            TimeSmall(
                device=device, n_threads=scale.n_threads, operation="copy", width=width,
                n_tokens=n_tokens, n_ops=4, runs=_RUNS,
            )
        )
    )  # fmt: skip
    return None if not seconds else 4 * 2 * 4 * width * n_tokens / seconds


def _link(ask: Ask, device: str, *, pinned: bool) -> float | None:
    size = _LINK_BYTES
    seconds = _best(ask(TimeLink(device=device, size_bytes=size, pinned=pinned, runs=_RUNS)))
    return size / seconds if seconds else None


def ram_read(ask: Ask, n_threads: int) -> tuple[float, ...]:
    """Bytes per second that 1 … n threads read together; empty where it cannot be timed."""
    found = []
    for count in range(1, n_threads + 1):
        question = TimeRead(n_threads=count, size_bytes=_READ_BYTES, runs=_RUNS)
        seconds = _best(ask(question))
        if not seconds:
            return ()
        found.append(_READ_BYTES / seconds)
    return tuple(found)


def _best(seconds: tuple[float, ...] | None) -> float | None:
    return _undisturbed(seconds) if seconds else None


def _undisturbed(seconds: Sequence[float]) -> float:
    return sorted(seconds)[min(1, len(seconds) - 1)]


# ---- a step outside its graph


def _probe_steps(engine: Engine, threads: int) -> tuple[float, ...]:
    """Decode steps of a model with next to no weights."""
    with tempfile.TemporaryDirectory(prefix="loadmaster-") as folder:
        path = Path(folder) / "probe.gguf"
        probe_model.write(path)
        request = LoadRequest(
            model_path=path, model_stamp="", settings=_probe_settings(threads), ram_cap_bytes=None
        )
        engine.load(request)
        return engine.time(TimeSteps(depth=1, n_sequences=1, n_steps=64)) or ()


def _step_s(seconds: Sequence[float], node_s: float | None) -> float | None:
    """A step less the operations in it; the first of `seconds` is the prompt's."""
    if len(seconds) < 2 or node_s is None:
        return None
    nodes = probe_model.N_LAYER * _PROBE_NODES_PER_LAYER
    return max(0.0, statistics.median(seconds[1:]) - nodes * node_s)


_PROBE_NODES_PER_LAYER = 20  # all operations: its products are as small as the rest


def _probe_settings(threads: int) -> EngineSettings:
    return EngineSettings(
        n_gpu_layers=0,
        layers_per_device=(),
        overrides=(),
        n_ctx=probe_model.N_CTX,
        n_seq_max=1,
        n_batch=64,
        n_ubatch=64,
        n_outputs_max=1,
        type_k="f16",
        type_v="f16",
        flash_attn=True,
        offload_kqv=False,
        op_offload=False,
        op_offload_min_batch=32,
        swa_full=False,
        kv_unified=False,
        load_mode="none",
        use_extra_bufts=True,
        n_threads=threads,
        n_threads_batch=threads,
    )


# ---- the disk


def disk_read_bytes_s(folder: Path, size_bytes: int = _DISK_BYTES) -> float | None:
    """Sequential reads of a file that is not in the page cache; None where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".measure-") as file:
            block = os.urandom(_DISK_BLOCK_BYTES)
            for _ in range(max(1, size_bytes // _DISK_BLOCK_BYTES)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return _read_uncached(Path(file.name))
    except OSError:
        return None


def _read_uncached(path: Path) -> float:
    """Read with O_DIRECT; where the file system has none, with its pages dropped beforehand."""
    direct = getattr(os, "O_DIRECT", 0)
    try:
        descriptor = os.open(path, os.O_RDONLY | direct)
    except OSError:
        descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(AttributeError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(-1, _DISK_BLOCK_BYTES) as buffer:  # page-aligned, as O_DIRECT wants it
            total, start = 0, time.perf_counter()
            while count := os.readv(descriptor, [buffer]):
                total += count
            return total / (time.perf_counter() - start)
    finally:
        os.close(descriptor)
