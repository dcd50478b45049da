"""How fast this machine really is: what `doctor --measure` timed with each engine's own kernels.

Unknown is None or a missing row, never a guess. A row is kept with the conditions it was taken
under; `loadmaster.plan.rates` turns rows into the rates of one model.
"""

from dataclasses import dataclass
from typing import Literal

# An idle machine gives 1.02 to 1.08.
DISTURBED_SPREAD = 1.15
Layout = Literal["plain", "repacked"]  # repacked: the CPU's own layout of the weights


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductTime:
    """A matrix product over weights that overflow the caches.

    `tokens` is the number of columns; of a `gathered` product (experts), the columns for each
    expert that is in use.
    """

    type: str  # `q4_K`
    layout: Layout
    gathered: bool
    tokens: int
    s_per_byte: float  # of the weights that are in use


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionTime:
    """Flash attention over a cache of one type; seconds per query element and visible cell."""

    type: str  # of K and V
    head_dim: int
    n_head_kv: int  # rows of K and V in a cell
    heads_per_kv: int  # query heads that share one of them
    tokens: int  # 1: decode, more: prefill
    cells: int  # in the cache of a layer; many layers, so that none of them is in the caches
    s_per_element: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTime:
    """One layer of a model with next to no weights, as transformers launches it from Python."""

    kind: (
        str  # of its matrices: `none`, `nf4`, `nf4-double`, `int8`; `part`: another prompt's share
    )
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTimes:
    """One device of the engine, with its own kernels."""

    id: str  # `cpu`, `gpu:0`
    name: str
    n_threads: int  # of the CPU; 0 elsewhere
    products: tuple[ProductTime, ...] = ()
    attention: tuple[AttentionTime, ...] = ()
    hidden_cell_s: float | None = None  # per head and cell that the mask hides
    node_s: float | None = None  # one operation on next to no data
    norm_s: float | None = None  # per element: norm, scale and residual sum
    gate_s: float | None = None  # per element of a gated activation
    rope_s: float | None = None  # per element
    memory_bytes_s: float | None = None  # reads and writes of a copy inside the device
    pinned_bytes_s: float | None = None  # from page-locked host memory
    pageable_bytes_s: float | None = None
    layers: tuple[LayerTime, ...] = ()  # of the transformers engine
    not_measured: tuple[str, ...] = ()  # what this device could not be asked, in words


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """All that was timed, by one engine build."""

    taken: str  # date and time, ISO 8601
    seconds: float  # how long it took
    ram_read_bytes_s: tuple[float, ...] = ()  # with 1 … n threads
    disk_read_bytes_s: float | None = None
    step_s: float | None = None  # of a step outside its graph: batch, bookkeeping, sampling
    sample_s: float | None = None  # per vocabulary entry and sampled token
    # Medians over minima of the timings, on average: well above 1 when something else was running.
    spread: float = 1.0
    engine: Literal["llamacpp", "transformers"] = "llamacpp"  # whose kernels they are
    devices: tuple[DeviceTimes, ...] = ()

    @property
    def disturbed(self) -> bool:
        """Whether other programs had the processors, too: the figures are then too slow."""
        return self.spread > DISTURBED_SPREAD

    def device(self, device_id: str) -> DeviceTimes | None:
        """The times of a device; None when it was not measured."""
        return next((row for row in self.devices if row.id == device_id), None)
