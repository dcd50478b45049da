"""A file of requests as the planner sees it: lengths in tokens, and what prompts share.

Lines are tokenized by the model's own vocabulary, which takes no weights. Of a long file blocks of
lines stand for the rest, so that a file of 200 MB takes no more memory or time than its sample.
"""

import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from loadmaster.engine.process import Engine
from loadmaster.engine.types import EngineBuild, LoadedModel
from loadmaster.errors import EngineRefusedError, LoadmasterError, NotFoundError, UsageError
from loadmaster.jobs.lines import LINE_LIMIT_BYTES, parse_line
from loadmaster.jobs.types import BadLine, BatchLine
from loadmaster.model.checkpoint import AnyModel, CheckpointSpec
from loadmaster.plan.batch import LISTED_ITEMS, JobOutline, Lengths, outline_of
from loadmaster.tasks.api.openai_requests import (
    ChatRequest,
    EmbeddingRequest,
    Prompt,
    parse_request,
)
from loadmaster.tasks.batch.items import BodyCheck, order_of
from loadmaster.tasks.template import ChatTemplate

# A file of more lines or bytes is sampled: so many blocks of neighbours, evenly spaced. Neighbours,
# because items that share a prefix are often side by side.
SAMPLE_LINES = LISTED_ITEMS
SAMPLE_BYTES = 16 << 20
_BLOCKS = 16
# Of an answer whose request names no limit.
DEFAULT_OUTPUT_TOKENS = 256
# Where no vocabulary is at hand: English text in current vocabularies.
CHARS_PER_TOKEN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class FileOutline:
    """A file of requests as the planner sees it."""

    path: Path
    n_lines: int
    n_bytes: int
    n_sampled: int  # lines that were tokenized
    n_bad: int  # of those, lines that cannot be run
    n_unlimited: int  # of those, requests without `max_tokens`
    job: JobOutline


# ---- the file


def read_outline(
    path: Path, model: AnyModel, build: EngineBuild | None, *, backend: str = "llamacpp"
) -> FileOutline:
    """A file's outline, by the model's vocabulary or, where there is none, by characters.

    Raises:
        NotFoundError: the file cannot be read.
        UsageError: no line of it can be run.
    """
    places = _line_places(path)
    chosen = _sampled(places)
    check = BodyCheck()
    lines = [parse_line(number, raw, check) for number, raw in _read(path, chosen)]
    good = [line for line in lines if isinstance(line, BatchLine)]
    if not good:
        first = next((line for line in lines if isinstance(line, BadLine)), None)
        raise UsageError(
            f"`{path}` has no line that can be run" + (f": {first}" if first else ""),
            hint='a line is {"custom_id": "…", "method": "POST", '
            '"url": "/v1/chat/completions", "body": {…}}',
        )
    times = len(places) / len(chosen) * len(lines) / len(good)
    return FileOutline(
        path=path,
        n_lines=len(places),
        n_bytes=sum(size for _, size in places),
        n_sampled=len(chosen),
        n_bad=len(lines) - len(good),
        n_unlimited=sum(_is_unlimited(line) for line in good),
        job=outline_lines(good, model, build, backend=backend, times=times),
    )


def _is_unlimited(line: BatchLine) -> bool:
    request = parse_request(line.url, dict(line.body))
    return not isinstance(request, EmbeddingRequest) and request.generation.max_tokens is None


def _line_places(path: Path) -> list[tuple[int, int]]:
    """Offset and size of every line that is not blank."""
    places = []
    offset = 0
    try:
        with path.open("rb") as file:
            for raw in file:
                if raw.strip() and len(raw) <= LINE_LIMIT_BYTES:
                    places.append((offset, len(raw)))
                offset += len(raw)
    except OSError as error:
        raise NotFoundError(f"cannot read `{path}`: {error.strerror}") from None
    if not places:
        raise UsageError(f"`{path}` has no lines")
    return places


def _sampled(places: Sequence[tuple[int, int]]) -> list[int]:
    """Indices of lines: all of a short file, else blocks of neighbours and the longest line."""
    n_bytes = sum(size for _, size in places)
    share = min(1.0, SAMPLE_LINES / len(places), SAMPLE_BYTES / n_bytes)
    if share == 1.0:
        return list(range(len(places)))
    block = max(1, int(len(places) * share / _BLOCKS))
    starts = [index * (len(places) - block) // (_BLOCKS - 1) for index in range(_BLOCKS)]
    longest = max(range(len(places)), key=lambda index: places[index][1])
    return sorted({longest, *(start + step for start in starts for step in range(block))})


def _read(path: Path, indices: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """The chosen lines that are not blank, with numbers from 1; one at a time."""
    wanted = iter(indices)
    index = next(wanted, None)
    seen = -1
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip() or len(raw) > LINE_LIMIT_BYTES:
                continue
            seen += 1
            if seen == index:
                yield number, raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                index = next(wanted, None)


# ---- its tokens


def outline_lines(
    lines: Sequence[BatchLine],
    model: AnyModel,
    build: EngineBuild | None,
    *,
    backend: str = "llamacpp",
    times: float = 1.0,
) -> JobOutline:
    """The outline of a job whose lines are these, or `times` as many like them."""
    ordered = _in_turn(lines)
    prompts, exact = _tokens(ordered, model, build, backend)
    if not exact:
        lengths: Lengths = "characters"
    else:
        lengths = "exact" if times == 1.0 else "sample"
    return outline_of(prompts, lengths=lengths, times=times)


def _in_turn(lines: Sequence[BatchLine]) -> list[BatchLine]:
    """As a job runs them: prompts that begin alike together, long ones first."""
    orders = {line.number: order_of(line) for line in lines}
    longest: dict[bytes, int] = {}
    for order in orders.values():
        longest[order.group] = max(longest.get(order.group, 0), order.cost)

    def turn(line: BatchLine) -> tuple[int, bytes, int, int]:
        order = orders[line.number]
        return -longest[order.group], order.group, -order.cost, line.number

    return sorted(lines, key=turn)


Items = list[tuple[Sequence[int], int]]
_Render = Callable[[ChatRequest], str]
_Tokenize = Callable[[Sequence[str]], list[Sequence[int]]]


def _tokens(
    lines: Sequence[BatchLine], model: AnyModel, build: EngineBuild | None, backend: str
) -> tuple[Items, bool]:
    """Prompts in tokens, with what each may generate; and whether they are the model's tokens."""
    if build is None or not _has_vocabulary(model):
        return list(_items(lines, _plain_text, _by_characters)), False
    try:
        with (
            Engine.start(build, backend=backend) as engine,
            ChatTemplate(model.chat_template) as template,
        ):
            vocabulary = engine.open_vocabulary(model.path)
            tokenizer = _Tokenizer(engine, template, vocabulary)
            return list(_items(lines, tokenizer.text, tokenizer.tokens)), True
    except EngineRefusedError:
        return list(_items(lines, _plain_text, _by_characters)), False


def _has_vocabulary(model: AnyModel) -> bool:
    """False for a checkpoint whose files are elsewhere: no worker need import torch to see that."""
    return not isinstance(model, CheckpointSpec) or (model.folder / "tokenizer.json").is_file()


class _Tokenizer:
    """A model's template and vocabulary."""

    def __init__(self, engine: Engine, template: ChatTemplate, vocabulary: LoadedModel) -> None:
        self._engine = engine
        self._template = template
        self._vocabulary = vocabulary

    def text(self, request: ChatRequest) -> str:
        """A conversation as the text of a prompt."""
        facts = self._vocabulary
        try:
            return self._template.render(
                request.messages, bos_text=facts.bos_text, eos_text=facts.eos_text
            )
        except LoadmasterError:  # it fails when it is run, and takes no time then
            return _plain_text(request)

    def tokens(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """Texts in tokens, as a session makes them."""
        bos = self._vocabulary.bos_text
        asked = [(text, not (bool(bos) and text.startswith(bos))) for text in texts]
        return [*self._engine.tokenize_many(asked, parse_special=True)]


def _plain_text(request: ChatRequest) -> str:
    return "".join(f"{turn['role']}\n{turn['content']}\n" for turn in request.messages)


def _by_characters(texts: Sequence[str]) -> list[Sequence[int]]:
    """Some characters as one token: equal beginnings stay equal."""
    step = CHARS_PER_TOKEN
    return [
        [zlib.crc32(text[place : place + step].encode()) for place in range(0, len(text), step)]
        for text in texts
    ]


_CHUNK_LINES = 128


def _items(
    lines: Iterable[BatchLine], render: _Render, tokenize: _Tokenize
) -> Iterator[tuple[Sequence[int], int]]:
    """Every generation of every line: its prompt, and the tokens it may take; none of a vector."""
    waiting = iter(lines)
    while chunk := list(islice(waiting, _CHUNK_LINES)):
        asked = [entry for line in chunk for entry in _prompts(line, render)]
        texts = [prompt for prompt, _ in asked if isinstance(prompt, str)]
        tokens = iter(tokenize(texts))
        for prompt, n_output in asked:
            found = next(tokens) if isinstance(prompt, str) else prompt
            yield _packed(found or (0,)), n_output


def _packed(tokens: Sequence[int]) -> Sequence[int]:
    """Four bytes for each of them: a sample may have millions."""
    return array("I", (token & 0xFFFFFFFF for token in tokens))


def _prompts(line: BatchLine, render: _Render) -> Iterator[tuple[Prompt, int]]:
    request = parse_request(line.url, dict(line.body))
    if isinstance(request, EmbeddingRequest):
        yield from ((prompt, 0) for prompt in request.inputs)
        return
    prompts = (render(request),) if isinstance(request, ChatRequest) else request.prompts
    output = request.generation.max_tokens or DEFAULT_OUTPUT_TOKENS
    for prompt in prompts:
        for _ in range(request.generation.n):
            yield prompt, output
