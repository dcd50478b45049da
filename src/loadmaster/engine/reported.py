"""Log-probabilities beside the text they belong to: a token's are sent when its text is."""

from collections import deque

from loadmaster.engine.types import TokenLogprob


class Reported:
    """The log-probabilities of one request whose text has not been sent yet.

    Text waits in `TextStream`: for the rest of a character, or until it is known not to be a stop
    string. Tokens that were never shown, because a stop string took them, are not reported.
    """

    __slots__ = ("_n_raw", "_n_shown", "_waiting")

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, TokenLogprob]] = deque()  # with where its bytes begin
        self._n_raw = 0
        self._n_shown = 0

    def add(self, logprob: TokenLogprob) -> None:
        """A token was generated."""
        self._waiting.append((self._n_raw, logprob))
        self._n_raw += len(logprob.raw)

    @property
    def waiting(self) -> bool:
        """Whether there is one that has been shown in part, at least."""
        return bool(self._waiting) and self._waiting[0][0] < self._n_shown

    def take(self, text: str, *, ended: bool = False) -> tuple[TokenLogprob, ...]:
        """The tokens that are shown whole with this text; at the end, those shown in part, too."""
        # Of bytes that are no UTF-8 more is shown than there was: a token is then a little early.
        self._n_shown += len(text.encode())
        taken = []
        while self._waiting:
            start, logprob = self._waiting[0]
            end = start + (1 if ended else len(logprob.raw))
            if end > self._n_shown:
                break
            taken.append(logprob)
            self._waiting.popleft()
        return tuple(taken)
