"""The bytes of tokens, by both ways in which tokenizers write them."""

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from loadmaster.engine.backends.transformers.pieces import token_pieces
from loadmaster.engine.backends.transformers.vocabulary import Vocabulary
from loadmaster.errors import EngineRefusedError
from tests.hf_parts import write_llama


def sentencepiece() -> Tokenizer:
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), ("▁Hello", -1.0), ("▁", -2.0), ("wörld", -1.5)]
    vocabulary += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return tokenizer


@pytest.mark.parametrize("text", ["Hello wörld", "Hello 🙂\n"])
def test_marked_spaces_and_bytes_that_no_token_has(text: str) -> None:
    tokenizer = sentencepiece()
    pieces = token_pieces(tokenizer, {1: "<s>"})
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    assert b"".join(pieces[token] for token in tokens).decode() == " " + text
    assert pieces[1] == b"<s>"


def test_every_byte_has_a_token_of_a_byte_level_tokenizer(tmp_path: Path) -> None:
    vocabulary = Vocabulary(write_llama(tmp_path))
    assert sorted(vocabulary.piece(token) for token in range(256)) == [
        bytes([byte]) for byte in range(256)
    ]
    text = "naïve 🙂\ttext"
    tokens = vocabulary.tokenize(text, False, False)
    assert b"".join(map(vocabulary.piece, tokens)).decode() == text


def test_special_tokens_are_parsed_when_asked(tmp_path: Path) -> None:
    vocabulary = Vocabulary(write_llama(tmp_path))
    assert vocabulary.tokenize("<|im_end|>", False, True) == [257]
    assert len(vocabulary.tokenize("<|im_end|>", False, False)) == len("<|im_end|>")
    assert vocabulary.tokenize("a", True, False)[0] == 256
    assert (vocabulary.piece(257), vocabulary.piece(257, special=True)) == (b"", b"<|im_end|>")
    assert vocabulary.piece(100_000) == b""
    told = vocabulary.describe()
    assert (told.bos_text, told.eos_text, told.add_bos) == ("<|bos|>", "<|im_end|>", True)
    assert told.eog_tokens == (257,)


def test_merges_of_a_metaspace_tokenizer_are_not_taken_for_bytes() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"▁a": 0, "é": 1}, merges=[]))
    tokenizer.decoder = decoders.Metaspace()
    assert token_pieces(tokenizer, {}) == [b" a", "é".encode()]


def test_a_tokenizer_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(EngineRefusedError, match=r"tokenizer\.json cannot be read"):
        Vocabulary(tmp_path)
