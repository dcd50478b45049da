"""The jobs: seeded requests of random tokens, and the cells they are run in."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

SEED = 20261104
_FIRST_TOKEN = 300  # below are bytes and control tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One request: greedy, exactly `n_out` tokens whatever they are."""

    prompt: tuple[int, ...]
    n_out: int

    @property
    def n_cells(self) -> int:
        """Cells that the whole of it needs; the last token is never fed."""
        return len(self.prompt) + self.n_out - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Requests that are all in flight at once."""

    name: str
    items: tuple[Item, ...]
    n_ctx: int  # cells in all
    n_prefix: int = 0  # leading tokens that all prompts share

    @property
    def distinct_tokens(self) -> int:
        """Prompt tokens behind different beginnings: nobody can prefill fewer."""
        seen: set[tuple[int, ...]] = set()
        count = 0
        for item in self.items:
            shared = _longest_seen(item.prompt, seen, self.n_prefix)
            count += len(item.prompt) - shared
            seen.update(item.prompt[:end] for end in range(shared + 1, len(item.prompt) + 1))
        return count

    @property
    def prompt_tokens(self) -> int:
        return sum(len(item.prompt) for item in self.items)

    @property
    def output_tokens(self) -> int:
        return sum(item.n_out for item in self.items)

    @property
    def longest(self) -> int:
        return max(item.n_cells for item in self.items)


def _longest_seen(prompt: tuple[int, ...], seen: set[tuple[int, ...]], start: int) -> int:
    """How much of a prompt another one begins with, too; `start` saves looking at a prefix."""
    length = start if prompt[:start] in seen else 0
    while length < len(prompt) and prompt[: length + 1] in seen:
        length += 1
    return length


def shared(n_requests: int, n_ctx: int, n_vocab: int) -> Job:
    """1,024 shared tokens before 32 own ones, 16 out."""
    dice = random.Random(SEED)
    prefix = _tokens(dice, 1024, n_vocab)
    items = [Item(prompt=prefix + _tokens(dice, 32, n_vocab), n_out=16) for _ in range(n_requests)]
    return Job(name="shared", items=tuple(items), n_ctx=n_ctx, n_prefix=len(prefix))


def mixed(n_requests: int, n_ctx: int, n_vocab: int) -> Job:
    """No shared prefix; 16 to 512 tokens in, 8 to 128 out."""
    dice = random.Random(SEED)
    items = [
        Item(prompt=_tokens(dice, dice.randint(16, 512), n_vocab), n_out=dice.randint(8, 128))
        for _ in range(n_requests)
    ]
    return Job(name="mixed", items=tuple(items), n_ctx=n_ctx)


def pressure(n_requests: int, n_ctx: int, n_vocab: int, times: int = 4) -> Job:
    """Short prompts and long answers: all can begin, the ends need `times` the cells."""
    dice = random.Random(SEED)
    prompts = [_tokens(dice, dice.randint(24, 96), n_vocab) for _ in range(n_requests)]
    room = times * n_ctx - sum(map(len, prompts)) + n_requests
    lengths = _parts(dice, room, n_requests)
    items = [Item(prompt=p, n_out=n) for p, n in zip(prompts, lengths, strict=True)]
    return Job(name="pressure", items=tuple(items), n_ctx=n_ctx)


def _tokens(dice: random.Random, count: int, n_vocab: int) -> tuple[int, ...]:
    return tuple(dice.randrange(_FIRST_TOKEN, n_vocab - _FIRST_TOKEN) for _ in range(count))


def _parts(dice: random.Random, total: int, count: int) -> Sequence[int]:
    """`count` numbers within a third of their mean, and `total` in sum."""
    mean = total // count
    parts = [dice.randint(mean - mean // 3, mean + mean // 3) for _ in range(count)]
    excess = sum(parts) - total
    for index in range(count):
        step = excess // (count - index)
        parts[index] -= step
        excess -= step
    return parts
