"""Bits per byte on the files that were held out of the training."""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from scripts.demo_model.corpus import Kind, build_corpus

CONTEXT_TOKENS = 1024
KINDS: tuple[Kind, ...] = ("source", "test", "docs", "chat")

Logits = Callable[[Sequence[int]], npt.NDArray[np.float32]]
Tokenize = Callable[[str], list[int]]


def evaluate(checkpoint: Path | None, gguf: Path | None) -> None:
    """Prints a line for each kind of text, then one JSON object."""
    tokenize, logits = _from_gguf(gguf) if gguf else _from_checkpoint(checkpoint or Path())
    held_out = [document for document in build_corpus() if document.held_out]
    started = time.monotonic()
    n_bit, n_byte = {}, {}
    for kind in KINDS:
        documents = [document for document in held_out if document.kind == kind]
        n_bit[kind] = sum(bits(document.text, tokenize, logits) for document in documents)
        n_byte[kind] = sum(len(document.text.encode()) for document in documents)
        print(
            f"{kind:8} {len(documents):4} texts {n_byte[kind]:8} bytes "
            f"{n_bit[kind] / n_byte[kind]:.3f} bits per byte"
        )
    files: tuple[Kind, ...] = ("source", "test")
    result = {
        "model": (gguf or checkpoint or Path()).name,
        "held_out_file_bytes": sum(n_byte[kind] for kind in files),
        "bits_per_byte": round(sum(n_bit[k] for k in files) / sum(n_byte[k] for k in files), 4),
        "bits_per_byte_by_kind": {kind: round(n_bit[kind] / n_byte[kind], 4) for kind in KINDS},
        "n_ctx": CONTEXT_TOKENS,
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(result))


def bits(text: str, tokenize: Tokenize, logits: Logits) -> float:
    """What the model needs to code `text`, in windows that do not overlap."""
    ids = [0, *tokenize(text)]  # an end-of-text token is what precedes a document
    total = 0.0
    for start in range(0, len(ids) - 1, CONTEXT_TOKENS):
        window = ids[start : start + CONTEXT_TOKENS + 1]
        rows = logits(window[:-1]).astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        chosen = rows[np.arange(len(rows)), window[1:]]
        total += float((np.log(np.exp(rows).sum(axis=1)) - chosen).sum()) / math.log(2)
    return total


def _from_gguf(path: Path) -> tuple[Tokenize, Logits]:
    from scripts.demo_model.libllama import LlamaFile

    model = LlamaFile(path)
    return model.tokenize, model.logits


def _from_checkpoint(folder: Path) -> tuple[Tokenize, Logits]:
    import torch

    from scripts.demo_model.tokenizer import load_tokenizer
    from scripts.demo_model.train import load

    model, _ = load(folder / "checkpoint.pt")
    tokenizer = load_tokenizer(folder / "tokenizer.json")

    def logits(tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        with torch.no_grad():
            rows: npt.NDArray[np.float32] = model(torch.tensor([tokens]))[0].numpy()
        return rows

    return lambda text: list(tokenizer.encode(text).ids), logits
