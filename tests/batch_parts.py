"""Jobs for tests: input files, a model on the fake backend of the real engine, and a watcher."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loadmaster.engine.exchange import Sink
from loadmaster.engine.process import Engine
from loadmaster.engine.types import GenerateRequest
from loadmaster.errors import LoadmasterError
from loadmaster.jobs.intake import create_job
from loadmaster.jobs.lines import read_lines
from loadmaster.jobs.store import JobStore
from loadmaster.jobs.types import ItemResult, NewJob
from loadmaster.tasks.batch.items import BodyCheck, order_of
from loadmaster.tasks.batch.model import Messages, Vectors
from loadmaster.tasks.batch.progress import RunState
from loadmaster.tasks.opening import find_engine
from loadmaster.tasks.planning import demo_model
from loadmaster.tasks.template import chatml
from tests.engine_parts import load_request, settings

SEQUENCES = 4


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


def new_store(folder: Path, lines: Iterable[Mapping[str, Any] | str]) -> JobStore:
    """A job of these lines, open."""
    path = write(folder / "in.jsonl", lines)
    job = NewJob(job_id="job", model="m", settings="{}")
    return JobStore(create_job(folder, job, read_lines(path, new_check()), order_of))


def answers(store: JobStore) -> dict[str, Any]:
    """The committed output lines by custom_id."""
    lines = [json.loads(line) for line in store.lines(failed=False)]
    found = {line["custom_id"]: line["response"]["body"] for line in lines}
    assert len(found) == len(lines)
    return found


def failures(store: JobStore) -> dict[str, Any]:
    """The committed error lines by custom_id."""
    lines = [json.loads(line) for line in store.lines(failed=True)]
    return {line["custom_id"]: line for line in lines}


class FakeModel:
    """A `BatchModel` on a real worker with the fake backend; `openings` are its options by turn."""

    name = "m"

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
        chosen = settings(
            n_ctx=self._n_ctx, n_seq_max=self.n_sequences, n_outputs_max=self.n_sequences,
            n_batch=512, n_ubatch=512,
        )  # fmt: skip
        self.engine.load(load_request(demo_model(), chosen))

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()

    def __enter__(self) -> "FakeModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Seen:
    """A watcher that remembers, and may do something at a commit or at a look."""

    def __init__(
        self,
        *,
        on_commit: Callable[[], object] = lambda: None,
        on_state: Callable[[RunState], object] = lambda _: None,
    ) -> None:
        self.lines: list[str] = []
        self.acknowledged: list[int] = []
        self.states: list[RunState] = []
        self._on_commit = on_commit
        self._on_state = on_state

    def say(self, line: str) -> None:
        self.lines.append(line)

    def state(self, state: RunState) -> None:
        self.states.append(state)
        self._on_state(state)

    def committed(self, results: Sequence[ItemResult]) -> None:
        self.acknowledged += [result.number for result in results]
        self._on_commit()
