"""Guesses at a sequence's next tokens: what followed the last time it ended like this. Pure."""

from array import array
from collections.abc import Sequence

_LONGEST = 8  # tokens that are compared to tell a good place from a better one
_PLACES = 16  # so many of the latest places are compared


class Lookup:
    """The pairs of neighbouring tokens of one sequence, and where each was last.

    It reads the sequence's own list, which may grow and must not shrink. A guess takes a time that
    does not depend on how long the list is.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens
        self._latest: dict[tuple[int, int], int] = {}  # pair → where the token after it is
        self._before = array("q", [0, 0])  # the same of the pair's place before; 0: there is none

    def guess(self, n: int) -> tuple[int, ...]:
        """What may come next, at most `n` tokens; none if the last two were never seen before."""
        self._index()
        tokens = self._tokens
        if n <= 0 or len(tokens) < 2:
            return ()
        place = self._best(self._latest.get((tokens[-2], tokens[-1]), 0))
        if not place:
            return ()
        found = list(tokens[place : place + n])
        distance = len(tokens) - place
        while len(found) < n:  # the copy runs into its own beginning: what repeats goes on so
            found.append(found[-distance])
        return tuple(found)

    def _index(self) -> None:
        """Note the pairs that are new; the last one only when something follows it."""
        tokens, latest, before = self._tokens, self._latest, self._before
        for place in range(len(before), len(tokens)):
            pair = (tokens[place - 2], tokens[place - 1])
            before.append(latest.get(pair, 0))
            latest[pair] = place

    def _best(self, place: int) -> int:
        """Of the latest places, the one before which most tokens are the same as at the end."""
        best, longest = 0, 0
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
