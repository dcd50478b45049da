"""Timing what torch and bitsandbytes do on a device: the answers to `engine.timing`'s questions."""

import copy
import time
from collections.abc import Callable
from typing import Any

import torch

from loadmaster.engine.backends.transformers import cuda
from loadmaster.engine.backends.transformers.environment import keep_scratch
from loadmaster.engine.backends.transformers.kept import TYPES
from loadmaster.engine.backends.transformers.opened import OpenModel
from loadmaster.engine.backends.transformers.sampling import Sampler
from loadmaster.engine.timing import (
    Question,
    TimeAttention,
    TimeLink,
    TimeProducts,
    TimeSmall,
    TimeSteps,
)
from loadmaster.engine.types import SamplingParams, SequenceWork

_QUANTIZED = ("nf4", "nf4-double", "int8")
_COMPUTE = torch.bfloat16
_sdpa = torch.nn.functional.scaled_dot_product_attention


def answer(question: Question, opened: OpenModel | None) -> tuple[float, ...] | None:
    """Seconds of every run; None where there is nothing to time."""
    with torch.inference_mode():
        if isinstance(question, TimeProducts):
            return _products(question)
        if isinstance(question, TimeAttention):
            return _attention(question)
        if isinstance(question, TimeSmall):
            return _small(question, opened)
        if isinstance(question, TimeLink):
            return _link(question)
        if isinstance(question, TimeSteps) and opened is not None:
            return _steps(question, opened)
    return None


def _runs(device: Any, n: int, work: Callable[[], object]) -> list[float]:
    """Seconds of each run; one that warms up is left out."""
    found = []
    for _ in range(n + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
    return found[1:]


# ---- products


def _products(question: TimeProducts) -> tuple[float, ...] | None:
    """Each point's runs, one after another."""
    if question.type not in (*TYPES, *_QUANTIZED) or question.n_expert:
        return None
    device = _begin(question.device, question.n_threads)
    dtype = TYPES.get(question.type, _COMPUTE)
    first = _linear(question.type, question.n_in, question.n_out, dtype).to(device)
    matrices = [first, *(copy.deepcopy(first) for _ in range(question.n_matrices - 1))]
    found: list[float] = []
    for n_tokens, n_used in question.points:
        keep_scratch(n_tokens)  # as in a step
        rows = torch.randn(n_tokens, question.n_in, device=device).to(dtype)
        found += _runs(device, question.runs, lambda: [m(rows) for m in matrices[:n_used]])  # noqa: B023
    return tuple(found)


def _linear(kind: str, n_in: int, n_out: int, dtype: Any) -> Any:
    """A random matrix as loading makes it."""
    import bitsandbytes as bnb

    if kind not in _QUANTIZED:
        return torch.nn.Linear(n_in, n_out, bias=False, dtype=dtype).requires_grad_(False)
    if kind == "int8":
        made = bnb.nn.Linear8bitLt(n_in, n_out, bias=False, has_fp16_weights=False, threshold=6.0)
    else:
        made = bnb.nn.Linear4bit(
            n_in, n_out, bias=False, compute_dtype=_COMPUTE, quant_type="nf4",
            compress_statistics=kind == "nf4-double",
        )  # fmt: skip
    return made.requires_grad_(False)


def _begin(device: str, n_threads: int) -> Any:
    if n_threads:
        torch.set_num_threads(n_threads)
    return cuda.torch_device(device)


# ---- attention


def _attention(question: TimeAttention) -> tuple[float, ...] | None:
    """As `attention.SlotAttention` asks torch for it: heads that share keys are rows of one
    product."""
    if question.type not in TYPES:
        return None
    device = _begin(question.device, question.n_threads)
    n_kv, width = question.n_head_kv, question.head_dim
    group = question.n_head // n_kv
    dtype = TYPES[question.type]
    caches = [
        torch.randn(2, n_kv, question.n_cells, width, device=device).to(dtype)
        for _ in range(question.n_layers)
    ]
    if question.n_tokens == 1:
        queries = torch.randn(1, n_kv, group, width, device=device).to(dtype)

        def decode() -> None:
            for keys, values in caches:
                _sdpa(queries, keys[None], values[None])

        return tuple(_runs(device, question.runs, decode))
    queries = torch.randn(n_kv, group, question.n_tokens, width, device=device).to(dtype)
    places = torch.arange(question.n_cells, device=device)
    rows = torch.arange(question.n_cells - question.n_tokens, question.n_cells, device=device)
    mask = places <= rows.view(-1, 1)

    def chunk() -> None:
        for keys, values in caches:
            shape = (n_kv, group, question.n_cells, width)
            _sdpa(
                queries, keys[:, None].expand(shape), values[:, None].expand(shape), attn_mask=mask
            )

    return tuple(_runs(device, question.runs, chunk))


# ---- the rest


def _small(question: TimeSmall, opened: OpenModel | None) -> tuple[float, ...] | None:
    device = _begin(question.device, question.n_threads)
    if question.operation == "sample":
        return _sampling(question, device)
    if question.operation == "part":
        return None if opened is None else _parts(question, opened, device)
    shape = (question.n_tokens, question.width)
    rows = torch.randn(shape, device=device).to(_COMPUTE)
    work = _OPERATIONS.get(question.operation)
    if work is None:
        return None
    made = work
    return tuple(_runs(device, question.runs, lambda: [made(rows) for _ in range(question.n_ops)]))


def _norm(rows: Any) -> Any:
    """RMSNorm as the models have it, in F32, and the residual sum."""
    wide = rows.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return rows + wide.to(rows.dtype)


def _gate(rows: Any) -> Any:
    return torch.nn.functional.silu(rows) * rows


def _rope(rows: Any) -> Any:
    half = rows.shape[-1] // 2
    return rows * rows + torch.cat((-rows[..., half:], rows[..., :half]), dim=-1) * rows


_OPERATIONS: dict[str, Callable[[Any], Any]] = {"norm": _norm, "gate": _gate, "rope": _rope}


def _sampling(question: TimeSmall, device: Any) -> tuple[float, ...]:
    """Rows of logits on their way to tokens, by the usual chain."""
    sampler = Sampler(SamplingParams(seed=1), (), 0)
    logits = torch.randn(question.n_tokens, question.width, device=device).to(_COMPUTE)

    def choose() -> None:
        for row in logits.to(device="cpu", dtype=torch.float32, copy=True):
            sampler.sample(row)

    return tuple(_runs(device, question.runs, choose))


def _parts(question: TimeSmall, opened: OpenModel, device: Any) -> tuple[float, ...]:
    """A step that feeds so many prompts of two tokens."""
    work = [_chunk(slot, 2, 0) for slot in range(question.n_tokens)]
    found = _runs(device, question.runs, lambda: opened.step(work))
    opened.slots.clear()
    return tuple(found)


def _link(question: TimeLink) -> tuple[float, ...] | None:
    device = _begin(question.device, 0)
    if device.type == "cpu":
        return None
    source = torch.empty(question.size_bytes, dtype=torch.uint8, pin_memory=question.pinned)
    target = torch.empty(question.size_bytes, dtype=torch.uint8, device=device)
    return tuple(_runs(device, question.runs, lambda: target.copy_(source)))


def _steps(question: TimeSteps, opened: OpenModel) -> tuple[float, ...]:
    """The first sequence's chunks, then decode steps of all."""
    found: list[float] = []
    opened.slots.clear()
    for slot in range(question.n_sequences):
        for start in range(0, question.depth, opened.n_ubatch):
            size = min(opened.n_ubatch, question.depth - start)
            seconds = _step(opened, [_chunk(slot, size, start)])
            found += [seconds] if slot == 0 else []
    for index in range(question.n_steps):
        position = question.depth + index
        work = [_chunk(slot, 1, position) for slot in range(question.n_sequences)]
        found.append(_step(opened, work))
    opened.slots.clear()
    return tuple(found)


def _step(opened: OpenModel, work: list[SequenceWork]) -> float:
    """Seconds of one step, to the likeliest tokens."""
    started = time.perf_counter()
    done = opened.step(work)
    if done is not None:
        done[1].argmax(dim=-1).tolist()  # waits for the GPU
    return time.perf_counter() - started


def _chunk(slot: int, n_tokens: int, position: int) -> SequenceWork:
    return SequenceWork(seq_id=slot, tokens=(1,) * n_tokens, position=position, sample=True)
