"""Short regexes for sets of layer numbers, for the engine's tensor overrides."""

from collections.abc import Iterable, Sequence


def number_regex(numbers: Iterable[int]) -> str:
    """A short regex for exactly these numbers: 0…66 is `[1-5]?[0-9]|6[0-6]`."""
    last_digits: dict[int, set[int]] = {}
    for number in numbers:
        last_digits.setdefault(number // 10, set()).add(number % 10)
    prefixes: dict[str, list[int]] = {}
    for prefix, digits in sorted(last_digits.items()):
        prefixes.setdefault(_digit_class(digits), []).append(prefix)
    return "|".join(_prefixed(found, digits) for digits, found in prefixes.items())


def _prefixed(prefixes: Sequence[int], digits: str) -> str:
    longer = [prefix for prefix in prefixes if prefix]
    if not longer:
        return digits
    head = number_regex(longer)
    if "|" in head or (len(longer) < len(prefixes) and not head.startswith("[") and len(head) > 1):
        head = f"({head})"
    return head + ("?" if len(longer) < len(prefixes) else "") + digits


def _digit_class(digits: set[int]) -> str:
    """`7`, `[3-7]` or `[0257]`."""
    ordered = sorted(digits)
    if len(ordered) == 1:
        return str(ordered[0])
    if ordered[-1] - ordered[0] == len(ordered) - 1:
        return f"[{ordered[0]}-{ordered[-1]}]"
    return f"[{''.join(map(str, ordered))}]"
