"""Guesses at a sequence's next tokens: what followed the last time it ended like this. Pure."""

from array import array
from collections.abc import Sequence

_LONGEST = 8  # tokens that are compared to tell a good place from a better one
_SHORTEST = 2  # with fewer in common a place is none
_PLACES = 16  # so many of the latest places are compared
_FIRST_BITS = 8


class Lookup:
    """Where each pair of neighbouring tokens of one sequence was last; 12 bytes a token.

    It reads the sequence's own list, which may grow and must not shrink. A guess takes a time that
    does not depend on how long the list is.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens
        self._clear(_FIRST_BITS)

    def guess(self, n: int) -> tuple[int, ...]:
        """What may come next, at most `n` tokens; none if the last two were never seen before."""
        tokens = self._tokens
        if n <= 0 or len(tokens) < _SHORTEST:
            return ()
        self._index()
        place = self._best(self._latest[self._slot(len(tokens))])
        if not place:
            return ()
        found = list(tokens[place : place + n])
        distance = len(tokens) - place
        while len(found) < n:  # the copy runs into its own beginning: what repeats goes on so
            found.append(found[-distance])
        return tuple(found)

    def _clear(self, bits: int) -> None:
        self._mask = (1 << bits) - 1
        # By a hash of the pair, where the token after it is; 0: nowhere.
        self._latest = array("i", bytes(4 << bits))
        self._before = array("i", (0, 0))  # of each place, the one before with the same hash

    def _slot(self, place: int) -> int:
        """The hash of the pair before a place."""
        return (self._tokens[place - 2] * 0x9E3779B1 + self._tokens[place - 1]) & self._mask

    def _index(self) -> None:
        """Note the pairs that are new; the last one only when something follows it."""
        if len(self._tokens) > self._mask:
            self._clear(len(self._tokens).bit_length())
        latest, before, slot = self._latest, self._before, self._slot
        for place in range(len(before), len(self._tokens)):
            at = slot(place)
            before.append(latest[at])
            latest[at] = place

    def _best(self, place: int) -> int:
        """Of the latest places, the one before which most tokens are the same as at the end."""
        best, longest = 0, _SHORTEST - 1
        for _ in range(_PLACES):
            if not place or longest == _LONGEST:
                break
            same = self._same(place)
            if same > longest:
                best, longest = place, same
            place = self._before[place]
        return best

    def _same(self, place: int) -> int:
        tokens, end = self._tokens, len(self._tokens)
        for n in range(min(_LONGEST, place)):
            if tokens[place - 1 - n] != tokens[end - 1 - n]:
                return n
        return min(_LONGEST, place)
