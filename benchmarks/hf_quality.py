"""What quantization costs: the demo model in NF4, FP4 and INT8 beside itself in bf16.

    python -m benchmarks.hf_quality [--mode nf4 …] [--tokens N]

The model is loaded as the transformers engine loads it for `run`, once for each mode, and reads
text that its training did not see (docs/demo-model.md): of every source that was held out the first
256 tokens of its code, of its documentation and of conversations about it, fed in steps of n_ubatch
as prompts are. At every token its probabilities are compared with those of bf16. Rows `f32` and
`bf16 again` say what rounding alone does, and that comparing adds nothing.

Intervals are 95 %, by 2000 bootstrap resamples of whole sources (a file, and all text made from
it). Logits of bf16 are kept meanwhile: 8 KiB a token. The last line is one JSON object.
"""

import argparse
import hashlib
import json
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.divergence import Compared, Vector, compare, intervals
from loadmaster.engine.backends.transformers.environment import prepare
from loadmaster.engine.types import SequenceWork
from loadmaster.machine.detect import detect_machine
from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.model.hf_source import read_checkpoint
from loadmaster.plan.budget import make_budget
from loadmaster.plan.hf_planner import plan_checkpoint
from loadmaster.plan.hf_weights import loaded_tensors
from loadmaster.plan.overhead import default_overheads
from loadmaster.plan.types import Knobs, Plan, Quantize, TransformersSettings, Workload
from scripts.demo_model.corpus import Document, build_corpus

DEMO = Path(__file__).parents[1] / "tests" / "data" / "demo"
N_TOKENS = 256  # more of the same source tell less than other sources would
N_CTX = 1024
N_RESAMPLES = 2000
SEED = 6
MODES: Mapping[str, tuple[Quantize, bool]] = {
    "bf16 again": ("none", False), "f32": ("none", False), "int8": ("int8", False),
    "nf4": ("nf4", False), "nf4-double": ("nf4", True),
    "fp4": ("fp4", False), "fp4-double": ("fp4", True),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Tokens in a row, each but the last a place where the next one is guessed."""

    source: str
    tokens: tuple[int, ...]
    n_bytes: int  # of the tokens that are guessed


def main(argv: list[str] | None = None) -> int:
    """Compare every mode with bf16; 1 when bf16 differs from itself."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", action="append", choices=list(MODES))
    parser.add_argument(
        "--tokens", type=int, default=N_TOKENS, choices=range(1, N_CTX + 1), metavar="N",
        help="of each source and kind of text, 1 to 1024; default: %(default)s",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    prepare()
    model = read_checkpoint(DEMO)
    windows = held_out(arguments.tokens)
    reference = list(logits_of(model, settings_for(model, "bf16 again"), windows))
    rows = {}
    for mode in arguments.mode or MODES:
        rows[mode] = judge(model, mode, windows, reference)
        print(mode, json.dumps(rows[mode]), flush=True)
    again = rows.get("bf16 again", {"kl": [0.0]})["kl"][0]
    print(json.dumps({
        "benchmark": "hf_quality", "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(), **_versions(), **_text_read(windows),
        "reference": "bf16", "level": 0.95, "n_resamples": N_RESAMPLES, "seed": SEED,
        "tokens_of_each": arguments.tokens,
        "modes": rows, "seconds": round(time.monotonic() - started, 1),
        "failed": ["bf16 differs from itself"] if again else [],
    }))  # fmt: skip
    return 1 if again else 0


# ---- the text


def held_out(n_tokens: int) -> list[Window]:
    """The beginnings of what was kept from the training, those of a source together."""
    from loadmaster.engine.backends.transformers.vocabulary import Vocabulary

    vocabulary = Vocabulary(DEMO)
    documents = sorted(
        (document for document in build_corpus() if document.held_out),
        key=lambda document: (document.unit, document.kind),
    )
    return [
        window
        for _, group in groupby(documents, key=lambda document: (document.unit, document.kind))
        for window in beginnings(group, vocabulary, n_tokens)
    ]


def beginnings(documents: Iterable[Document], vocabulary: Any, room: int) -> Iterator[Window]:
    """Texts until `room` tokens are guessed: code is one text, conversations are many."""
    for document in documents:
        guessed = vocabulary.tokenize(document.text, False, True)[:room]
        room -= len(guessed)
        n_bytes = sum(len(vocabulary.piece(token, special=True)) for token in guessed)
        if guessed:  # an end-of-text token is what precedes a document
            yield Window(source=document.unit, tokens=(0, *guessed), n_bytes=n_bytes)


def _text_read(windows: Sequence[Window]) -> dict[str, Any]:
    """Which text it was: another Python has another library."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(np.array(window.tokens, "<i4").tobytes())
    return {
        "n_sources": len({window.source for window in windows}),
        "n_tokens": sum(len(window.tokens) - 1 for window in windows),
        "n_bytes": sum(window.n_bytes for window in windows),
        "tokens_sha256": digest.hexdigest()[:16],
    }


# ---- the model


def settings_for(model: CheckpointSpec, mode: str) -> TransformersSettings:
    """As planned for this machine's CPU."""
    quantize, double = MODES[mode]
    machine = replace(detect_machine(), gpus=())
    outcome = plan_checkpoint(
        machine, model, Workload(n_ctx=N_CTX), make_budget(machine),
        Knobs(quantize=quantize, double_quant=double), default_overheads(()), alternatives=False,
    )  # fmt: skip
    assert isinstance(outcome, Plan), outcome
    settings = outcome.engine
    assert isinstance(settings, TransformersSettings)
    if mode == "f32":
        return replace(settings, compute_type="f32", type_k="f32", type_v="f32")
    assert settings.compute_type == "bf16", settings
    return settings


def logits_of(
    model: CheckpointSpec, settings: TransformersSettings, windows: Sequence[Window]
) -> Iterator[Any]:
    """For each window a tensor (token, vocabulary), of the type that the model computes in."""
    import torch

    from loadmaster.engine.backends.transformers.opened import OpenModel
    from loadmaster.engine.backends.transformers.packing import PackedStep
    from loadmaster.engine.backends.transformers.weights import load_weights

    class EveryRow(PackedStep):
        """A step whose logits are wanted at every token, not at the last alone."""

        def __init__(self, work: SequenceWork) -> None:
            super().__init__([work])
            self._rows = list(range(len(work.tokens)))

    torch.set_num_threads(settings.n_threads)
    opened = OpenModel(load_weights(model, settings, lambda _: None), model, settings)
    for window in windows:
        opened.slots.clear()
        rows = []
        for start in range(0, len(window.tokens) - 1, settings.n_ubatch):
            part = window.tokens[start : min(start + settings.n_ubatch, len(window.tokens) - 1)]
            opened.slots.begin(0, start + len(part))
            work = SequenceWork(seq_id=0, tokens=part, position=start, sample=True)
            rows.append(opened.logits(EveryRow(work)))
            opened.slots.written(0, start + len(part))
        yield torch.cat(rows)
    opened.close()


def judge(
    model: CheckpointSpec, mode: str, windows: Sequence[Window], reference: Sequence[Any]
) -> dict[str, Any]:
    """One mode's figures, each with the ends of its interval, and what its weights take."""
    settings = settings_for(model, mode)
    pairs = zip(windows, reference, logits_of(model, settings, windows), strict=True)
    judged = [
        (window, compare(_numbers(p), _numbers(q), window.tokens[1:])) for window, p, q in pairs
    ]
    found = intervals(list(by_source(judged)), n_resamples=N_RESAMPLES, seed=SEED)
    divergences = np.concatenate([compared.divergence for _, compared in judged])
    return {
        **{name: [_short(value) for value in values] for name, values in found.items()},
        "kl_median": _short(float(np.median(divergences))),
        "kl_p99": _short(float(np.quantile(divergences, 0.99))),
        "model_bytes": sum(tensor.size_bytes for tensor in loaded_tensors(model, settings)),
    }


def by_source(judged: Sequence[tuple[Window, Compared]]) -> Iterator[Vector]:
    """The sums of each source, whose windows follow each other."""
    for _, group in groupby(judged, key=lambda pair: pair[0].source):
        yield np.sum([compared.sums(window.n_bytes) for window, compared in group], axis=0)


def _numbers(logits: Any) -> Any:
    return logits.float().numpy()


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "bitsandbytes")}


if __name__ == "__main__":
    raise SystemExit(main())
