"""Plans, reports and an engine made by hand, for tests of the tasks and the command line."""

import json
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loadmaster.engine.exchange import Sink
from loadmaster.engine.types import (
    DoneEvent,
    GenerateEvent,
    GenerateRequest,
    LoadedModel,
    LoadRequest,
    MemoryReport,
    TextEvent,
)
from loadmaster.errors import LoadmasterError
from loadmaster.interfaces.cli import main
from loadmaster.plan.types import (
    CPU,
    Alternative,
    BufferSizes,
    DevicePlan,
    DoesNotFit,
    EngineSettings,
    MemoryItem,
    Plan,
    Prediction,
    Shortfall,
    Workload,
)
from loadmaster.tasks.chat import Chat, ChatSettings, Conversation
from loadmaster.tasks.session import Opening, Session
from loadmaster.tasks.template import ChatTemplate
from loadmaster.units import MIB, Bytes
from tests import engine_parts

GPU = "gpu:0"
Run = Callable[..., tuple[int, str, str]]  # of a command: exit code, stdout, stderr
Capture = pytest.CaptureFixture[str]


def said(capsys: Capture, *words: str) -> tuple[int, str, str]:
    """A command in this process: exit code, stdout, stderr."""
    code = main.run(words)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def document(capsys: Capture, *words: str) -> dict[str, Any]:
    """What a command prints with `--json`."""
    code, out, _ = said(capsys, *words, "--json")
    assert code == 0, out
    content: dict[str, Any] = json.loads(out)
    return content


def in_own_process(*words: str, stdin: str = "") -> tuple[int, str, str]:
    """A command in a process of its own, whose memory is the command's alone: exit code, stdout,
    stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "loadmaster", *words],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def settings(**changes: object) -> EngineSettings:
    """Half of a 10-layer model on one GPU."""
    base = replace(
        engine_parts.SETTINGS, n_gpu_layers=5, layers_per_device=(5,), n_ctx=512, n_batch=512,
        n_ubatch=512, kv_unified=False, use_extra_bufts=False, n_threads=2, n_threads_batch=2,
    )  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


def device(device_id: str, cap_mib: int, **kinds_mib: int) -> DevicePlan:
    """A device with one item per kind."""
    items = tuple(
        MemoryItem(
            device=device_id,
            kind=kind,  # type: ignore[arg-type]
            bytes=Bytes(size * MIB),
            source="header",
            why=f"why {kind}",
        )
        for kind, size in kinds_mib.items()
    )
    return DevicePlan(
        id=device_id,
        name="host RAM" if device_id == CPU else "Card",
        budget_bytes=Bytes(cap_mib * MIB),
        budget_origin="`--ram`" if device_id == CPU else "`--vram`",
        items=items,
        mapped_bytes=Bytes(0),
    )


def plan(**changes: object) -> Plan:
    """A plan for a GPU and a host; `report()` measures exactly what it says."""
    base = Plan(
        model_name="toy",
        architecture="llama",
        quantization="Q4_K_M",
        model_files=("toy.gguf",),
        model_stamp="stamp",
        file_bytes=Bytes(160 * MIB),
        n_layer=10,
        machine_name="test machine",
        workload=Workload(),
        engine=settings(),
        devices=(
            device(GPU, 200, model=80, kv=20, compute=30, overhead=10),
            device(CPU, 300, model=80, kv=20, compute=10, output=1, overhead=100),
        ),
        predicted=Prediction(
            decode_tok_s=12.5,
            prefill_tok_s=300.0,
            ttft_s=0.4,
            bound_by="ram-bandwidth",
            basis="table",
        ),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def refusal() -> DoesNotFit:
    """A model that needs 40 MiB more than the GPU's cap."""
    devices = (device(GPU, 100, model=100, kv=40), device(CPU, 300, overhead=100))
    alternative = Alternative(
        flags=("--kv", "q8_0"),
        what="half the KV cache",
        decode_tok_s=11.0,
        frees_bytes={GPU: Bytes(20 * MIB)},
    )
    short = Shortfall(device=GPU, budget_bytes=Bytes(100 * MIB), need_bytes=Bytes(140 * MIB))
    return DoesNotFit(
        model_name="toy",
        workload=Workload(),
        engine=settings(),
        devices=devices,
        shortfalls=(short,),
        nearest=(alternative,),
    )


def buffers(device_plan: DevicePlan) -> BufferSizes:
    """What the engine would report if the plan is right."""
    return BufferSizes(
        device=device_plan.id,
        model_bytes=device_plan.of("model"),
        context_bytes=device_plan.of("kv", "recurrent"),
        compute_bytes=device_plan.of("compute"),
    )


def report(for_plan: Plan) -> MemoryReport:
    """A measurement that agrees with the plan, 5 MiB under it where the process is concerned."""
    totals = {d.id: Bytes(d.planned_bytes - 5 * MIB) for d in for_plan.devices}
    host = totals.pop(CPU)
    return MemoryReport(
        buffers=tuple(map(buffers, for_plan.devices)),
        process_bytes=host,
        process_peak_bytes=host,
        mapped_bytes=Bytes(0),
        device_used_bytes=totals,
        device_peak_bytes=totals,
        device_denied={},
    )


class ScriptedEngine:
    """An engine of words: a token is a word, the answer is what the test says."""

    def __init__(self, measured: MemoryReport, answers: Sequence[str] = ("Hello you",)) -> None:
        self.measured = measured
        self.answers = list(answers)
        self.requests: list[GenerateRequest] = []
        self.texts: list[str] = []
        self.cancelled: list[str] = []
        self.loads: list[LoadRequest] = []
        self.closed = False
        self.load_error: Exception | None = None
        self.n_ctx = 512
        self.failure: LoadmasterError | None = None

    def load(
        self,
        request: LoadRequest,
        on_progress: Callable[[float], bool | None] | None = None,
        *,
        files: Sequence[Path] = (),
    ) -> LoadedModel:
        self.loads.append(request)
        if on_progress:
            on_progress(0.5)
        if self.load_error:
            raise self.load_error
        if on_progress:
            on_progress(1.0)
        return LoadedModel(
            n_ctx=self.n_ctx,
            n_ctx_seq=self.n_ctx,
            n_vocab=100,
            load_s=0.1,
            eog_tokens=(2,),
            bos_token=1,
            add_bos=True,
            bos_text="<s>",
            eos_text="</s>",
        )

    def commit_peak(self) -> MemoryReport:
        return self.measured

    def memory(self) -> MemoryReport:
        return self.measured

    def tokenize(
        self, text: str, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        self.texts.append(text)
        return [1] * add_special + [len(word) for word in text.split()]

    def tokenize_many(
        self, texts: Sequence[tuple[str, bool]], parse_special: bool = False
    ) -> list[list[int]]:
        return [self.tokenize(text, special, parse_special) for text, special in texts]

    def detokenize(self, tokens: Sequence[int]) -> str:
        return " ".join("x" * token for token in tokens)

    def embed(
        self, prompts: Sequence[Sequence[int]], *, normalize: bool = True
    ) -> list[list[float]]:
        return [[float(len(prompt)), 0.0] for prompt in prompts]

    def rerank(self, query: str, documents: Sequence[str]) -> list[float]:
        return [float(len(document)) for document in documents]

    def generate(self, request: GenerateRequest) -> Generator[GenerateEvent, None, None]:
        self.requests.append(request)
        words = self.answers.pop(0).split(" ")
        for count, word in enumerate(words, start=1):
            text = word if count == 1 else " " + word
            yield TextEvent(request_id=request.request_id, text=text, n_tokens=count)
        yield self.done(request, len(words))

    def start_request(self, request: GenerateRequest, sink: Sink) -> None:
        for event in self.generate(request):
            sink(request.request_id, event)

    def done(self, request: GenerateRequest, n_generated: int) -> DoneEvent:
        return DoneEvent(
            request_id=request.request_id,
            finish_reason="stop",
            n_prompt=len(request.prompt),
            n_cached=0,
            n_generated=n_generated,
            prefill_s=0.5,
            decode_s=0.25,
        )

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    def limit_steps(self, deadline_s: float) -> None:
        self.step_deadline_s = deadline_s

    def give_up(self, error: LoadmasterError) -> None:
        self.failure = error

    def log_tail(self) -> tuple[str, ...]:
        return ("ggml: out of words",)

    def close(self) -> None:
        self.closed = True


class Heard:
    """A Progress that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.fractions: list[float] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def loading(self, fraction: float) -> None:
        self.fractions.append(fraction)

    def prefill(self, n_done: int, n_prompt: int) -> None:
        """Not of interest."""

    def finish(self) -> None:
        """Not of interest."""


def opening(engine: ScriptedEngine, **changes: object) -> Opening:
    """Parts of a session on a machine with endless free memory."""
    base = Opening(
        start_engine=lambda _: engine,
        parent_bytes=lambda: Bytes(0),
        free_bytes=lambda _: None,
        replan=None,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def chat(engine: ScriptedEngine, source: str | None = None) -> Chat:
    """A chat with a loaded scripted engine."""
    request = LoadRequest(
        model_path=Path("toy.gguf"), model_stamp="", settings=settings(), ram_cap_bytes=None
    )
    loaded = engine.load(request)
    session = Session(plan=plan(), engine=engine, loaded=loaded, opening=opening(engine))
    return Chat(session, ChatTemplate(source), Conversation(ChatSettings()))
