"""One device's part of a step of the transformers engine: which matrices it multiplies with, what
its attention reads, how many layers it launches. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.model.types import LayerKind
from loadmaster.plan.hf_caches import read_bytes
from loadmaster.plan.hf_ledger import compute_device
from loadmaster.plan.hf_rates import TorchRates
from loadmaster.plan.hf_weights import COMPUTE_BYTES, LoadedTensor, written_out_in_parts
from loadmaster.plan.types import CPU, TransformersSettings

# Arithmetic at its full rate takes this share of the time: then the time is arithmetic's.
_COMPUTE_BOUND = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Tensors of one kind and one use on a device, together."""

    kind: str
    use: str  # `dense`, `expert`, `output`
    size_bytes: int
    n_elements: int
    in_parts: bool = False  # whether its matrices are written out for each product


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """What the attention of a device's layers reads and computes for each cell that a token sees,
    layers whose window slides apart; and what its small operations pass over for each token."""

    cell_bytes: float = 0.0
    window_cell_bytes: float = 0.0
    query: int = 0
    window_query: int = 0
    norm: int = 0
    gate: int = 0
    rope: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One device's part of a step."""

    device: str
    rates: TorchRates
    groups: tuple[Group, ...]
    widths: Widths
    n_layers: int
    streamed_bytes: int = 0  # weights of the CPU that come over the link for each step
    link_bytes_s: float = 0.0

    def bound(self, seconds: float, tokens: int) -> str:
        """What products that take so long wait for: their bytes, or their arithmetic."""
        flops = 2.0 * tokens * sum(group.n_elements for group in self.groups)
        computes = flops / self.rates.flops > _COMPUTE_BOUND * seconds
        if self.device == CPU:
            return "cpu-compute" if computes else "ram-bandwidth"
        return "gpu-compute" if computes else "vram-bandwidth"


def stage_on(
    device: str,
    rates: TorchRates,
    model: CheckpointSpec,
    settings: TransformersSettings,
    tensors: Sequence[LoadedTensor],
) -> Stage:
    """What a device has to do where these tensors are on it."""
    layers = [
        index
        for index in range(model.n_layer)
        if compute_device(f"model.layers.{index}", settings) == device
    ]
    return Stage(
        device=device,
        rates=rates,
        groups=tuple(_groups(model, tensors, settings)),
        widths=_widths(model, settings, layers),
        n_layers=len(layers),
    )


def _groups(
    model: CheckpointSpec, tensors: Sequence[LoadedTensor], settings: TransformersSettings
) -> Iterator[Group]:
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    for tensor in tensors:
        use = _use(model, tensor)
        if use is not None:
            size, elements = sums.get((tensor.kind, use), (0, 0))
            key = tensor.kind, use
            sums[key] = size + tensor.size_bytes, elements + tensor.n_elements
    for (kind, use), (size, elements) in sums.items():
        parts = kind not in COMPUTE_BYTES and written_out_in_parts(model, settings)
        yield Group(kind=kind, use=use, size_bytes=size, n_elements=elements, in_parts=parts)


def _use(model: CheckpointSpec, tensor: LoadedTensor) -> str | None:
    """How a step reads a tensor; None for rows that are looked up."""
    if tensor.role == "output" or (model.tied_output and tensor.role == "embedding"):
        return "output"
    if tensor.role == "expert":
        return "expert"
    return None if tensor.role in ("embedding", "buffer") else "dense"


def _widths(model: CheckpointSpec, settings: TransformersSettings, layers: Sequence[int]) -> Widths:
    cells, queries = [0.0, 0.0], [0, 0]
    gate = norm = rope = 0
    for index in layers:
        layer = model.layers[index]
        slides = int(layer.kind is LayerKind.SWA and bool(model.n_swa))
        query = layer.n_head * layer.k_width // max(1, layer.n_head_kv)
        for kind, width in ((settings.type_k, layer.k_width), (settings.type_v, layer.v_width)):
            cells[slides] += read_bytes(kind, width, layer.n_head_kv, settings.compute_type)
        queries[slides] += query
        norm += 2 * model.n_embd
        gate += model.n_expert_used * model.n_ff_expert if model.n_expert else model.n_ff
        rope += query + layer.k_width
    return Widths(
        cell_bytes=cells[0], window_cell_bytes=cells[1], query=queries[0], window_query=queries[1],
        norm=norm, gate=gate, rope=rope,
    )  # fmt: skip
