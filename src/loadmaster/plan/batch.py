"""A job's outline: how many items, how long their prompts and answers are, and what they share.

Shared means leading tokens that another item of the job has too: a radix tree over all prompts
holds them once, and so they are prefilled once.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

# Items are listed one by one up to this many; more are gathered into classes.
LISTED_ITEMS = 1024
# Lengths in one class differ by less than this factor.
_CLASS_WIDTH = 1.1

Lengths = Literal["exact", "sample", "characters"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemClass:
    """Items of equal lengths."""

    count: int
    prompt_tokens: int  # of one item, with what it shares
    output_tokens: int
    shared_tokens: int = 0  # leading tokens that another item has too

    @property
    def own_tokens(self) -> int:
        """Tokens of the prompt that no other item has."""
        return self.prompt_tokens - self.shared_tokens

    @property
    def cells(self) -> int:
        """Cells of the item's own at its end."""
        return self.own_tokens + self.output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOutline:
    """An outline of all items, in the order in which they are to be run. Without any tokens to
    generate it is a job of embeddings.

    `mixed`: the order is not known in detail, items of all classes come mixed. `lengths` says
    whether every item was tokenized, or a sample stands for all, or characters stand for tokens.
    """

    classes: tuple[ItemClass, ...]
    prefix_tokens: int = 0  # of all shared prefixes, each counted once
    mixed: bool = False
    lengths: Lengths = "exact"

    @property
    def n_items(self) -> int:
        return sum(it.count for it in self.classes)

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts, shared tokens counted for every item."""
        return sum(it.count * it.prompt_tokens for it in self.classes)

    @property
    def output_tokens(self) -> int:
        return sum(it.count * it.output_tokens for it in self.classes)

    @property
    def distinct_tokens(self) -> int:
        """Prompt tokens that must be prefilled: those of a radix tree over all prompts."""
        return self.prefix_tokens + sum(it.count * it.own_tokens for it in self.classes)

    @property
    def longest(self) -> int:
        """Tokens of the longest item, prompt and answer."""
        return max((it.prompt_tokens + it.output_tokens for it in self.classes), default=0)

    @property
    def shared_tokens(self) -> float:
        """Leading tokens that an item shares, in the mean."""
        return sum(it.count * it.shared_tokens for it in self.classes) / max(1, self.n_items)

    def prefix_cells(self, n_running: float) -> float:
        """Cells of the prefixes that so many items at once share. Items of one prefix run
        together: a window over the sorted prompts holds one shared part, and its share of the rest.
        """
        if n_running <= 0:
            return 0.0
        more = (n_running - 1) * self.prefix_tokens / max(1, self.n_items)
        return min(float(self.prefix_tokens), self.shared_tokens + more)

    def cells(self, n_running: int) -> int:
        """Cells that so many items at once take at their ends, in the mean."""
        own = sum(it.count * it.cells for it in self.classes) / max(1, self.n_items)
        return int(self.prefix_cells(n_running) + n_running * own)


def outline_of(
    items: Iterable[tuple[Sequence[int], int]], *, lengths: Lengths = "exact", times: float = 1.0
) -> JobOutline:
    """The outline of a job from its prompts in tokens and the tokens of their answers.

    Each item of a sample stands for `times` items; the tokens of shared prefixes go on growing as
    they did over the sample's second half.
    """
    listed = list(items)
    shared, prefix_tokens = _sharing([prompt for prompt, _ in listed])
    alike = [
        ItemClass(
            count=1, prompt_tokens=len(prompt), output_tokens=output, shared_tokens=shared_tokens
        )
        for (prompt, output), shared_tokens in zip(listed, shared, strict=True)
    ]
    if times == 1.0 and len(alike) <= LISTED_ITEMS:
        classes = tuple(_runs(alike))
        return JobOutline(classes=classes, prefix_tokens=prefix_tokens, lengths=lengths)
    if times > 1.0:
        half = _sharing([prompt for prompt, _ in listed[: len(listed) // 2]])[1]
        prefix_tokens += round(2 * (times - 1) * max(0, prefix_tokens - half))
    return JobOutline(
        classes=_gathered(alike, times), prefix_tokens=prefix_tokens, mixed=True, lengths=lengths
    )


def _sharing(prompts: Sequence[Sequence[int]]) -> tuple[list[int], int]:
    """For each prompt the leading tokens that another has too, and the tokens of the radix tree's
    shared part."""
    order = sorted(range(len(prompts)), key=prompts.__getitem__)  # type: ignore[arg-type]
    common = [0, *(_common(prompts[a], prompts[b]) for a, b in pairwise(order)), 0]
    shared = [0] * len(prompts)
    prefix_tokens = 0
    for place, index in enumerate(order):
        # At least one token of every prompt is fed, for its logits.
        most = max(0, len(prompts[index]) - 1)
        shared[index] = min(most, max(common[place], common[place + 1]))
        prefix_tokens += shared[index] - min(most, common[place])
    return shared, prefix_tokens


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _runs(items: Sequence[ItemClass]) -> Iterator[ItemClass]:
    """Neighbours that are alike as one class."""
    begin = 0
    for end in range(1, len(items) + 1):
        if end == len(items) or items[end] != items[begin]:
            yield replace(items[begin], count=end - begin)
            begin = end


def _gathered(items: Sequence[ItemClass], times: float) -> tuple[ItemClass, ...]:
    """Items of similar lengths as one class of their mean lengths."""
    groups: dict[tuple[int, ...], list[ItemClass]] = {}
    for item in items:
        key = (_bin(item.own_tokens), _bin(item.shared_tokens), _bin(item.output_tokens))
        groups.setdefault(key, []).append(item)
    return tuple(_mean(group, times) for _, group in sorted(groups.items()))


def _bin(tokens: int) -> int:
    place = 0
    width = 1.0
    while width < tokens:
        width = max(width + 1, width * _CLASS_WIDTH)
        place += 1
    return place


def _mean(group: Sequence[ItemClass], times: float) -> ItemClass:
    def mean(lengths: Iterable[int]) -> int:
        return round(sum(lengths) / len(group))

    return ItemClass(
        count=max(1, round(len(group) * times)),
        prompt_tokens=mean(it.prompt_tokens for it in group),
        output_tokens=mean(it.output_tokens for it in group),
        shared_tokens=mean(it.shared_tokens for it in group),
    )


def with_outputs(job: JobOutline, share: float) -> JobOutline:
    """The same job where answers take only this share of the tokens they may take."""
    classes = tuple(
        replace(it, output_tokens=max(1, round(it.output_tokens * share)))
        if it.output_tokens
        else it
        for it in job.classes
    )
    return replace(job, classes=classes)


def unshared(job: JobOutline) -> JobOutline:
    """The same job where every item feeds all of its prompt: caches that share no cells."""
    classes = tuple(replace(it, shared_tokens=0) for it in job.classes)
    return replace(job, classes=classes, prefix_tokens=0)
