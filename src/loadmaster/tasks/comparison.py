"""`plan --compare`: every quantization of several models on one machine, planned alike."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn, get_args

from loadmaster.engine.sizing import Sizer
from loadmaster.errors import NotFoundError, UsageError
from loadmaster.model.checkpoint import AnyModel, CheckpointSpec
from loadmaster.model.hf_remote import has_checkpoint
from loadmaster.model.hf_source import is_checkpoint
from loadmaster.model.hub import Hub
from loadmaster.model.reference import HubReference, parse_reference
from loadmaster.model.shapes.library import (
    ShapeReference,
    compared_quantizations,
    is_shape,
    load_shape,
    parse_shape,
)
from loadmaster.model.variants import RepoFile, variants_of
from loadmaster.plan.choices import Choice as CacheChoice
from loadmaster.plan.choices import first_choice, smaller_cache
from loadmaster.plan.compare import (
    READING_TOK_S,
    Candidate,
    Choice,
    Limits,
    choose,
    dominated,
)
from loadmaster.plan.hf_caches import SMALLER_CACHE
from loadmaster.plan.quality import quality_of
from loadmaster.plan.types import Knobs, Plan, Quantize
from loadmaster.tasks.locating import locate_header
from loadmaster.tasks.planner import Planner, virtual_devices
from loadmaster.tasks.planning import PlanOptions, PlanRequest, Sizes, plan_model
from loadmaster.tasks.vectors import of_its_kind

MAX_MODELS = 64  # planned one after another, a fraction of a second each
# What is shown of safetensors when nothing is named. FP8 is not: it has the bits of INT8.
COMPARED_QUANTIZE: tuple[Quantize, ...] = ("none", "int8", "nf4")
_Q8 = (SMALLER_CACHE, SMALLER_CACHE)
_QUANTIZE_FLAG = " --quantize "
_FIRST_N_CTX = 4096  # where the search for the longest n_ctx begins
Said = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All candidates in the order they were asked for, and what the rule makes of them."""

    machine_name: str
    candidates: tuple[Candidate, ...]
    dominated_by: tuple[int | None, ...]  # index of the candidate that beats this one
    limits: Limits
    choice: Choice
    sized: bool  # by the engine; False: compute buffers are bounds
    request: PlanRequest  # of the first model; machine, budget and workload are those of all


def compare(
    models: Sequence[str], options: PlanOptions, limits: Limits, said: Said = lambda _: None
) -> Comparison:
    """Plan every quantization of `models`. `said` is told what is being planned.

    Raises:
        LoadmasterError: a model cannot be found or read.
    """
    references = expand(models, options.knobs.quantize)
    planners = _Planners(options)
    candidates: list[Candidate] = []
    with ExitStack() as stack:
        sizer: Sizes | None = None
        for number, reference in enumerate(references):
            said(f"planning {number + 1} of {len(references)}: {reference}")
            planner, request = planners.request(reference)
            if sizer is None and not isinstance(request.model, CheckpointSpec):
                sizer = stack.enter_context(_sizer(planner))
            candidates += _candidates(reference, request, limits, sizer)
        sized = sizer is not None
    planner = planners.shown()
    return Comparison(
        machine_name=planner.request.machine.name,
        candidates=tuple(candidates),
        dominated_by=dominated(candidates),
        limits=limits,
        choice=choose(candidates, limits),
        sized=sized,
        request=planner.request,
    )


class _Planners:
    """One planner for each engine: what drives a machine's GPUs, and how, is the engine's matter.
    Machine, budget and overheads are looked up once for each."""

    def __init__(self, options: PlanOptions) -> None:
        self._options = options
        self._by_kind: dict[bool, Planner] = {}

    def request(self, reference: str) -> tuple[Planner, PlanRequest]:
        """The planner for a candidate, and its request."""
        name, quantize = split_quantize(reference)
        knobs = replace(self._options.knobs, quantize=quantize)
        located = locate_header(name, quantize)
        kind = isinstance(located.model, CheckpointSpec)
        if kind not in self._by_kind:
            options = replace(self._options, knobs=knobs)
            self._by_kind[kind] = Planner(name, options, located=located)
        planner = self._by_kind[kind]
        knobs = replace(planner.request.knobs, quantize=located.quantize or quantize)
        return planner, of_its_kind(replace(planner.request, model=located.model, knobs=knobs))

    def shown(self) -> Planner:
        """The one whose machine and budget stand for all."""
        return self._by_kind.get(False) or self._by_kind[True]


def _sizer(planner: Planner) -> AbstractContextManager[Sizes | None]:
    if planner.build is None:
        return nullcontext()
    devices = virtual_devices(planner.request.machine)
    return Sizer(planner.build, devices, backend=planner.options.backend)


# ---- which models are meant


def expand(models: Iterable[str], quantize: Quantize | None = None) -> tuple[str, ...]:
    """Every single model that the arguments stand for.

    A shape without a quantization stands for its usual ones, a folder for the GGUF files in it, a
    repository without one for all of its files. Safetensors stand for what can be made of them
    while they load, `folder --quantize nf4`; with `quantize` for that alone.

    Raises:
        NotFoundError: a folder has no GGUF file.
        UsageError: there are too many.
    """
    found = tuple(dict.fromkeys(one for text in models for one in _expand(text, quantize)))
    if len(found) > MAX_MODELS:
        raise UsageError(
            f"{len(found)} models to compare, at most {MAX_MODELS}",
            hint="name the quantizations: `shape:llama-3-70b@Q4_K_M`, `hf:owner/repo:Q4_K_M`",
        )
    return found


def _expand(text: str, quantize: Quantize | None) -> tuple[str, ...]:
    if is_shape(text):
        return _of_shape(parse_shape(text), quantize)
    path = Path(text).expanduser()
    if path.exists() and is_checkpoint(path):
        beside = _of_folder(path) if path.is_dir() and quantize is None else ()
        return (*_of_checkpoint(text, quantize), *beside)
    if path.is_dir():
        return _of_folder(path) or _nothing_in(path)
    reference = parse_reference(text)
    if isinstance(reference, HubReference) and not (reference.file or reference.quantization):
        return _of_repository(reference, quantize)
    return (text,)


def _of_checkpoint(text: str, quantize: Quantize | None) -> tuple[str, ...]:
    made = COMPARED_QUANTIZE if quantize is None else (quantize,)
    return tuple(f"{text}{_QUANTIZE_FLAG}{one}" for one in made)


def split_quantize(reference: str) -> tuple[str, Quantize | None]:
    """`folder --quantize nf4` as MODEL and quantization."""
    name, separator, label = reference.partition(_QUANTIZE_FLAG)
    return name, next((one for one in get_args(Quantize) if separator and one == label), None)


def _of_shape(reference: ShapeReference, quantize: Quantize | None) -> tuple[str, ...]:
    if reference.quantization:
        return (str(reference),)
    if quantize is not None:
        return (str(replace(reference, quantization=quantize.upper())),)
    labels = compared_quantizations(load_shape(reference.name))
    return tuple(str(replace(reference, quantization=label)) for label in labels)


def _of_folder(folder: Path) -> tuple[str, ...]:
    files = [
        RepoFile(path=path.name, size_bytes=path.stat().st_size, sha256=None)
        for path in folder.iterdir()
        if path.is_file()
    ]
    variants = sorted(variants_of(files), key=lambda one: -one.size_bytes)
    return tuple(str(folder / variant.files[0].path) for variant in variants)


def _nothing_in(folder: Path) -> NoReturn:
    raise NotFoundError(
        f"no GGUF file in `{folder}`, and no safetensors with a config.json",
        hint="name a folder with .gguf files, or a checkpoint's",
    )


def _of_repository(reference: HubReference, quantize: Quantize | None) -> tuple[str, ...]:
    with Hub() as hub:
        files = hub.files(reference, hub.commit(reference))
    variants = sorted(variants_of(files), key=lambda one: -one.size_bytes)
    if has_checkpoint(files) and (quantize is not None or not variants):
        return _of_checkpoint(str(reference), quantize)
    if not variants:
        raise NotFoundError(f"`{reference.repo_id}` has no complete GGUF model")
    return tuple(str(replace(reference, file=variant.files[0].path)) for variant in variants)


# ---- one model


def _candidates(
    reference: str, request: PlanRequest, limits: Limits, sizer: Sizes | None
) -> list[Candidate]:
    """One candidate for each cache type: those that the user fixed, else f16 and q8_0; under the
    transformers engine what is computed in, and q8_0."""
    if isinstance(request.model, CheckpointSpec):
        several = [request] if _is_fixed(request.knobs) else [request, _with_cache(request, _Q8)]
        return [_candidate(reference, one, limits, None) for one in several]
    return [
        _candidate(reference, _with_cache(request, types), limits, sizer)
        for types in _caches(request)
    ]


def _is_fixed(knobs: Knobs) -> bool:
    """Whether the cache's types are the user's choice, or there is no cache."""
    return (knobs.type_k, knobs.type_v, knobs.pooling) != (None, None, None)


def _caches(request: PlanRequest) -> list[tuple[str, str]]:
    knobs = request.knobs
    first: CacheChoice = first_choice(request.gguf, request.workload, knobs)
    types = [(first.type_k, first.type_v)]
    smaller = smaller_cache(request.gguf, knobs, first)
    if smaller is not None:
        types.append((smaller.type_k, smaller.type_v))
    return types


def _with_cache(request: PlanRequest, types: tuple[str, str]) -> PlanRequest:
    type_k, type_v = types
    return replace(request, knobs=replace(request.knobs, type_k=type_k, type_v=type_v))


def _candidate(
    reference: str, request: PlanRequest, limits: Limits, sizer: Sizes | None
) -> Candidate:
    model = request.model
    outcome = plan_model(request, sizer, alternatives=False)
    type_k, type_v = outcome.engine.type_k, outcome.engine.type_v
    label = outcome.quantization if isinstance(outcome, Plan) else _label(request)
    candidate = Candidate(
        reference=reference,
        model=base_name(model),
        quantization=label,
        engine="transformers" if isinstance(model, CheckpointSpec) else "llama.cpp",
        type_k=type_k,
        type_v=type_v,
        file_bytes=model.file_bytes,
        quality=quality_of(base_name(model), model.architecture, label, type_k, type_v),
        outcome=outcome,
    )
    if limits.goal == "context" and isinstance(outcome, Plan):
        longest = _longest_n_ctx(request, outcome, limits, sizer)
        return replace(candidate, largest_n_ctx=longest)
    return candidate


def _label(request: PlanRequest) -> str:
    """The quantization of what does not fit."""
    made = request.knobs.quantize
    if made in (None, "none") or not isinstance(request.model, CheckpointSpec):
        return request.model.quantization
    assert made is not None
    return made.upper()


def base_name(model: AnyModel) -> str:
    """The model's name without its quantization, which some files write into it."""
    name = model.name.removesuffix(".gguf")
    for ending in (model.quantization, model.quantization.lower()):
        name = name.removesuffix(ending)
    return name.rstrip("-._ ") or model.name


def _longest_n_ctx(
    request: PlanRequest, plan: Plan, limits: Limits, sizer: Sizes | None
) -> int | None:
    """The longest n_ctx, doubling from 4096 up to the model's own, whose plan keeps the limits."""
    longest = None
    n_ctx = min(_FIRST_N_CTX, request.model.n_ctx_train or _FIRST_N_CTX)
    while True:
        workload = replace(request.workload, n_ctx=n_ctx)
        outcome = plan_model(replace(request, workload=workload), sizer, alternatives=False)
        if not isinstance(outcome, Plan) or _too_slow(outcome, limits):
            return longest
        longest = n_ctx
        if n_ctx >= request.model.n_ctx_train:
            return longest
        n_ctx = min(2 * n_ctx, request.model.n_ctx_train)


def _too_slow(plan: Plan, limits: Limits) -> bool:
    floor = READING_TOK_S if limits.min_speed is None else limits.min_speed
    speed = plan.predicted.decode_tok_s
    return speed is not None and speed < floor
