"""The tokens of a checkpoint in their order, from `tokenizer.json`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loadmaster.model.damage import damaged
from loadmaster.units import MIB

TOKENIZER = "tokenizer.json"
_MAX_BYTES = 64 * MIB  # the largest in use have about 35
_MOST_GAPS = 4  # numbers for each token


def checkpoint_tokens(folder: Path) -> list[str]:
    """All tokens by their number, empty where a number has none; none without such a file.

    Raises:
        DamagedFileError: the file is no tokenizer.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        return []
    with path.open("rb") as file:
        raw = file.read(_MAX_BYTES + 1)
    if len(raw) > _MAX_BYTES:
        raise damaged("bad_tokenizer", TOKENIZER, "its size", "more", f"up to {_MAX_BYTES} bytes")
    try:
        numbers = _numbers(json.loads(raw))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise damaged(
            "bad_tokenizer", TOKENIZER, "its vocabulary", type(error).__name__, "tokens and numbers"
        ) from None
    if not numbers or min(numbers) < 0 or max(numbers) >= _MOST_GAPS * len(numbers):
        raise damaged("bad_tokenizer", TOKENIZER, "its numbers", "gaps", "0, 1, 2 …")
    return [numbers.get(number, "") for number in range(max(numbers) + 1)]


def _numbers(document: Mapping[str, Any]) -> dict[int, str]:
    """Of the model's vocabulary, a table or Unigram's list of tokens with scores; and what was
    added to it."""
    vocabulary = document["model"]["vocab"]
    if isinstance(vocabulary, dict):
        numbers = {int(number): str(token) for token, number in vocabulary.items()}
    else:
        numbers = {number: str(row[0]) for number, row in enumerate(vocabulary)}
    added = document.get("added_tokens") or []
    return numbers | {int(one["id"]): str(one["content"]) for one in added}
