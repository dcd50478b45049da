"""The account of cells and sequence ids: what is held, what is kept, what gives way.

Running requests hold cells. Ended ones leave theirs behind, kept for prompts to come: the least
recently used of them give way when a step needs cells or a request needs an id. Where the engine
has ids that hold cells but cannot run, ended sequences are moved there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from loadmaster.scheduler.prefix import NO_MATCH, Match, PrefixTree
from loadmaster.scheduler.request import Request
from loadmaster.scheduler.types import Copy, Evict, Limits, Shelve

_EVICT_AT_ONCE = 256  # the engine looks at every cell for each removal: few large ones cost less


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A request's sequence: its id, its first `n` cells, and from whom it has them."""

    seq_id: int
    n: int
    source: int | None  # None: they were its own
    before: list[Evict]
    after: list[Evict]


class Cells:
    """Who has which cells. Methods that return evictions have noted them already."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._tree = PrefixTree()
        self._free = list(range(limits.n_seq_max))
        self._shelf = list(range(limits.n_seq_max, limits.n_seq_ids or limits.n_seq_max))
        self._has_shelf = bool(self._shelf)
        heapify(self._free)
        self._kept: dict[int, None] = {}  # the least recently used first
        self._anchors: set[int] = set()
        self._last_item: int | None = None

    @property
    def n_used(self) -> int:
        return self._tree.n_cells

    @property
    def n_held(self) -> int:
        """Cells of running requests: none of them can be evicted."""
        return self._tree.n_held_cells

    @property
    def n_available(self) -> int:
        """Cells that are free or can be made free."""
        return self._limits.n_ctx - self._tree.n_held_cells

    @property
    def n_kept(self) -> int:
        return len(self._kept)

    @property
    def last_kept(self) -> int | None:
        """The sequence whose request ended last."""
        return next(reversed(self._kept), None)

    def tokens(self, seq_id: int) -> tuple[int, ...]:
        return tuple(self._tree.tokens(seq_id)) if seq_id in self._tree else ()

    def length(self, seq_id: int) -> int:
        return self._tree.length(seq_id)

    def shared(self, seq_id: int) -> int:
        """Where the cells begin that no other sequence has."""
        return self._tree.length(seq_id) - self._tree.own(seq_id)

    # -- running requests

    def find(self, request: Request) -> Match:
        """Leading cells that hold the request's own tokens. At least one token must be fed."""
        tokens, scope = request.tokens[:-1], request.submitted.prefix_scope
        whole = not self._limits.partial_removal
        if not self._limits.shared_prefix:
            return self._tree.match_among(self._kept, scope, tokens, whole=whole)
        return (self._tree.match_whole if whole else self._tree.match)(scope, tokens)

    def surely(self, request: Request, match: Match) -> int:
        """How much of a match can be shared for certain: not what lies behind a window."""
        if not self._limits.shared_prefix:
            return 0
        if self._limits.shared_at_end:
            tokens, scope = request.tokens, request.submitted.prefix_scope
            return self._tree.match_whole(scope, tokens[:-1]).n
        return match.n

    def not_held(self, match: Match) -> int:
        return self._tree.not_held(match)

    def begin(self, request: Request, match: Match) -> Start:
        """Give a request a sequence id and the cells of a match, as far as they can be had."""
        heir = self._heir(match)
        if heir is not None:
            return self._inherit(heir, match)
        if not self._limits.shared_prefix:
            match = NO_MATCH
        source = self._tree.nearest(match) if match.node is not None else None
        before = []
        if not self._free:
            others = [seq_id for seq_id in self._kept if seq_id != source]
            if not others:
                assert source is not None
                return self._inherit(source, match)
            plain = (seq_id for seq_id in others if seq_id not in self._anchors)
            before.append(self._drop(next(plain, others[0])))
        seq_id = heappop(self._free)
        self._tree.begin(seq_id, request.submitted.prefix_scope, match)
        after = []
        if source in self._anchors:
            self._kept[source] = self._kept.pop(source)  # the last one used
        elif source in self._kept and self._tree.own(source) == 0:
            after.append(self._drop(source))  # the request goes on from all that it had
        return Start(seq_id=seq_id, n=match.n, source=source, before=before, after=after)

    def _heir(self, match: Match) -> int | None:
        """A kept sequence that a request may go on with: one that loses nothing by it, or, where
        sequences cannot share cells, the one that loses least."""
        if match.node is None or self._has_shelf:
            return None
        kept = [s for s in match.node.holders if s in self._kept and s not in self._anchors]
        if self._limits.shared_prefix or not self._limits.partial_removal:
            kept = [seq_id for seq_id in kept if self._tree.length(seq_id) == match.n]
        return min(kept, key=lambda s: (self._tree.length(s), s), default=None)

    def _inherit(self, seq_id: int, match: Match) -> Start:
        self._unkeep(seq_id)
        self._tree.take(seq_id)
        self._tree.trim(seq_id, match.n)
        return Start(seq_id=seq_id, n=match.n, source=None, before=[], after=[])

    def extend(self, seq_id: int, tokens: Sequence[int]) -> None:
        if tokens:
            self._tree.extend(seq_id, tokens)

    def trim(self, seq_id: int, n: int) -> None:
        self._tree.trim(seq_id, n)

    def drop(self, seq_id: int) -> None:
        """A running request lost its cells."""
        self._tree.drop(seq_id)
        self._free_id(seq_id)

    # -- kept sequences

    def keep(self, seq_id: int) -> Iterator[Evict | Shelve]:
        """A request ended: its cells stay, unless other sequences have them all."""
        self._tree.release(seq_id)
        self._kept[seq_id] = None
        if self._tree.own(seq_id) == 0:
            yield self._drop(seq_id)
        elif self._has_shelf:
            yield from self._to_shelf(seq_id)

    def _to_shelf(self, seq_id: int) -> Iterator[Evict | Shelve]:
        if not self._shelf:
            yield self._drop(next(iter(self._kept)))
        to = heappop(self._shelf)
        self._tree.rename(seq_id, to)
        self._unkeep(seq_id)
        self._free_id(seq_id)
        self._kept[to] = None
        yield Shelve(seq_id=seq_id, to=to, n=self._tree.length(to))

    def keep_item(self, seq_id: int, n_prompt: int) -> Iterator[Evict | Shelve]:
        """An item of a job ended: nobody goes on from its answer, and its prompt matters only if
        the next items begin with the same tokens. Of all ended items one prompt is kept, where
        sequences share cells: every step's attention runs to the last used cell of them all.
        """
        if self._limits.partial_removal and n_prompt < self._tree.length(seq_id):
            self._tree.trim(seq_id, n_prompt)
            yield Evict(seq_id=seq_id, n_keep=n_prompt)
        previous = self._last_item
        yield from self.keep(seq_id)
        if previous is not None and previous in self._kept and self._limits.shared_prefix:
            yield self._drop(previous)
        self._last_item = self.last_kept

    def adopt(self, scope: str, tokens: tuple[int, ...]) -> tuple[int | None, list[Evict]]:
        """An id and room for cells from outside; None when running requests have them all."""
        ids = self._shelf if self._has_shelf else self._free
        if len(tokens) > self.n_available or not (ids or self._kept):
            return None, []
        evicted = list(self.make_room(len(tokens)))
        if not ids:
            evicted.append(self._drop(next(iter(self._kept))))
        seq_id = heappop(ids)
        self._tree.begin(seq_id, scope)
        self.extend(seq_id, tokens)
        self._tree.release(seq_id)
        self._kept[seq_id] = None
        return seq_id, evicted

    # -- anchors

    @property
    def n_anchors(self) -> int:
        return len(self._anchors)

    def anchor(self, scope: str, match: Match, n_running: int) -> Iterator[Evict | Copy]:
        """Keep a sequence where a running one stands, if it is about to be shared there.

        Where a cache can share only what a sequence stands at, later requests with the same
        beginning find this one. It takes the place of a request, so there is at most one in eight.
        """
        most = self._limits.n_seq_max // 8
        if not self._limits.shared_at_end or n_running + 2 + most > self._limits.n_seq_max:
            return
        assert match.node is not None
        source = self._tree.nearest(match)
        if most == 0 or source in self._kept or self._tree.length(source) != match.n:
            return
        if any(self._tree.length(one) == match.n for one in match.node.holders & self._anchors):
            return
        if len(self._anchors) >= most:
            yield self._drop(next(seq_id for seq_id in self._kept if seq_id in self._anchors))
        if not self._free:
            yield self._drop(next(s for s in self._kept if s not in self._anchors))
        seq_id = heappop(self._free)
        self._tree.begin(seq_id, scope, match)
        self._tree.release(seq_id)
        self._kept[seq_id] = None
        self._anchors.add(seq_id)
        yield Copy(source=source, to=seq_id, n=match.n)

    def make_room(self, n: int) -> Iterator[Evict]:
        """Evict kept cells, the least recently used first, until `n` are free."""
        while self._kept and self._tree.n_cells + n > self._limits.n_ctx:
            frees = (seq_id for seq_id in self._kept if self._tree.own(seq_id))
            seq_id = next(frees, next(iter(self._kept)))
            excess = max(self._tree.n_cells + n - self._limits.n_ctx, _EVICT_AT_ONCE)
            own = self._tree.own(seq_id)
            if self._limits.partial_removal and own > excess:
                n_keep = self._tree.length(seq_id) - excess
                self._tree.trim(seq_id, n_keep)
                yield Evict(seq_id=seq_id, n_keep=n_keep)
            else:
                yield self._drop(seq_id)

    def lose(self, seq_id: int) -> None:
        """A kept sequence has no cells any more."""
        if seq_id in self._kept:
            self._drop(seq_id)

    def evict_all(self) -> list[Evict]:
        return [self._drop(seq_id) for seq_id in tuple(self._kept)]

    def _drop(self, seq_id: int) -> Evict:
        self._tree.drop(seq_id)
        self._unkeep(seq_id)
        self._free_id(seq_id)
        return Evict(seq_id=seq_id)

    def _unkeep(self, seq_id: int) -> None:
        del self._kept[seq_id]
        self._anchors.discard(seq_id)
        if self._last_item == seq_id:
            self._last_item = None

    def _free_id(self, seq_id: int) -> None:
        heappush(self._free if seq_id < self._limits.n_seq_max else self._shelf, seq_id)
