"""The tokenizer's list of tokens: judged while it streams past, never kept.

llama.cpp aborts on two equal tokens (GGML_ASSERT in llama_vocab::impl::load) and on a
SentencePiece vocabulary that cannot spell a byte (an uncaught `unordered_map::at` in
llama_vocab::byte_to_token); both were seen on the engine of llama-cpp-python 0.3.36.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from loadmaster.model.damage import damaged, quoted
from loadmaster.units import MIB

MAX_BYTES = 16 * MIB  # of all tokens; the largest vocabulary in use has about 3 MiB
_BYTE_NAMES = tuple(f"<0x{byte:02X}>".encode() for byte in range(256))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What is remembered of `tokenizer.ggml.tokens`."""

    count: int
    all_empty: bool
    unspelled_bytes: int  # of 256, those with neither `<0xNN>` nor themselves as a token


def judge_tokens(batches: Iterable[list[bytes]], *, label: str, offset: int) -> Tokens:
    """Consume the tokens in batches.

    Raises:
        DamagedFileError: two tokens are equal. Empty ones are not compared: the engine names
            them `[EMPTY_n]`.
    """
    seen: set[bytes] = set()
    count = n_distinct = n_bytes = 0
    for batch in batches:
        count += len(batch)
        n_bytes += sum(map(len, batch))
        if n_bytes > MAX_BYTES:
            raise damaged(
                "length_out_of_bounds", label, "tokenizer.ggml.tokens", f"over {n_bytes} bytes",
                f"up to {MAX_BYTES}", offset=offset,
            )  # fmt: skip
        words = _as_engine_reads(batch)
        n_distinct += len(words)
        seen.update(words)
        if len(seen) != n_distinct:
            raise damaged(
                "bad_tokenizer", label, "tokenizer.ggml.tokens", _repeated(words), "each once",
                offset=offset,
            )  # fmt: skip
    unspelled = sum(
        name not in seen and bytes([byte]) not in seen for byte, name in enumerate(_BYTE_NAMES)
    )
    return Tokens(count=count, all_empty=not seen, unspelled_bytes=unspelled)


def _as_engine_reads(batch: list[bytes]) -> list[bytes]:
    """Tokens as C strings, cut at a NUL, without the empty ones."""
    if any(b"\0" in token for token in batch):
        batch = [token.partition(b"\0")[0] for token in batch]
    return [token for token in batch if token] if b"" in batch else batch


def _repeated(words: list[bytes]) -> str:
    twice = next((word for word, n in Counter(words).items() if n > 1), None)
    return "a list with a token twice" if twice is None else f"a list with {quoted(twice)} twice"
