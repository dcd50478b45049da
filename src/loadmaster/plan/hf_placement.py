"""Which module goes to which device: layers in order, over as few GPUs as hold them. Pure.

The embedding is with the first layer, the last norm and the output with the last one; a tied output
is its embedding and stays with it. GPUs that are equally fast are filled evenly; of others the
fastest is filled first, because at batch 1 only one of them works at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from loadmaster.machine.types import Gpu
from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.plan import hf_memory
from loadmaster.plan.hf_caches import cache_allocations
from loadmaster.plan.hf_ledger import HfBooks, device_plans, tensors_by_device
from loadmaster.plan.hf_loading import device_loading
from loadmaster.plan.types import CPU, DevicePlan, Knobs, TransformersSettings

_STEPS = 40  # halvings of the search for the smallest even filling
_ROUNDS = 6  # corrections, when rounding takes more than was set aside
SPEED_TOLERANCE = 1.05  # GPUs within it count as equally fast


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Settings with a device map, and what they take."""

    settings: TransformersSettings
    devices: tuple[DevicePlan, ...]

    @property
    def fits(self) -> bool:
        return all(device.left_bytes >= 0 for device in self.devices)

    @property
    def overflow_bytes(self) -> int:
        return sum(max(0, -device.left_bytes) for device in self.devices)


def place(books: HfBooks, base: TransformersSettings, knobs: Knobs) -> Placed:
    """The placement with the fewest GPUs that keeps every cap, or the one that misses by least."""
    found = [_placed(books, base, one) for one in _fixed(books, knobs)]
    if not found:
        found = list(_searched(books, base, _host_layers(books, knobs)))
    fitting = [one for one in found if one.fits]
    return fitting[0] if fitting else min(found, key=lambda one: one.overflow_bytes)


def usable_gpus(books: HfBooks) -> tuple[Gpu, ...]:
    """GPUs that may be used at all."""
    return tuple(gpu for gpu in books.gpus if books.budget.cap(gpu.id) > 0)


def _placed(books: HfBooks, base: TransformersSettings, layers: Sequence[str]) -> Placed:
    settings = replace(base, device_map=device_map_of(books.model, layers))
    return Placed(settings=settings, devices=device_plans(books, settings))


def device_map_of(model: CheckpointSpec, layers: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """The map for the devices of the layers in order."""
    if len(set(layers)) == 1:
        return (("", layers[0]),)
    gpus = [device for device in layers if device != CPU]
    first, last = gpus[0], gpus[-1]
    rows = [("model.embed_tokens", first)]
    rows += [(f"model.layers.{index}", device) for index, device in enumerate(layers)]
    rows += [("model.rotary_emb", first)]
    rows += [(name, last) for name in _ends(model)]
    # Without a matrix of its own the output is the embedding.
    has_output = model.writes_text and not model.tied_output
    rows += [("lm_head", last if has_output else first)]
    return tuple(rows)


def _ends(model: CheckpointSpec) -> list[str]:
    """Modules behind the layers: the last norm, whatever the family calls it."""
    modules = {t.module for t in model.tensors if t.layer is None and t.role == "other"}
    return sorted(module for module in modules if module.startswith("model."))


# ---- what the user fixed


def _host_layers(books: HfBooks, knobs: Knobs) -> int:
    """Layers on the CPU beside a GPU: only those that were asked for."""
    if knobs.n_gpu_layers is None or not usable_gpus(books):
        return 0
    return max(0, books.model.n_layer - knobs.n_gpu_layers)


def _fixed(books: HfBooks, knobs: Knobs) -> Iterator[tuple[str, ...]]:
    """Layers by device where the user said all of it."""
    n_layer, gpus = books.model.n_layer, usable_gpus(books)
    if not gpus or knobs.n_gpu_layers == 0:
        yield (CPU,) * n_layer
    elif knobs.layers_per_device is not None:
        shares = zip(books.gpus, knobs.layers_per_device, strict=False)
        named = [gpu.id for gpu, count in shares for _ in range(count)][:n_layer]
        yield (*(CPU,) * (n_layer - len(named)), *named)


# ---- the search


def _searched(books: HfBooks, base: TransformersSettings, n_host: int) -> Iterator[Placed]:
    """With one GPU, with two, …: the first that fits is taken."""
    ranked = sorted(
        usable_gpus(books), key=lambda gpu: (-_speed(gpu), -books.budget.cap(gpu.id), gpu.id)
    )
    sizes = _sizes(books, base, ranked[0].id)
    most = min(len(ranked), books.model.n_layer)
    for count in range(1, most + 1):
        placed = _over(books, base, ranked[:count], n_host, sizes, last=count == most)
        if placed is not None:
            yield placed
            if placed.fits:
                return


def _speed(gpu: Gpu) -> int:
    return gpu.bandwidth_bytes_s or 0


def _over(
    books: HfBooks,
    base: TransformersSettings,
    gpus: Sequence[Gpu],
    n_host: int,
    sizes: "_Sizes",
    *,
    last: bool,
) -> Placed | None:
    """Layers over exactly these GPUs, corrected by the ledger where its rounding takes more. None
    when they do not hold them; of the `last` that can be tried, the fairest split all the same."""
    even = _speed(gpus[0]) <= _speed(gpus[-1]) * SPEED_TOLERANCE
    if even:
        gpus = sorted(gpus, key=lambda gpu: int(gpu.id.removeprefix("gpu:")))
    extra: dict[str, int] = {}
    best: Placed | None = None
    for _ in range(_ROUNDS):
        room = {
            gpu.id: books.budget.cap(gpu.id) - sizes.fixed[gpu.id] - extra.get(gpu.id, 0)
            for gpu in gpus
        }
        split = _split(sizes, room, 1.0, n_host)
        if split is None and not last:
            break
        fair = _even_split(sizes, room, n_host) if even or split is None else split
        placed = _placed(books, base, fair)
        if best is None or placed.overflow_bytes < best.overflow_bytes:
            best = placed
        if placed.fits or split is None:
            break
        for device in placed.devices:
            if device.left_bytes < 0:
                extra[device.id] = extra.get(device.id, 0) - device.left_bytes
    return best


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """Bytes of every block, and what a GPU takes whatever is on it."""

    layers: tuple[int, ...]  # weights and caches
    head: int
    tail: int
    fixed: Mapping[str, int]


def _sizes(books: HfBooks, base: TransformersSettings, gpu_id: str) -> _Sizes:
    """As if everything were on one GPU: a block's size does not depend on which one it is."""
    model = books.model
    whole = replace(base, device_map=(("", gpu_id),))
    tensors = tensors_by_device(model, whole)[gpu_id]
    layers = [sum(cache_allocations(model, [index], whole)) for index in range(model.n_layer)]
    head = tail = 0
    for tensor in tensors:
        if tensor.layer is not None:
            layers[tensor.layer] += tensor.size_bytes
        elif tensor.role in ("embedding", "buffer"):
            head += tensor.size_bytes
        else:
            tail += tensor.size_bytes
    transient = max(
        hf_memory.activation_bytes(model, tensors, whole), device_loading(model, tensors)
    )
    overheads = books.overheads.device_bytes
    fixed = {gpu.id: overheads.get(gpu.id, 0) + transient for gpu in books.gpus}
    return _Sizes(layers=tuple(layers), head=head, tail=tail, fixed=fixed)


def _split(
    sizes: _Sizes, room: Mapping[str, int], share: float, n_host: int
) -> tuple[str, ...] | None:
    """Layers in order, each GPU filled to `share` of its room; None when some are left over."""
    gpus = list(room)
    placed: list[str] = [CPU] * n_host
    at, used = 0, sizes.head
    for index in range(n_host, len(sizes.layers)):
        tail = sizes.tail if index == len(sizes.layers) - 1 else 0
        while used + sizes.layers[index] + tail > room[gpus[at]] * share:
            at, used = at + 1, 0
            if at == len(gpus):
                return None
        used += sizes.layers[index]
        placed.append(gpus[at])
    return tuple(placed)


def _even_split(sizes: _Sizes, room: Mapping[str, int], n_host: int) -> tuple[str, ...]:
    """The split whose fullest GPU is the least full; beyond full where nothing fits."""
    room = {gpu: max(1, size) for gpu, size in room.items()}
    whole = sizes.head + sizes.tail + sum(sizes.layers)
    low, high = 0.0, 1.0 + whole / min(room.values())
    best = _split(sizes, room, high, n_host)
    assert best is not None
    for _ in range(_STEPS):
        middle = (low + high) / 2
        found = _split(sizes, room, middle, n_host)
        if found is None:
            low = middle
        else:
            best, high = found, middle
    return best
