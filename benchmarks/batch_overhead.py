"""The scheduler's own time for a step, with an engine that takes none.

    python -m benchmarks.batch_overhead [--sequences 1,4,16,64,128,256] [--steps N]

Everything but the model is real: the scheduler, the driver, the engine's batch arrays, one call
into a C library for the step and one for each sequence's sample (of `rand`, by way of ctypes as
for `llama_sampler_sample`), token bytes, UTF-8 and two stop strings for each sequence, and the
events as frames of the wire. `step_ms_N` is the median time of a step in which N sequences decode;
`step_ms_N_p90` its 90th percentile; `prefill_ms_64` of a step that feeds 512 tokens of prompts
beside 64 that decode. The last line is one JSON object.
"""

import argparse
import ctypes as c
import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from loadmaster.engine.backends.fake import Fake
from loadmaster.engine.backends.llamacpp.batch import Batch
from loadmaster.engine.driver import Driver
from loadmaster.engine.types import (
    FREE_TEXT,
    GenerateEvent,
    GenerateRequest,
    OutputRules,
    SamplingParams,
    SequenceWork,
    StepResult,
)
from loadmaster.engine.wire import encode
from loadmaster.scheduler.types import Limits
from loadmaster.schema import to_json

SEQUENCES = (1, 4, 16, 64, 128, 256)
STEPS = 400
_N_VOCAB = 4096
_STOP = ("\n\nUser:", "</answer>")
_PIECES = [b" the", b"\n", b" User", b"ing", "\u00fc".encode(), b"\xf0\x9f", b"\x99\x82", b" </a"]


class _BatchStruct(c.Structure):
    """`llama_batch`."""

    _fields_ = (
        ("n_tokens", c.c_int32), ("token", c.c_void_p), ("embd", c.c_void_p),
        ("pos", c.c_void_p), ("n_seq_id", c.c_void_p), ("seq_id", c.c_void_p),
        ("logits", c.c_void_p),
    )  # fmt: skip


class _Api:
    """As much of the C API as a step needs: both functions of the C library take no time."""

    llama_batch = staticmethod(
        lambda **fields: _BatchStruct(
            **{k: c.cast(v, c.c_void_p) if k != "n_tokens" else v for k, v in fields.items()}
        )
    )

    def __init__(self) -> None:
        library = c.CDLL(None)
        self.llama_decode = library.abs
        self.llama_decode.argtypes = [c.c_int, _BatchStruct]
        self.llama_sampler_sample = library.rand
        self.llama_sampler_sample.argtypes = [c.c_void_p, c.c_void_p, c.c_int32]


class Timeless(Fake):
    """An engine without a model whose steps cost what every step costs in any engine."""

    def __init__(self, n_batch: int) -> None:
        super().__init__(devices=(), options={})
        self._api = _Api()
        self._batch = Batch(self._api, n_batch)
        self._chains: dict[int, int] = {}
        self._pieces = {
            token: _PIECES[token] if token < len(_PIECES) else b" word%d" % token
            for token in range(_N_VOCAB)
        }

    def token_bytes(self, token: int) -> bytes:
        return self._pieces[token]

    def is_eog(self, token: int) -> bool:
        return token < 0

    def start_sequence(
        self,
        seq_id: int,
        sampling: SamplingParams,
        recent: Sequence[int] = (),
        rules: OutputRules = FREE_TEXT,
    ) -> None:
        self._chains[seq_id] = seq_id + 1

    def move_sampler(self, seq_id: int, to: int) -> None:
        self._chains[to] = self._chains.pop(seq_id)

    def end_sequence(self, seq_id: int) -> None:
        del self._chains[seq_id]

    def step(self, work: Sequence[SequenceWork]) -> StepResult:
        outputs = self._batch.fill(work)
        self._api.llama_decode(0, self._batch.struct)
        sample, chains = self._api.llama_sampler_sample, self._chains
        return StepResult(tokens={s: sample(chains[s], None, row) % _N_VOCAB for s, row in outputs})

    def remove(self, seq_id: int, start: int) -> bool:
        return True

    def share(self, source: int, seq_id: int, n: int) -> bool:
        return True


def _driver(n_sequences: int) -> Driver:
    limits = Limits(
        n_ctx=1 << 20, n_ctx_seq=1 << 20, n_seq_max=n_sequences, n_batch=512, n_ubatch=512,
        partial_removal=True, n_seq_ids=max(n_sequences, 255), shared_prefix=True,
        partial_state=True,
    )  # fmt: skip
    return Driver(Timeless(512), limits, report=_send, refuse=_refused)


def _send(event: GenerateEvent) -> None:
    encode({"kind": "event", "event": "text", "body": to_json(event)})


def _refused(request_id: str, error: Exception) -> None:
    raise RuntimeError(f"{request_id} was refused: {error}")


def _request(name: str, prompt: tuple[int, ...]) -> GenerateRequest:
    return GenerateRequest(
        request_id=name, prompt=prompt, max_tokens=None, sampling=SamplingParams(), stop=_STOP
    )


def _timed(driver: Driver, n_steps: int) -> list[float]:
    times = []
    for _ in range(n_steps):
        start = time.perf_counter()
        driver.step()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def decode_ms(n_sequences: int, n_steps: int) -> list[float]:
    """Milliseconds of steps in which so many sequences decode."""
    driver = _driver(n_sequences)
    for index in range(n_sequences):
        driver.submit(_request(f"r{index}", (1, 2, 3, 4, 5, 6, 7, 100 + index)))
    while driver.stats().n_generated_tokens < n_sequences:
        driver.step()
    _timed(driver, 20)
    gc.freeze()
    times = _timed(driver, n_steps)
    assert driver.stats().n_running == n_sequences
    return times


def prefill_ms(n_decoding: int, n_steps: int) -> list[float]:
    """Milliseconds of steps that feed chunks of a long prompt beside sequences that decode."""
    driver = _driver(n_decoding + 1)
    for index in range(n_decoding):
        driver.submit(_request(f"r{index}", (1, 2, 3, 4, 5, 6, 7, 100 + index)))
    while driver.stats().n_generated_tokens < n_decoding:
        driver.step()
    driver.submit(_request("long", tuple(range(512 * (n_steps + 1)))))
    times = _timed(driver, n_steps)
    assert driver.stats().n_prefilled_tokens > n_steps * 256
    return times


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """The figures; prints a line for each."""
    figures: dict[str, object] = {}
    for n in (int(part) for part in arguments.sequences.split(",")):
        times = decode_ms(n, arguments.steps)
        median = statistics.median(times)
        figures[f"step_ms_{n}"] = round(median, 4)
        figures[f"step_ms_{n}_p90"] = round(statistics.quantiles(times, n=10)[-1], 4)
        figures[f"sequence_us_{n}"] = round(1e3 * median / n, 2)
        print(f"{n:>4} sequences  {median:.3f} ms per step  {1e3 * median / n:.1f} us each")
    prefill = statistics.median(prefill_ms(64, min(100, arguments.steps)))
    print(f"  64 sequences and a chunk of a prompt  {prefill:.3f} ms per step")
    figures["prefill_ms_64"] = round(prefill, 4)
    return figures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sequences", default=",".join(map(str, SEQUENCES)))
    parser.add_argument("--steps", type=int, default=STEPS)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_arguments(parser)
    figures: dict[str, Any] = run(parser.parse_args(argv))
    print(json.dumps({"benchmark": "batch_overhead", **figures}))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
