"""The most model bytes that any placement gets onto one device: branch and bound over exact sums.

Written apart from the planner, sharing nothing with it. A placement is a number of GPU layers and a
set of matrices: every dense feed-forward and expert matrix of every layer may be on either side,
the rest of a layer is where its layer is. What a placement takes beside weights comes from the
engine alone: caches, and compute buffers, which grow with what stays on the host, because it is
streamed through the device.

The search goes by classes: a number of GPU layers, and the kinds of matrices (role and size) that
are on the device whole. The compute buffer of a class is bounded from below by the smallest among
sized members that keep one matrix of each other kind on the host; with that and an exact subset sum
a class has a bound on its model bytes. The class with the highest bound is tried next, until none
is above the best placement found; a placement is found when the engine sized it and it fits. Where
the search was cut short the bound stays above it, and the benchmark counts that.
"""

import heapq
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from benchmarks.accuracy.stand_in import CUDA_RULES
from benchmarks.accuracy.subsets import SubsetSums
from loadmaster.model.types import ModelSpec, TensorSpec
from loadmaster.plan.types import CPU, EngineSettings, Override, Sizing, SizingFailure
from loadmaster.units import align

DEVICE = "gpu:0"
_MOVABLE = re.compile(r"^blk\.\d+\.(ffn_(?:gate|up|down)(?:_exps)?)\.weight$")
_SHUFFLES = 2  # arrangements of one subset over the layers beside last-first and first-first
_MAX_SIZED = 60  # subsets tried for one budget; beyond it, the bound stays open
_EXACT_STEPS = 4  # next smaller sums of a class that are tried one by one, before it is cut by more

Size = Callable[[EngineSettings], Sizing | SizingFailure]


@dataclass(frozen=True, slots=True, order=True)
class Kind:
    """Matrices of one role and one size on the device."""

    role: str
    device_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimum:
    """`best_bytes` was sized and fits; the bound says that no placement has more."""

    best_bytes: int
    bound_bytes: int
    settings: EngineSettings | None  # of the best; None when nothing fits


@dataclass(frozen=True, slots=True)
class _Class:
    """Placements with a number of GPU layers and these kinds on the device whole."""

    n_gpu_layers: int
    whole: frozenset[Kind]


@dataclass(frozen=True, slots=True, order=True)
class _Node:
    """What a class may still hold: no more than `-negative_bytes`, with `room` for matrices."""

    negative_bytes: int
    order: int
    refined: bool
    room: int
    misses: int  # sums of this class that turned out not to fit


class Optimiser:
    """One model under one workload, asked for many budgets."""

    def __init__(self, model: ModelSpec, settings: EngineSettings, size: Size) -> None:
        """`settings` give the workload; their placement is set aside."""
        self._settings, self._size = settings, size
        self._n_layer = model.n_layer
        self._dice = random.Random(model.name)
        self._kinds = _by_kind(model)
        self._kind_order = sorted(self._kinds)
        self._classes = [
            _Class(count, frozenset(whole))
            for count in range(model.n_layer + 2)
            for n in range(len(self._kinds) + 1)
            for whole in combinations(self._kind_order, n)
        ]
        self._sums: dict[frozenset[Kind], SubsetSums] = {}
        self._compute: dict[_Class, int] = {}
        self.n_below_bound = 0  # sized placements that took less compute than their class's bound

    def smallest_bytes(self) -> int:
        """The smallest budget under which a layer is on the device, its matrices on the host."""
        rows = [self._sized(count, frozenset()).on(DEVICE) for count in range(1, self._n_layer + 2)]
        return min(row.model_bytes + row.context_bytes + row.compute_bytes for row in rows)

    def everything_bytes(self) -> int:
        """What all layers take on the device."""
        everything = frozenset(name for names in self._kinds.values() for name in names)
        row = self._sized(self._n_layer + 1, everything).on(DEVICE)
        return row.model_bytes + row.context_bytes + row.compute_bytes

    def most(self, budget_bytes: int, counts: Sequence[int]) -> Optimum:
        """The most model bytes over these numbers of GPU layers."""
        while True:  # a bound that turned out too high was lowered: search again with it
            known = self.n_below_bound
            found = self._search(budget_bytes, counts)
            if self.n_below_bound == known:
                return found

    def _search(self, budget_bytes: int, counts: Sequence[int]) -> Optimum:
        queue = [
            node for index in self._indexes(counts) if (node := self._open(index, budget_bytes))
        ]
        heapq.heapify(queue)
        best, tried, skipped = 0, 0, 0
        best_settings: EngineSettings | None = None
        while queue and -queue[0].negative_bytes > best and tried < _MAX_SIZED:
            node = heapq.heappop(queue)
            again: _Node | None
            if node.refined:
                tried += 1
                excess, settings = self._excess(node, budget_bytes)
                if excess <= 0:
                    best, best_settings = -node.negative_bytes, settings
                    continue
                again = self._less(node, 1 if node.misses < _EXACT_STEPS else excess)
                if node.misses >= _EXACT_STEPS:
                    skipped = max(skipped, -node.negative_bytes - 1)
            else:
                again = self._refine(node, budget_bytes)
            if again is not None:
                heapq.heappush(queue, again)
        left = -queue[0].negative_bytes if queue else 0
        return Optimum(
            best_bytes=best, bound_bytes=max(best, left, skipped), settings=best_settings
        )

    def _indexes(self, counts: Sequence[int]) -> Iterator[int]:
        wanted = set(counts)
        for index, one in enumerate(self._classes):
            if one.n_gpu_layers in wanted:
                yield index

    # -- bounds

    def _open(self, index: int, budget: int) -> _Node | None:
        """A first bound, from the number of GPU layers alone."""
        one = self._classes[index]
        base, cache = self._fixed(one.n_gpu_layers)
        room = budget - base - cache - self._least_of_count(one.n_gpu_layers)
        return self._node(index, room, refined=False)

    def _least_of_count(self, count: int) -> int:
        """The smallest compute buffer known with so many GPU layers."""
        ends = (_Class(count, frozenset(self._kinds)), _Class(count, frozenset()))
        for one in ends:
            self._least_compute(one)
        return min(size for one, size in self._compute.items() if one.n_gpu_layers == count)

    def _refine(self, node: _Node, budget: int) -> _Node | None:
        room = budget - self._beside(self._classes[node.order])
        return self._node(node.order, min(room, node.room), refined=True)

    def _less(self, node: _Node, by: int) -> _Node | None:
        """The next sum of a class that is smaller by so much."""
        one = self._classes[node.order]
        base, _ = self._fixed(one.n_gpu_layers)
        room = -node.negative_bytes - base - by
        return self._node(node.order, room, refined=True, misses=node.misses + 1)

    def _node(self, index: int, room: int, *, refined: bool, misses: int = 0) -> _Node | None:
        one = self._classes[index]
        taken = self._sums_of(one.whole).most(room)
        if taken is None:
            return None
        total, _ = self._fixed(one.n_gpu_layers)
        total += sum(n * k.device_bytes for n, k in zip(taken, self._kind_order, strict=True))
        return _Node(-total, index, refined, room, misses)

    def _sums_of(self, whole: frozenset[Kind]) -> SubsetSums:
        if whole not in self._sums:
            sizes = [kind.device_bytes for kind in self._kind_order]
            ranges = []
            for kind in self._kind_order:
                n = len(self._kinds[kind])
                ranges.append((n, n) if kind in whole else (0, n - 1))
            self._sums[whole] = SubsetSums(sizes, ranges)
        return self._sums[whole]

    def _beside(self, one: _Class) -> int:
        """Bytes beside the movable matrices, at the least."""
        base, cache = self._fixed(one.n_gpu_layers)
        return base + cache + self._least_compute(one)

    def _fixed(self, count: int) -> tuple[int, int]:
        """Weights that go with their layer, and caches, for this number of GPU layers."""
        row = self._sized(count, frozenset()).on(DEVICE)
        return row.model_bytes, row.context_bytes

    def _least_compute(self, one: _Class) -> int:
        """The smallest compute buffer among sized members of the class.

        It does not simply grow with what stays on the host: with experts, one host matrix can take
        more room than all of them, because whole layers are then computed there.
        """
        if one not in self._compute:
            names = self._members(one)
            sized = [self._sized(one.n_gpu_layers, on_device) for on_device in names]
            self._compute[one] = min(sizing.on(DEVICE).compute_bytes for sizing in sized)
        return self._compute[one]

    def _members(self, one: _Class) -> set[frozenset[str]]:
        everything = frozenset(name for names in self._kinds.values() for name in names)
        partial = [self._kinds[kind] for kind in self._kind_order if kind not in one.whole]
        halves = [slice(0, 1), slice(-1, None), slice(None), slice(1, None, 2)]
        halves += [slice(0, self._n_layer // 2), slice(self._n_layer // 2, None)]
        return {
            everything - {name for names in partial for name in names[part] or names[:1]}
            for part in halves
        }

    # -- placements

    def _excess(self, node: _Node, budget: int) -> tuple[int, EngineSettings]:
        """By how much the node's matrices miss the budget, in the best arrangement over layers."""
        one = self._classes[node.order]
        taken = self._sums_of(one.whole).most(node.room)
        assert taken is not None
        found: list[tuple[int, EngineSettings]] = []
        for names in self._arrangements(taken):
            row = self._sized(one.n_gpu_layers, names).on(DEVICE)
            if row.compute_bytes < self._least_compute(one):
                self.n_below_bound += 1
                self._compute[one] = row.compute_bytes
            assert row.model_bytes == -node.negative_bytes, "the sum is not the engine's"
            excess = row.model_bytes + row.context_bytes + row.compute_bytes - budget
            found.append((excess, self._settings_of(one.n_gpu_layers, names)))
            if excess <= 0:
                break
        return min(found, key=lambda pair: pair[0])

    def _arrangements(self, taken: Sequence[int]) -> Iterator[frozenset[str]]:
        """So many matrices of each kind: those of the last layers, of the first, of any."""
        groups = [self._kinds[kind] for kind in self._kind_order]
        yield frozenset(n for c, names in zip(taken, groups, strict=True) for n in names[-c:] if c)
        yield frozenset(n for c, names in zip(taken, groups, strict=True) for n in names[:c])
        for _ in range(_SHUFFLES):
            yield frozenset(
                name
                for count, names in zip(taken, groups, strict=True)
                for name in self._dice.sample(names, count)
            )

    def _sized(self, count: int, on_device: frozenset[str]) -> Sizing:
        sizing = self._size(self._settings_of(count, on_device))
        assert isinstance(sizing, Sizing), sizing
        return sizing

    def _settings_of(self, count: int, on_device: frozenset[str]) -> EngineSettings:
        return replace(
            self._settings,
            n_gpu_layers=count,
            layers_per_device=(count,),
            overrides=self._overrides(count, on_device),
        )

    def _overrides(self, count: int, on_device: frozenset[str]) -> tuple[Override, ...]:
        """The matrices that are not where their layer is, a pattern for each role."""
        first = self._n_layer + 1 - count
        moved: dict[tuple[str, str], list[str]] = {}
        for kind, names in self._kinds.items():
            for name in names:
                layer = name.split(".")[1]
                at_home = int(layer) >= first
                if at_home != (name in on_device):
                    moved.setdefault((kind.role, CPU if at_home else DEVICE), []).append(layer)
        return tuple(
            Override(pattern=rf"^blk\.({'|'.join(layers)})\.{role}\.weight$", device=device)
            for (role, device), layers in sorted(moved.items())
        )


def _by_kind(model: ModelSpec) -> dict[Kind, list[str]]:
    found: dict[Kind, list[str]] = {}
    for tensor in model.tensors:
        match = _MOVABLE.match(tensor.name)
        if match:
            found.setdefault(Kind(match[1], _device_bytes(tensor)), []).append(tensor.name)
    return found


def _device_bytes(tensor: TensorSpec) -> int:
    """As ggml_backend_cuda_buffer_type_get_alloc_size pads and aligns it."""
    size = int(tensor.size_bytes)
    over = tensor.shape[0] % CUDA_RULES.row_padding
    if over and tensor.type.block_size > 1:
        size += tensor.type.row_bytes(CUDA_RULES.row_padding - over)
    return align(size, CUDA_RULES.alignment_bytes)
