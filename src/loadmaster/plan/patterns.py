"""Short regexes for sets of layer numbers, for the engine's tensor overrides.

The engine compiles every pattern again for every tensor (std::regex), and a bracket expression
costs it more than anything else: 0.44 of the 0.49 s of one dry run of a 126-layer model. So a whole
decade is `.` (between the dots of a tensor's name there are only digits) and a part of one is an
alternation of its digits.
"""

from collections.abc import Iterable, Sequence

_DECADE = 10


def number_regex(numbers: Iterable[int]) -> str:
    """A short regex for exactly these numbers, as the whole text: 0…12 is `.|1(0|1|2)`."""
    last_digits: dict[int, set[int]] = {}
    for number in numbers:
        last_digits.setdefault(number // 10, set()).add(number % 10)
    prefixes: dict[str, list[int]] = {}
    for prefix, digits in sorted(last_digits.items()):
        prefixes.setdefault(_any_of(digits), []).append(prefix)
    return "|".join(_prefixed(found, digits) for digits, found in prefixes.items())


def _prefixed(prefixes: Sequence[int], digits: str) -> str:
    longer = [prefix for prefix in prefixes if prefix]
    if not longer:
        return digits
    optional = len(longer) < len(prefixes)
    head = number_regex(longer)
    if not _is_one_piece(head) and (optional or "|" in head):
        head = f"({head})"
    return head + ("?" if optional else "") + digits


def _is_one_piece(regex: str) -> bool:
    """One character, or one group without groups inside."""
    return len(regex) == 1 or (regex.startswith("(") and regex.find(")") == len(regex) - 1)


def _any_of(digits: set[int]) -> str:
    """`7`, `(3|4)`, or `.` for all ten."""
    if len(digits) == _DECADE:
        return "."
    ordered = sorted(digits)
    if len(ordered) == 1:
        return str(ordered[0])
    return f"({'|'.join(map(str, ordered))})"
