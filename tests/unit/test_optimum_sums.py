"""The benchmark's optimiser rests on exact subset sums: here against brute force."""

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.accuracy.subsets import SubsetSums

_kinds = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=4
)


@given(_kinds, st.integers(-5, 300))
def test_the_most_that_fits_is_found(kinds: list[tuple[int, int, int]], room: int) -> None:
    sizes = [128 * size for size, _, _ in kinds]
    ranges = [(least, least + more) for _, least, more in kinds]
    found = SubsetSums(sizes, ranges).most(128 * room)
    sums = [
        sum(n * size for n, size in zip(counts, sizes, strict=True))
        for counts in product(*(range(least, most + 1) for least, most in ranges))
    ]
    fitting = [total for total in sums if total <= 128 * room]
    if found is None:
        assert not fitting
        return
    assert all(a <= n <= b for n, (a, b) in zip(found, ranges, strict=True))
    assert sum(n * size for n, size in zip(found, sizes, strict=True)) == max(fitting)
