"""The bytes that each token of a tokenizer stands for.

Byte-level tokenizers write every byte as a printable character (GPT-2's table); the others write
a space as `▁`, and a byte that no token has as `<0x0A>`.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "▁"


def token_pieces(tokenizer: Any, added: Mapping[int, str]) -> list[bytes]:
    """Of each token by its number; `added` are those that stand for their own text."""
    of_text = _byte_level if _is_byte_level(json.loads(tokenizer.to_str())) else _marked_spaces
    texts = (tokenizer.id_to_token(token) for token in range(n_tokens(tokenizer)))
    return [
        added[token].encode() if token in added else of_text(text or "")
        for token, text in enumerate(texts)
    ]


def n_tokens(tokenizer: Any) -> int:
    """One more than the highest number of a token; some numbers may have none."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def _is_byte_level(settings: Mapping[str, Any]) -> bool:
    """Whether any of its steps maps bytes to characters."""
    steps: list[Any] = [settings.get("decoder"), settings.get("pre_tokenizer")]
    while steps:
        step = steps.pop()
        if isinstance(step, dict):
            if step.get("type") == "ByteLevel":
                return True
            steps += [*(step.get("decoders") or ()), *(step.get("pretokenizers") or ())]
    return False


def _characters() -> dict[str, int]:
    """GPT-2's table: printable bytes are themselves, the others characters from 256 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    table = {chr(byte): byte for byte in plain}
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


_TABLE = _characters()


def _byte_level(text: str) -> bytes:
    if all(character in _TABLE for character in text):
        return bytes(_TABLE[character] for character in text)
    return text.encode()


def _marked_spaces(text: str) -> bytes:
    byte = _BYTE.fullmatch(text)
    if byte:
        return bytes([int(byte[1], 16)])
    return text.replace(_SPACE, " ").encode()
