"""Which sequence ids hold which cells: a radix tree over tokens, one for each prefix scope.

A node is a run of cells, one for each of its tokens. A sequence holds the nodes on the path from
the root to its tip; nodes with several holders are shared cells, counted once. A prompt that
leaves a path inside a node splits it there. Two sequences that computed equal tokens on their own
have cells of their own: then a node has two children that begin with the same token.

The holders are small integers; `held` ones belong to running requests, the others are kept for
later prompts until their cells are needed.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens agree. Compares slices, so that 100,000 tokens take no loop."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class Node:
    """A run of cells that every one of its holders has at position `start`."""

    __slots__ = ("children", "holders", "n_held", "parent", "start", "tokens")

    def __init__(self, parent: Self | None, start: int, tokens: list[int]) -> None:
        self.parent = parent
        self.start = start
        self.tokens = tokens
        self.children: dict[int, list[Node]] = {}
        self.holders: set[int] = set()
        self.n_held = 0  # how many holders are running

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class Match:
    """The first `n` tokens of a prompt are in cells; the last of them in `node`, maybe inside."""

    n: int
    node: Node | None  # None: nothing

    def cut(self, n: int) -> "Match":
        """The same up to `n`."""
        node = self.node
        while node is not None and node.start >= n:
            node = node.parent
        return Match(n, node) if n and node is not None else NO_MATCH


NO_MATCH = Match(0, None)


class PrefixTree:
    """The cells of all sequences."""

    def __init__(self) -> None:
        self._roots: dict[str, Node] = {}
        self._tips: dict[int, Node] = {}
        self._scopes: dict[int, str] = {}
        self._held: set[int] = set()
        self.n_cells = 0
        self.n_held_cells = 0

    # -- questions

    def __contains__(self, holder: int) -> bool:
        return holder in self._tips

    def length(self, holder: int) -> int:
        """How many cells a sequence has, shared ones included."""
        return self._tips[holder].end

    def tokens(self, holder: int) -> list[int]:
        """The tokens of a sequence's cells."""
        path = list(_path(self._tips[holder]))
        return [token for node in reversed(path) for token in node.tokens]

    def own(self, holder: int) -> int:
        """Cells at the end of a sequence that no other has: dropping it frees them."""
        total = 0
        for node in _path(self._tips[holder]):
            if len(node.holders) > 1:
                break
            total += len(node.tokens)
        return total

    def match(self, scope: str, tokens: Sequence[int]) -> Match:
        """The longest beginning of `tokens` that is in cells, up to the middle of a node."""
        node = self._roots.get(scope)
        if node is None:
            return NO_MATCH
        n = 0
        while n < len(tokens):
            child, same = _best_child(node, tokens, n)
            if child is None:
                break
            node, n = child, n + same
            if n < child.end:
                break
        return Match(n, node) if n else NO_MATCH

    def match_whole(self, scope: str, tokens: Sequence[int]) -> Match:
        """The longest beginning of `tokens` that is all the cells of some sequence."""
        match = self.match(scope, tokens)
        node = match.node
        while node is not None and not (node.end <= match.n and self._standing(node)):
            node = node.parent
        return Match(node.end, node) if node is not None and node.end else NO_MATCH

    def match_among(
        self, holders: Iterable[int], scope: str, tokens: Sequence[int], *, whole: bool
    ) -> Match:
        """The longest beginning of `tokens` that one of these sequences has; if `whole`, as all of
        its cells. For sequences that share nothing: each is a node."""
        best = NO_MATCH
        for holder in holders:
            tip = self._tips[holder]
            if tip.parent is None or self._scopes[holder] != scope:
                continue
            n = common_prefix(tip.tokens, list(tokens[: len(tip.tokens)]))
            if n > best.n and not (whole and n < len(tip.tokens)):
                best = Match(n, tip)
        return best

    def _standing(self, node: Node) -> bool:
        return any(self._tips[holder] is node for holder in node.holders)

    def nearest(self, match: Match) -> int:
        """Of the sequences that have a match's cells, the one with the fewest beyond them."""
        assert match.node is not None
        return min(match.node.holders, key=lambda holder: (self._tips[holder].end, holder))

    def not_held(self, match: Match) -> int:
        """Cells of a match that no running request holds."""
        if match.node is None or match.node.n_held:
            return 0
        total = match.n - match.node.start
        for node in _path(match.node.parent):
            if node.n_held:
                break
            total += len(node.tokens)
        return total

    def earliest(self, match: Match, before: int) -> tuple[int, int]:
        """The smallest holder below `before` of the deepest node of a match, and the length
        they have in common; (before, 0) when there is none."""
        n = match.n
        for node in _path(match.node):
            first = min(node.holders, default=before)
            if first < before:
                return first, min(n, node.end)
        return before, 0

    # -- changes

    def begin(self, holder: int, scope: str, match: Match = NO_MATCH) -> None:
        """A new running sequence, with the cells of a match."""
        node = match.node or self._roots.get(scope)
        if node is None:
            node = self._roots[scope] = Node(None, 0, [])
        if match.node is not None and match.n < node.end:
            node = self._split(node, match.n - node.start)
        for part in _path(node):
            part.holders.add(holder)
            self._hold(part)
        self._tips[holder], self._scopes[holder] = node, scope
        self._held.add(holder)

    def extend(self, holder: int, tokens: Sequence[int]) -> None:
        """A running sequence's next cells."""
        tip = self._tips[holder]
        if len(tip.holders) > 1 or tip.parent is None:
            child = Node(tip, tip.end, [])
            child.holders.add(holder)
            child.n_held = 1
            tip.children.setdefault(tokens[0], []).append(child)
            tip = self._tips[holder] = child
        tip.tokens += tokens
        self.n_cells += len(tokens)
        self.n_held_cells += len(tokens)

    def trim(self, holder: int, n: int) -> None:
        """Drop a sequence's cells from position `n` on; others keep what they share."""
        node = self._tips[holder]
        while node.parent is not None and node.start >= n:
            self._leave(node, holder)
            node = node.parent
        if node.end > n:
            upper = self._split(node, n - node.start)
            self._leave(node, holder)
            node = upper
        self._tips[holder] = node

    def drop(self, holder: int) -> None:
        """The end of a sequence: all its cells go, but for those that others share."""
        for node in tuple(_path(self._tips[holder])):
            self._leave(node, holder)
        scope = self._scopes.pop(holder)
        if not self._roots[scope].holders:
            del self._roots[scope]
        del self._tips[holder]
        self._held.discard(holder)

    def rename(self, holder: int, to: int) -> None:
        """A kept sequence gets another number."""
        for node in _path(self._tips[holder]):
            node.holders.remove(holder)
            node.holders.add(to)
        self._tips[to] = self._tips.pop(holder)
        self._scopes[to] = self._scopes.pop(holder)

    def release(self, holder: int) -> None:
        """A running sequence's request ended; its cells are kept."""
        self._held.remove(holder)
        for node in _path(self._tips[holder]):
            self._unhold(node)

    def take(self, holder: int) -> None:
        """A kept sequence runs again."""
        self._held.add(holder)
        for node in _path(self._tips[holder]):
            self._hold(node)

    def _hold(self, node: Node) -> None:
        node.n_held += 1
        if node.n_held == 1:
            self.n_held_cells += len(node.tokens)

    def _unhold(self, node: Node) -> None:
        node.n_held -= 1
        if node.n_held == 0:
            self.n_held_cells -= len(node.tokens)

    def _leave(self, node: Node, holder: int) -> None:
        node.holders.remove(holder)
        if holder in self._held:
            self._unhold(node)
        if node.holders or node.parent is None:
            return
        self.n_cells -= len(node.tokens)
        siblings = node.parent.children[node.tokens[0]]
        siblings.remove(node)
        if not siblings:
            del node.parent.children[node.tokens[0]]

    def _split(self, node: Node, at: int) -> Node:
        """Cut a node in two and return the upper part. Tips stay at the lower one."""
        assert node.parent is not None
        upper = Node(node.parent, node.start, node.tokens[:at])
        upper.holders, upper.n_held = set(node.holders), node.n_held
        siblings = node.parent.children[node.tokens[0]]
        siblings[siblings.index(node)] = upper
        del node.tokens[:at]
        node.start, node.parent = upper.end, upper
        upper.children[node.tokens[0]] = [node]
        return upper


def _path(node: Node | None) -> Iterator[Node]:
    """From a node to its root."""
    while node is not None:
        yield node
        node = node.parent


def _best_child(node: Node, tokens: Sequence[int], n: int) -> tuple[Node | None, int]:
    """The child that agrees with most of `tokens[n:]`, and with how many."""
    best, longest = None, 0
    for child in node.children.get(tokens[n], ()):
        same = common_prefix(child.tokens, list(tokens[n : n + len(child.tokens)]))
        if same > longest:
            best, longest = child, same
    return best, longest
