"""Between lines of a batch file and requests of an engine: checks, turns, answers. Pure."""

import hashlib
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadmaster.engine.types import DoneEvent
from loadmaster.errors import LoadmasterError, UsageError
from loadmaster.jobs.types import BatchLine, Item, ItemResult, Order
from loadmaster.tasks.api import openai_answers as answers
from loadmaster.tasks.api.openai_requests import (
    BadFieldError,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    OpenAIRequest,
    Prompt,
    parse_request,
)

_GROUP_CHARS = 256  # prompts that begin with as many equal characters go together
_CHARS_PER_TOKEN = 4
_USUAL_OUTPUT_TOKENS = 256


class BodyCheck:
    """Whether lines can be run by the job's model; it is asked about one after the other."""

    def __init__(
        self, model_names: Collection[str] | None = None, endpoint: str | None = None
    ) -> None:
        """`model_names`: what lines may call the model; None: whatever they like. `endpoint`: the
        only one that they may ask; None: any."""
        self._model_names = model_names
        self._endpoint = endpoint
        self._embeds: bool | None = None  # what the first line wants

    def __call__(self, url: str, body: dict[str, Any]) -> None:
        """Raises BadFieldError if not."""
        if self._endpoint not in (None, url):
            raise BadFieldError("url", f"`url`: `{url[:80]}`, the batch is for `{self._endpoint}`")
        request = parse_request(url, body)
        self._check_model(request.model)
        check_supported(request)
        embeds = isinstance(request, EmbeddingRequest)
        if self._embeds is None:
            self._embeds = embeds
        elif embeds != self._embeds:
            raise BadFieldError(
                "url", "`url`: a job either generates or embeds; give the others a file of theirs"
            )

    def _check_model(self, name: str | None) -> None:
        if self._model_names is None:
            return
        if name is None:
            raise BadFieldError("model", "`model`: missing")
        if name not in self._model_names:
            shown = " or ".join(f"`{known}`" for known in sorted(self._model_names)[:3])
            how = "" if self._endpoint else f"; or give `--served-model-name {name[:80]}`"
            raise BadFieldError("model", f"`model`: `{name[:80]}` is not {shown}{how}")


def check_supported(request: OpenAIRequest) -> None:
    """Refuse what a job cannot do.

    Raises:
        BadFieldError: streaming, a suffix, or an echo is asked for.
    """
    if isinstance(request, EmbeddingRequest):
        return
    if request.generation.stream:
        raise BadFieldError("stream", "`stream`: a job's answers are not streamed")
    if isinstance(request, CompletionRequest) and request.suffix is not None:
        raise BadFieldError("suffix", "`suffix`: not supported in jobs")
    if isinstance(request, CompletionRequest) and request.echo:
        raise BadFieldError("echo", "`echo`: not supported in jobs")


def order_of(line: BatchLine) -> Order:
    """A line's turn: prompts that begin alike together, those that take longest first."""
    request = parse_request(line.url, dict(line.body))
    start, n_chars = _prompt_text(request)
    group = hashlib.sha256(start[:_GROUP_CHARS].encode()).digest()[:8]
    return Order(group=group, cost=n_chars // _CHARS_PER_TOKEN + output_tokens(request))


def output_tokens(request: OpenAIRequest) -> int:
    """Tokens that a request may generate in all; where it does not say, a usual number."""
    if isinstance(request, EmbeddingRequest):
        return 0
    each = request.generation.max_tokens or _USUAL_OUTPUT_TOKENS
    prompts = len(request.prompts) if isinstance(request, CompletionRequest) else 1
    return each * request.generation.n * prompts


def _prompt_text(request: OpenAIRequest) -> tuple[str, int]:
    """How a request's prompt begins, and how many characters it has."""
    if isinstance(request, ChatRequest):
        parts = [f"{m['role']}\n{m['content']}\n" for m in request.messages]
        return "".join(parts)[:_GROUP_CHARS], sum(map(len, parts))
    prompts = request.prompts if isinstance(request, CompletionRequest) else request.inputs
    first = prompts[0]
    start = first if isinstance(first, str) else " ".join(map(str, first[:_GROUP_CHARS]))
    return start, sum(map(_chars, prompts))


def _chars(prompt: Prompt) -> int:
    return len(prompt) if isinstance(prompt, str) else len(prompt) * _CHARS_PER_TOKEN


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """An item whose prompts are tokens."""

    item: Item
    request: OpenAIRequest
    prompts: tuple[tuple[int, ...], ...]
    alone: bool = False  # a worker died with it in flight: nothing else runs beside it

    @property
    def n_choices(self) -> int:
        """Generations of each prompt."""
        if isinstance(self.request, EmbeddingRequest):
            return 1
        return self.request.generation.n


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """An item that cannot be run, and why."""

    item: Item
    error: LoadmasterError


# -- results


def generation_result(
    ready: Ready, gatherings: Sequence[answers.Gathering], *, model: str, created: int
) -> ItemResult:
    """The line of a chat or a completion, from its gathered choices in order."""
    dones = [g.done for g in gatherings if g.done is not None]
    usage = answers.usage_of(dones, n_choices=ready.n_choices)
    is_chat = isinstance(ready.request, ChatRequest)
    build = answers.chat_completion if is_chat else answers.completion
    body = build(
        answer_id=answers.new_id("chatcmpl" if is_chat else "cmpl"),
        created=created,
        model=model,
        choices=[gathering.choice() for gathering in gatherings],
        usage=usage,
    )
    return ItemResult(
        number=ready.item.number,
        failed=False,
        line=response_line(ready.item, body),
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        generated_tokens=usage.completion_tokens,
    )


def embedding_result(ready: Ready, vectors: Sequence[Sequence[float]], *, model: str) -> ItemResult:
    """The line of an embedding."""
    request = ready.request
    assert isinstance(request, EmbeddingRequest)
    n_tokens = sum(map(len, ready.prompts))
    body = answers.embeddings(
        model=model,
        vectors=vectors,
        n_tokens=n_tokens,
        encoding_format=request.encoding_format,
        dimensions=request.dimensions,
    )
    line = response_line(ready.item, body)
    return ItemResult(number=ready.item.number, failed=False, line=line, prompt_tokens=n_tokens)


def failed_result(
    item: Item, error: LoadmasterError, dones: Sequence[DoneEvent] = ()
) -> ItemResult:
    """The line of an item that failed: what a server would have answered, or what became of it."""
    if isinstance(error, UsageError):  # the request was at fault
        body = answers.error_body(error)
        line = response_line(item, body, status=error.http_status)
    else:
        line = {
            "id": _line_id(),
            "custom_id": item.custom_id,
            "response": None,
            "error": {"code": error.code, "message": error.message},
        }
    return ItemResult(
        number=item.number,
        failed=True,
        line=line,
        prompt_tokens=sum(done.n_prompt for done in dones),
        generated_tokens=sum(done.n_generated for done in dones),
    )


def response_line(item: Item, body: Mapping[str, Any], *, status: int = 200) -> dict[str, Any]:
    """A line of an output file, as OpenAI writes it."""
    return {
        "id": _line_id(),
        "custom_id": item.custom_id,
        "response": {"status_code": status, "request_id": uuid.uuid4().hex, "body": dict(body)},
        "error": None,
    }


def _line_id() -> str:
    return f"batch_req_{uuid.uuid4().hex[:24]}"
