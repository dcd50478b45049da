"""The tokenizer's values: enough that the engine neither aborts nor reads past a table."""

from array import array
from collections.abc import Mapping
from math import isfinite

from loadmaster.model import gguf
from loadmaster.model.cursor import F32, I32
from loadmaster.model.fields import Fields, article

_NO_TOKEN = 0xFFFFFFFF  # -1 as u32: converters write it for "none"

# The ids that the engine uses when the file names none (llama_vocab::impl::load).
_DEFAULT_IDS: Mapping[str, Mapping[str, int]] = {
    "llama": {"bos": 1, "eos": 2},
    "gpt2": {"bos": 11, "eos": 11},
    "bert": {"bos": 101},
    "t5": {"eos": 1},
    "plamo2": {"bos": 1, "eos": 2},
}
_NO_DEFAULT_BOS = frozenset({"chatglm-bpe", "glm4", "glm5"})


def check_tokenizer(fields: Fields) -> None:
    header = fields.header
    model = header.metadata.get("tokenizer.ggml.model")
    if model in (None, "none", "no_vocab"):
        return
    tokens_entry = fields.entry(gguf.TOKENS)
    if tokens_entry is None or header.tokens is None:
        found = "missing" if tokens_entry is None else article(tokens_entry.type_name)
        raise fields.wrong(gguf.TOKENS, found, "an array of string", code="bad_tokenizer")
    if header.tokens.count == 0 or header.tokens.all_empty:
        raise fields.wrong(gguf.TOKENS, "empty", "at least one token", code="bad_tokenizer")
    if model == "llama" and header.tokens.unspelled_bytes:
        raise fields.wrong(
            gguf.TOKENS, f"without {header.tokens.unspelled_bytes} of the 256 byte tokens",
            "with `<0x00>` to `<0xFF>`", code="bad_tokenizer",
        )  # fmt: skip
    if header.n_bad_merges and model in ("gpt2", "gemma4"):
        raise fields.wrong(
            gguf.MERGES, f"with {header.n_bad_merges} entries that are not pairs", "two words each",
            code="bad_tokenizer",
        )  # fmt: skip
    _check_tables(fields, header.tokens.count)
    _check_special_tokens(fields, str(model), header.tokens.count)


def _check_tables(fields: Fields, n_vocab: int) -> None:
    """Scores and token types: one for each token, of the type that the engine casts to."""
    for name, types, letters in (
        ("scores", (F32, I32), "fi"),
        ("token_type", (I32,), "i"),
    ):
        key = f"tokenizer.ggml.{name}"
        entry = fields.entry(key)
        if entry is None:
            continue
        if not entry.is_array or entry.type not in types:
            allowed = " or ".join(f"array of {gguf.TYPE_NAMES[one]}" for one in types)
            raise fields.wrong(key, article(entry.type_name), allowed, code="bad_tokenizer")
        if entry.count < n_vocab:
            raise fields.wrong(
                key, f"{entry.count} numbers", f"one for each of {n_vocab} tokens",
                code="bad_tokenizer",
            )  # fmt: skip
        numbers = array(letters[types.index(entry.type)], fields.header.tables.get(key, b""))
        if entry.type == F32:
            if not all(map(isfinite, numbers)):
                raise fields.wrong(key, "not finite", "finite numbers", code="bad_tokenizer")
        elif (
            name == "token_type"
            and not 0 <= min(numbers, default=0) <= max(numbers, default=0) <= 6
        ):
            worst = min(numbers) if min(numbers) < 0 else max(numbers)
            raise fields.wrong(key, worst, "0–6", code="bad_tokenizer")
    charsmap = fields.entry("tokenizer.ggml.precompiled_charsmap")
    if charsmap is not None and charsmap.count < 4:
        raise fields.wrong(
            "tokenizer.ggml.precompiled_charsmap", f"{charsmap.count} bytes", "at least 4 bytes",
            code="bad_tokenizer",
        )  # fmt: skip


def _check_special_tokens(fields: Fields, model: str, n_vocab: int) -> None:
    """Ids beyond the vocabulary are damage, except those that converters write for "none".

    A padding or mask id past the end is common in files in use, and the engine drops it.
    """
    valid: dict[str, bool] = {}
    for name in ("bos", "eos", "eot", "eom", "unknown"):
        key = f"tokenizer.ggml.{name}_token_id"
        number = fields.integer(key, 0, _NO_TOKEN)
        if number is not None and number != _NO_TOKEN and number >= n_vocab:
            raise fields.wrong(key, number, f"0–{n_vocab - 1}", code="bad_tokenizer")
        default = _DEFAULT_IDS.get(model, {}).get(name, n_vocab)
        if name == "bos" and fields.metadata.get("tokenizer.ggml.pre") in _NO_DEFAULT_BOS:
            default = n_vocab
        valid[name] = (n_vocab if number is None or number == _NO_TOKEN else number) < n_vocab or (
            default < n_vocab
        )
    for name in ("bos", "eos"):
        key = f"tokenizer.ggml.add_{name}_token"
        if fields.metadata.get(key) is True and not valid[name]:  # an assertion of tokenize()
            raise fields.wrong(key, "true", f"false, as there is no {name} token")
