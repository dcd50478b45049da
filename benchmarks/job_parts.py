"""Job files, and a model on the fake backend of the real engine, for benchmarks and tests."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from loadmaster.engine.exchange import Sink
from loadmaster.engine.process import Engine
from loadmaster.engine.types import GenerateRequest, LoadRequest
from loadmaster.errors import LoadmasterError
from loadmaster.model.stamp import current_stamp
from loadmaster.plan.types import EngineSettings
from loadmaster.tasks.batch.items import BodyCheck
from loadmaster.tasks.batch.model import ALONE, Messages, Vectors
from loadmaster.tasks.planner import find_engine
from loadmaster.tasks.planning import demo_model
from loadmaster.tasks.template import chatml

SEQUENCES = 4
SETTINGS = EngineSettings(
    n_gpu_layers=0, layers_per_device=(), overrides=(), n_ctx=2048, n_seq_max=SEQUENCES,
    n_batch=512, n_ubatch=512, n_outputs_max=SEQUENCES, type_k="f16", type_v="f16",
    flash_attn=True, offload_kqv=True, op_offload=True, op_offload_min_batch=32, swa_full=False,
    kv_unified=True, load_mode="none", use_extra_bufts=True, n_threads=1, n_threads_batch=1,
)  # fmt: skip


def new_check() -> BodyCheck:
    """A check of one file, whose model is `m`."""
    return BodyCheck(model_names={"m"})


def completion(custom_id: str, prompt: Any = "Hello", **body: Any) -> dict[str, Any]:
    """A line of `/v1/completions`."""
    fields = {"model": "m", "prompt": prompt, "max_tokens": 4, "temperature": 0, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": fields}


def chat(custom_id: str, content: str = "Hello", **body: Any) -> dict[str, Any]:
    """A line of `/v1/chat/completions`."""
    messages = [{"role": "user", "content": content}]
    fields = {"model": "m", "messages": messages, "max_tokens": 4, "temperature": 0, **body}
    return {
        "custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": fields
    }  # fmt: skip


def write(path: Path, lines: Iterable[Mapping[str, Any] | str]) -> Path:
    """An input file; a text is a line as it is."""
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


class FakeModel:
    """A `BatchModel` on a real worker with the fake backend; `openings` are its options by turn."""

    name = "m"
    pace = ALONE
    withheld: str | None = None

    def __init__(
        self, *openings: Mapping[str, object], n_ctx: int = 2048, n_sequences: int = SEQUENCES
    ) -> None:
        self._openings = list(openings)
        self._n_ctx = n_ctx
        self.n_sequences = n_sequences
        self.n_opened = 0
        self.started: list[GenerateRequest] = []
        self.engine: Engine | None = None
        self.reopen()

    @property
    def opened(self) -> Engine:
        assert self.engine is not None
        return self.engine

    @property
    def n_ctx(self) -> int:
        return self._n_ctx

    @property
    def n_vocab(self) -> int:
        return 257

    @property
    def failure(self) -> LoadmasterError | None:
        return self.opened.failure

    def render(self, messages: Messages) -> str:
        return chatml(messages)

    def tokens_of(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        return [tuple(t) for t in self.opened.tokenize_many([(text, True) for text in texts])]

    def start(self, request: GenerateRequest, sink: Sink) -> None:
        self.started.append(request)
        self.opened.start_request(request, sink)

    def cancel(self, request_id: str) -> None:
        self.opened.cancel(request_id)

    def embed(self, prompts: Sequence[Sequence[int]]) -> Vectors:
        return [[float(len(prompt)), float(sum(prompt))] for prompt in prompts]

    def reopen(self) -> None:
        self.close()
        last = len(self._openings) - 1
        options = self._openings[min(self.n_opened, last)] if self._openings else {}
        build = find_engine("fake")
        assert build is not None
        self.n_opened += 1
        self.engine = Engine.start(build, backend="fake", options=options)
        self.engine.load(self._load())

    def _load(self) -> LoadRequest:
        path, n = demo_model(), self.n_sequences
        return LoadRequest(
            model_path=path,
            model_stamp=current_stamp([path]),
            settings=replace(SETTINGS, n_ctx=self._n_ctx, n_seq_max=n, n_outputs_max=n),
            ram_cap_bytes=None,
        )

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
