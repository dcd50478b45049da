"""Training by the clock: the schedule follows the share of the minutes that has passed.

The corpus, the tokenizer and the order of the blocks are the same in every run; the number of
steps is not, since it depends on the machine and on what else it does.
"""

import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from scripts.demo_model.chats import SEED
from scripts.demo_model.corpus import Document, build_corpus, is_common
from scripts.demo_model.model import Llama, Shape
from scripts.demo_model.tokenizer import load_tokenizer, train_tokenizer

TOKENS_PER_STEP = 4096
PAGE_TOKENS = 2048
PAGES_PER_SHUFFLE = 32
CHECKPOINT_EVERY_S = 120.0

MUON_LR = 0.02
ADAM_LR = 0.0036
WARMUP_SHARE = 0.01

EVAL_CONTEXT_TOKENS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Up to `until` (a share of the run), blocks of `n_tokens` from a mixture of streams."""

    until: float
    n_tokens: int
    chat_share: float
    common_share: float = 0.0  # conversations about the modules that people ask about first


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The stages, and a learning rate that falls linearly to zero over the last part."""

    stages: tuple[Stage, ...]
    peak: float  # in units of MUON_LR and ADAM_LR
    decay_share: float

    def rate(self, passed: float) -> float:
        factor = min(1.0, passed / WARMUP_SHARE, (1 - passed) / self.decay_share)
        return self.peak * max(0.0, factor)


FROM_SCRATCH = Schedule(
    stages=(
        Stage(until=0.66, n_tokens=256, chat_share=0.18),
        Stage(until=0.92, n_tokens=1024, chat_share=0.3),
        Stage(until=1.0, n_tokens=2048, chat_share=0.3),
    ),
    peak=1.0,
    decay_share=0.55,
)
CONTINUED = Schedule(
    stages=(Stage(until=1.0, n_tokens=512, chat_share=0.15, common_share=0.45),),
    peak=0.4,
    decay_share=0.9,
)


class Stream:
    """Endless blocks of a token array; all of it is read once before any of it twice."""

    def __init__(self, tokens: npt.NDArray[np.uint16], seed: int) -> None:
        self._tokens = tokens
        self._rng = np.random.default_rng(seed)
        self._pages: list[int] = []
        self._blocks: list[int] = []
        self._n_tokens = 0

    def block(self, n_tokens: int) -> npt.NDArray[np.uint16]:
        """The next block of `n_tokens` and the token that follows it."""
        if n_tokens != self._n_tokens or not self._blocks:
            self._n_tokens = n_tokens
            self._blocks = self._next_blocks(n_tokens)
        start = self._blocks.pop()
        return self._tokens[start : start + n_tokens + 1]

    def _next_blocks(self, n_tokens: int) -> list[int]:
        if not self._pages:
            n_page = (len(self._tokens) - 1) // PAGE_TOKENS
            self._pages = self._rng.permutation(n_page).tolist()
        group, self._pages = self._pages[:PAGES_PER_SHUFFLE], self._pages[PAGES_PER_SHUFFLE:]
        starts = [
            page * PAGE_TOKENS + offset
            for page in group
            for offset in range(0, PAGE_TOKENS, n_tokens)
        ]
        self._rng.shuffle(starts)
        return starts


class Muon:
    """Momentum, orthogonalised: https://kellerjordan.github.io/posts/muon/.

    Matrices of one shape are handled as a stack, in float32: `torch.optim.Muon` takes them one
    by one in bfloat16, which is slow on a CPU without bfloat16 instructions.
    """

    def __init__(self, weights: Sequence[Tensor], momentum: float = 0.95) -> None:
        self._momentum = momentum
        self._groups: dict[tuple[int, int], list[Tensor]] = {}
        for weight in weights:
            n_row, n_col = weight.shape
            self._groups.setdefault((n_row, n_col), []).append(weight)
        self._buffers = {key: torch.zeros(len(g), *key) for key, g in self._groups.items()}

    def step(self, lr: float) -> None:
        with torch.no_grad():
            self._step(lr)

    def _step(self, lr: float) -> None:
        for (n_row, n_col), weights in self._groups.items():
            grads = torch.stack([w.grad for w in weights if w.grad is not None])
            buffer = self._buffers[n_row, n_col]
            buffer.lerp_(grads, 1 - self._momentum)
            update = orthogonalize(grads.lerp_(buffer, self._momentum))
            scale = -lr * max(1.0, n_row / n_col) ** 0.5
            for weight, direction in zip(weights, update, strict=True):
                weight.add_(direction, alpha=scale)


def orthogonalize(stack: Tensor, n_iteration: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly, by a quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = stack.shape[-2] > stack.shape[-1]
    x = stack.mT if is_tall else stack
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(n_iteration):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


def train(
    out: Path, minutes: float, n_thread: int, compiled: bool, start: Path | None = None
) -> None:
    """Writes `tokenizer.json`, `checkpoint.pt` (every two minutes) and `train.jsonl` to `out`.

    With `start`, the folder of an earlier run, its model is trained further, mostly on
    conversations.
    """
    torch.set_num_threads(n_thread)
    torch.manual_seed(SEED)
    out.mkdir(parents=True, exist_ok=True)
    documents = build_corpus()
    training = [document for document in documents if not document.held_out]
    if start:
        tokenizer = load_tokenizer(start / "tokenizer.json")
        model, _ = load(start / "checkpoint.pt")
        schedule = CONTINUED
    else:
        tokenizer = train_tokenizer(document.text for document in training)
        model, schedule = Llama(Shape()), FROM_SCRATCH
    tokenizer.save(str(out / "tokenizer.json"))
    held_out = [d for d in documents if d.held_out and d.kind in {"source", "test"}]
    sample = random.Random(SEED).sample(held_out, 8)
    mixture = Mixture.of(training, tokenizer)
    started = time.monotonic()
    saved_s = 0.0
    last: dict[str, float] = {}
    for last in _run(model, mixture, schedule, minutes * 60, compiled):
        if time.monotonic() - started - saved_s > CHECKPOINT_EVERY_S:
            saved_s = time.monotonic() - started
            last["bits_per_byte"] = bits_per_byte(model, tokenizer, sample)
            save(model, out, last)
    save(model, out, last)
    last["bits_per_byte"] = bits_per_byte(model, tokenizer, held_out)
    save(model, out, last)


def save(model: Llama, out: Path, state: dict[str, float]) -> None:
    partial = out / "checkpoint.pt.partial"
    torch.save(
        {"shape": asdict(model.shape), "state": state, "weights": model.state_dict()}, partial
    )
    partial.replace(out / "checkpoint.pt")
    line = json.dumps(state)
    with (out / "train.jsonl").open("a", encoding="utf-8") as log:
        log.write(line + "\n")
    print(line, flush=True)


def load(path: Path) -> tuple[Llama, dict[str, float]]:
    """The model of a checkpoint and the state of its training."""
    checkpoint = torch.load(path, weights_only=True)
    model = Llama(Shape(**checkpoint["shape"]))
    model.load_state_dict(checkpoint["weights"])
    return model.eval(), checkpoint["state"]


def bits_per_byte(model: Llama, tokenizer: Tokenizer, documents: Sequence[Document]) -> float:
    """Over whole files, in windows that do not overlap; the first token has no context."""
    n_bit, n_byte = 0.0, 0
    for document in documents:
        ids = [0, *tokenizer.encode(document.text).ids]
        for start in range(0, len(ids) - 1, EVAL_CONTEXT_TOKENS):
            window = torch.tensor([ids[start : start + EVAL_CONTEXT_TOKENS + 1]])
            with torch.no_grad():
                n_bit += float(model.loss(window)) * (window.shape[1] - 1) / math.log(2)
        n_byte += len(document.text.encode())
    return n_bit / n_byte


class Mixture:
    """Batches drawn from the streams of text, conversations and common conversations."""

    def __init__(self, text: Stream, chat: Stream, common: Stream) -> None:
        self._text, self._chat, self._common = text, chat, common
        self._rng = random.Random(SEED)

    @classmethod
    def of(cls, documents: Sequence[Document], tokenizer: Tokenizer) -> Self:
        rng = random.Random(SEED)
        chats = [d.text for d in documents if d.kind == "chat"]
        texts = [d.text for d in documents if d.kind != "chat"]
        common = [d.text for d in documents if d.kind == "chat" and is_common(d)]
        streams = []
        for group in (chats, texts, common):
            rng.shuffle(group)
            streams.append(Stream(_encode(group, tokenizer), SEED))
        chat, text, common_chat = streams
        return cls(text, chat, common_chat)

    def batch(self, stage: Stage) -> Tensor:
        blocks = [
            self._pick(stage).block(stage.n_tokens)
            for _ in range(TOKENS_PER_STEP // stage.n_tokens)
        ]
        return torch.from_numpy(np.stack(blocks).astype(np.int64))

    def _pick(self, stage: Stage) -> Stream:
        point = self._rng.random()
        if point < stage.chat_share:
            return self._chat
        is_common_chat = point < stage.chat_share + stage.common_share
        return self._common if is_common_chat else self._text


def _encode(texts: Sequence[str], tokenizer: Tokenizer) -> npt.NDArray[np.uint16]:
    """All texts in one array, each after an end-of-text token."""
    encoded = tokenizer.encode_batch(list(texts))
    return np.concatenate([np.array([0, *e.ids], dtype=np.uint16) for e in encoded])


def _run(
    model: Llama, mixture: Mixture, schedule: Schedule, seconds: float, compiled: bool
) -> Iterator[dict[str, float]]:
    """One step after another until the time is over; yields the state of the training."""
    loss_of: Callable[[Tensor], Tensor] = model.loss
    if compiled:
        loss_of = torch.compile(model.loss, dynamic=False)
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    muon = Muon(matrices)
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    adam = torch.optim.Adam(others, lr=ADAM_LR, betas=(0.9, 0.95), eps=1e-10)
    started = time.monotonic()
    n_step, mean_loss = 0, math.log(model.shape.n_vocab)
    while (passed := (time.monotonic() - started) / seconds) < 1:
        stage = next(s for s in schedule.stages if passed < s.until)
        rate = schedule.rate(passed)
        for group in adam.param_groups:
            group["lr"] = ADAM_LR * rate
        loss = loss_of(mixture.batch(stage))
        loss.backward()
        muon.step(MUON_LR * rate)
        adam.step()
        model.zero_grad(set_to_none=True)
        n_step += 1
        mean_loss += (loss.item() - mean_loss) * 0.05
        yield {
            "step": n_step,
            "tokens": n_step * TOKENS_PER_STEP,
            "minutes": round((time.monotonic() - started) / 60, 2),
            "loss": round(mean_loss, 4),
        }
