"""A pattern for layer numbers finds exactly them."""

import re

from hypothesis import given
from hypothesis import strategies as st

from loadmaster.plan.patterns import number_regex

sets = st.one_of(
    st.sets(st.integers(0, 511), min_size=1, max_size=60),
    st.tuples(st.integers(0, 300), st.integers(1, 200)).map(lambda it: {*range(it[0], sum(it))}),
)


@given(sets)
def test_a_pattern_matches_its_numbers_and_no_others(numbers: set[int]) -> None:
    regex = re.compile(f"^({number_regex(numbers)})$")
    assert {number for number in range(600) if regex.search(str(number))} == numbers


def test_an_optional_prefix_of_two_digits() -> None:
    regex = re.compile(f"^({number_regex([5, 135, 235])})$")
    assert [n for n in range(600) if regex.search(str(n))] == [5, 135, 235]


def test_a_run_is_short() -> None:
    assert number_regex(range(67)) == "(1|2|3|4|5)?.|6(0|1|2|3|4|5|6)"
    assert len(number_regex(range(126))) < 90
