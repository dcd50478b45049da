"""What one request knows for its drafts: its guesses, and how many of them came true. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from loadmaster.scheduler.lookup import Lookup

# A draft model is not asked for guesses that are not fed: it gets a chance at a request's start,
# and after so many tokens again.
CHANCE_TOKENS = 64
_FADE = 0.8  # of what is known with every guess: about the last five count


@dataclass(slots=True)
class Record:
    """How guesses did, each up to its first wrong token. Begins with a guess of its own: 2 in 3."""

    right: float = 1.0
    wrong: float = 0.5

    @property
    def share(self) -> float:
        """The chance of a token to be right if those before it were."""
        return self.right / (self.right + self.wrong)

    def note(self, n_right: int, n_guessed: int) -> None:
        """Of a guess of so many tokens, so many came true before one did not."""
        self.right = self.right * _FADE + n_right
        self.wrong = self.wrong * _FADE + (n_right < n_guessed)


class Guesses:
    """A request's guesses; a guess that was not fed is compared with what came, too."""

    __slots__ = ("lookup", "n_idle", "open", "record")

    def __init__(self, tokens: Sequence[int]) -> None:
        """`tokens`: the request's own list."""
        self.lookup = Lookup(tokens)
        self.record = Record()
        self.open: Sequence[int] = ()  # at what the step under way samples
        self.n_idle = CHANCE_TOKENS  # tokens since something was guessed

    def note(self, sampled: Sequence[int]) -> None:
        """These tokens came: how much of the open guess was right?"""
        guess, self.open = self.open[: len(sampled)], ()
        self.n_idle = 0 if guess else self.n_idle + len(sampled)
        if guess:
            self.record.note(n_agreeing(guess, sampled), len(guess))


def n_agreeing(guess: Sequence[int], tokens: Sequence[int]) -> int:
    """How many leading tokens are the same."""
    for n, (one, other) in enumerate(zip(guess, tokens, strict=False)):
        if one != other:
            return n
    return min(len(guess), len(tokens))
