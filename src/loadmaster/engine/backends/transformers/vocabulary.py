"""A checkpoint's tokenizer: tokenizer.json through the tokenizers library, its special tokens by
the files beside it."""

import json
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loadmaster.engine.backends.transformers.pieces import n_tokens, token_pieces
from loadmaster.engine.types import LoadedModel
from loadmaster.errors import EngineRefusedError, UsageError
from loadmaster.units import MIB

_TOKENIZER = "tokenizer.json"
_MAX_BYTES = 256 * MIB
_MAX_CONFIG_BYTES = 16 * MIB
# Tokens by which models end their turn, whatever their files say (llama.cpp knows them by text).
_ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>",
    "<|end_of_text|>", "<|return|>", "<EOT>", "_<EOT>", "<|END_OF_TURN_TOKEN|>",
)  # fmt: skip
_FIM = {
    "fim_prefix": ("<|fim_prefix|>", "<fim_prefix>", "<fim-prefix>", "<PRE>", "▁<PRE>"),
    "fim_suffix": ("<|fim_suffix|>", "<fim_suffix>", "<fim-suffix>", "<SUF>", "▁<SUF>"),
    "fim_middle": ("<|fim_middle|>", "<fim_middle>", "<fim-middle>", "<MID>", "▁<MID>"),
}


class Vocabulary:
    """The tokens of a checkpoint."""

    def __init__(self, folder: Path) -> None:
        """Raises EngineRefusedError: there is no tokenizer.json, or it cannot be read."""
        self._tokenizer = _open(folder / _TOKENIZER)
        self._lock = threading.Lock()
        self._settings = {
            name: _json(folder / f"{name}.json")
            for name in ("tokenizer_config", "generation_config", "config")
        }
        self.n_tokens = n_tokens(self._tokenizer)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {token for token, one in added.items() if one.special}
        self._pieces = token_pieces(self._tokenizer, {t: one.content for t, one in added.items()})
        self.bos, self.eos = self._named("bos_token"), self._named("eos_token")
        self.ends = self._find_ends()
        self.adds_bos = self.bos is not None and self.tokenize("", True, False)[:1] == [self.bos]

    def _named(self, name: str) -> int | None:
        """`bos_token` as text in one file, or as a number in the others."""
        text = self._settings["tokenizer_config"].get(name)
        text = text.get("content") if isinstance(text, dict) else text
        found = self._tokenizer.token_to_id(text) if isinstance(text, str) else None
        if found is not None:
            return int(found)
        return next(iter(self._numbered(f"{name}_id")), None)

    def _numbered(self, key: str) -> list[int]:
        found: list[int] = []
        for name in ("generation_config", "config"):
            value = self._settings[name].get(key)
            values = value if isinstance(value, list) else [value]
            found += [one for one in values if type(one) is int and 0 <= one < self.n_tokens]
        return found

    def _find_ends(self) -> frozenset[int]:
        known = [self._tokenizer.token_to_id(text) for text in _ENDS]
        return frozenset(
            token
            for token in (*known, *self._numbered("eos_token_id"), self.eos)
            if token is not None
        )

    # -- text and tokens

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """Tokens of a text."""
        with self._lock:  # prompts are tokenized beside steps, on another thread
            self._tokenizer.encode_special_tokens = not parse_special
            tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special).ids
        return tokens

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of a token; none of a control token unless `special`."""
        if token in self._special and not special:
            return b""
        return self._pieces[token] if 0 <= token < len(self._pieces) else b""

    def grammar_tokenizer(self, n_vocab: int) -> Any:
        """The vocabulary as an `LLTokenizer` of llguidance.

        Raises:
            UsageError: no text of this model can end.
        """
        from llguidance import LLTokenizer

        if not self.ends:
            raise UsageError("the model has no token that ends a text: no schema can be followed")
        slices = LLTokenizer.json_slices()[-1:]
        with self._lock:
            written = self._tokenizer.to_str()
        return LLTokenizer(written, n_vocab=n_vocab, eos_token=sorted(self.ends), slices=slices)

    # -- what is told of it

    def describe(self, **loaded: Any) -> LoadedModel:
        """The part of `LoadedModel` that a vocabulary knows."""
        fields: dict[str, Any] = {"n_ctx": 0, "n_ctx_seq": 0, "n_vocab": self.n_tokens}
        fields |= {name: self._first(texts) for name, texts in _FIM.items()}
        fields |= {"load_s": 0.0} | loaded
        return LoadedModel(
            eog_tokens=tuple(sorted(self.ends)),
            bos_token=self.bos,
            add_bos=self.adds_bos,
            bos_text=self._text(self.bos),
            eos_text=self._text(self.eos),
            **fields,
        )

    def _text(self, token: int | None) -> str:
        return "" if token is None else str(self._tokenizer.id_to_token(token))

    def _first(self, texts: Iterable[str]) -> int | None:
        found = (self._tokenizer.token_to_id(text) for text in texts)
        return next((token for token in found if token is not None), None)


def _open(path: Path) -> Any:
    from tokenizers import Tokenizer

    if not path.is_file():
        raise EngineRefusedError(
            f"there is no {path.name} in `{path.parent}`",
            hint="download it too; other tokenizers (`tokenizer.model`) are not read",
        )
    if path.stat().st_size > _MAX_BYTES:
        raise EngineRefusedError(f"{path.name} is larger than {_MAX_BYTES} bytes")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        reason = " ".join(str(error).split())[:200]
        raise EngineRefusedError(
            f"{path.name} cannot be read: {reason}", hint=f"download {path.name} again"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _json(path: Path) -> Mapping[str, Any]:
    """An object, empty where there is none that can be read: it only names tokens."""
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            return {}
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
