"""What is asked: seeded texts of a given number of tokens."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.batching.jobs import Item, Job
from loadmaster.engine.builds import find_build
from loadmaster.engine.process import Engine

SEED = 20261121
Tokenize = Callable[[Sequence[str]], list[list[int]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request: a text, and exactly so many tokens of answer."""

    text: str
    n_out: int


class Texts:
    """Makes texts by number of tokens, with the tokenizer of one model."""

    def __init__(self, path: Path, seed: int = SEED) -> None:
        self._dice = random.Random(seed)
        with Engine.start(find_build()) as engine:
            engine.open_vocabulary(path)
            sample = self._words(200)
            self._tokens_per_word = len(engine.tokenize(sample, False)) / 200

    def text(self, n_tokens: int) -> str:
        """Of about so many tokens."""
        return self._words(max(1, round(n_tokens / self._tokens_per_word)))

    def _words(self, count: int) -> str:
        return "".join(f" {self._dice.randrange(1000, 100_000)}" for _ in range(count))

    def mixed(self, count: int, prompt: tuple[int, int], out: tuple[int, int],
              prefix: str = "") -> list[Asked]:  # fmt: skip
        """Prompts and answers of lengths drawn from two ranges, each after the same prefix."""
        dice = self._dice
        return [
            Asked(text=prefix + self.text(dice.randint(*prompt)), n_out=dice.randint(*out))
            for _ in range(count)
        ]


def distinct_tokens(path: Path, asked: Sequence[Asked]) -> int:
    """Prompt tokens behind different beginnings: nobody can prefill fewer."""
    with Engine.start(find_build()) as engine:
        vocabulary = engine.open_vocabulary(path)
        prompts = engine.tokenize_many([(each.text, vocabulary.add_bos) for each in asked])
    items = tuple(Item(prompt=tuple(tokens), n_out=1) for tokens in prompts)
    return Job(name="serve", items=items, n_ctx=0).distinct_tokens
