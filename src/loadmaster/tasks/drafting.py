"""A draft model beside a model: the same vocabulary, inside the same budget."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from loadmaster.errors import UsageError
from loadmaster.model.damage import quoted
from loadmaster.model.source import read_tokens
from loadmaster.model.stamp import model_stamp
from loadmaster.model.types import ModelSpec
from loadmaster.plan.drafts import draft_items, draft_settings
from loadmaster.plan.forecast import forecast
from loadmaster.plan.ledger import Books, sizing_key
from loadmaster.plan.types import (
    CPU,
    DoesNotFit,
    DraftModel,
    EngineSettings,
    MemoryItem,
    Plan,
    SizingFailure,
)
from loadmaster.scheduler.drafting import cost_of, draft_length
from loadmaster.tasks.planning import PlanRequest, Sizes, plan_model

# The chance of a guessed token to be right: reports have 42 % of drafts of 8 accepted
# (ikawrakow/ik_llama.cpp#2369), which is 0.8 for each token, and 58.7 % (an 8B for a 70B), 0.86.
ASSUMED_SHARE = 0.8
_WIDTHS = (1, 2, 4, 8, 16)
_DEPTH = 512  # cells of the sequence that is predicted for
# Files end in padding of their own: token lists may differ in length by so many.
_PADDING_TOKENS = 512


def check_draft(model: ModelSpec, draft: ModelSpec) -> None:
    """Whether what one model guesses means the same to the other.

    Raises:
        UsageError: their vocabularies differ, or the draft cannot take back what it was fed.
    """
    if draft.is_recurrent:
        raise UsageError(
            f"`{draft.name}` keeps a recurrent state: what it guessed cannot be taken back",
            hint="take a draft model with attention alone",
        )
    if model.path.is_file() and draft.path.is_file():
        _check_tokens(model, draft, read_tokens(model.path), read_tokens(draft.path))
    if abs(model.n_vocab - draft.n_vocab) > _PADDING_TOKENS:
        raise _other_vocabulary(
            model, draft, f"{draft.n_vocab:,} tokens instead of {model.n_vocab:,}"
        )


def _check_tokens(
    model: ModelSpec, draft: ModelSpec, ours: Sequence[bytes], theirs: Sequence[bytes]
) -> None:
    for number, (token, other) in enumerate(zip(ours, theirs, strict=False)):
        if token != other:
            difference = f"token {number} is {quoted(other)} instead of {quoted(token)}"
            raise _other_vocabulary(model, draft, difference)


def _other_vocabulary(model: ModelSpec, draft: ModelSpec, difference: str) -> UsageError:
    return UsageError(
        f"`{draft.name}` cannot draft for `{model.name}`: its vocabulary is another, {difference}",
        hint="a smaller model of the same family and generation has the same tokens",
    )


def plan_with_draft(
    request: PlanRequest, draft: ModelSpec, sizer: Sizes | None
) -> Plan | DoesNotFit:
    """A plan with room for the draft model: all of it on the GPU with the largest budget, where
    both fit so, else on the CPU.

    Raises:
        UsageError: the two do not go together.
    """
    check_draft(request.gguf, draft)
    outcome = plan_model(request, sizer, alternatives=False)
    for device in _places(request):
        if isinstance(outcome, Plan) or device == CPU:
            outcome = _beside(request, draft, outcome.llamacpp, device, sizer)
        if isinstance(outcome, Plan) and outcome.draft is not None:
            return outcome
    return outcome


def _places(request: PlanRequest) -> Iterator[str]:
    gpus = [gpu.id for gpu in request.machine.gpus if request.budget.cap(gpu.id)]
    if gpus:
        yield max(gpus, key=request.budget.cap)
    yield CPU


def _beside(
    request: PlanRequest, draft: ModelSpec, target: EngineSettings, device: str, sizer: Sizes | None
) -> Plan | DoesNotFit:
    """A plan with all of the draft model on `device`."""
    settings = draft_settings(draft, target, device, n_gpus=len(request.machine.gpus))
    items = _items(request, draft, settings, sizer)
    overheads = replace(request.overheads, draft_items=items)
    outcome = plan_model(replace(request, overheads=overheads), sizer)
    if not isinstance(outcome, Plan):
        return outcome
    if outcome.engine.n_ctx != target.n_ctx:  # less context beside it: then it needs less, too
        n_ctx = outcome.engine.n_ctx // outcome.engine.n_seq_max
        fixed = replace(request, workload=replace(request.workload, n_ctx=n_ctx))
        return _beside(fixed, draft, outcome.llamacpp, device, sizer)
    model = _draft_model(request, outcome, draft, settings, device)
    return replace(outcome, draft=model, notes=(*outcome.notes, note_of(model)))


def note_of(draft: DraftModel) -> str:
    """What a person should know of the draft model."""
    place = f"{draft.model_name} drafts on {draft.device}"
    if draft.decode_tok_s is None or draft.assumed_share is None:
        return place
    return (
        f"{place}: decode {draft.decode_tok_s:.1f} tok/s if {draft.assumed_share:.0%} of its "
        "tokens are right, an assumption"
    )


def _items(
    request: PlanRequest, draft: ModelSpec, settings: EngineSettings, sizer: Sizes | None
) -> tuple[MemoryItem, ...]:
    books = Books(
        model=draft,
        gpus=request.machine.gpus,
        budget=request.budget,
        overheads=replace(request.overheads, schemas=False),
        cpu_isa=request.machine.cpu.isa,
    )
    sizing = None
    if sizer is not None:
        key = sizing_key(settings)
        found = sizer.sizes(draft, [key])[key]
        if isinstance(found, SizingFailure):
            raise UsageError(f"the engine cannot open `{draft.name}` to draft: {found.reason}")
        sizing = found
    return draft_items(books, settings, sizing)


def _draft_model(
    request: PlanRequest, plan: Plan, draft: ModelSpec, settings: EngineSettings, device: str
) -> DraftModel:
    return DraftModel(
        model_name=draft.name,
        quantization=draft.quantization,
        model_files=tuple(str(file.path) for file in draft.files),
        model_stamp=model_stamp(draft),
        device=device,
        engine=settings,
        decode_tok_s=_decode_tok_s(request, plan, draft, settings),
        assumed_share=ASSUMED_SHARE,
    )


def _decode_tok_s(
    request: PlanRequest, plan: Plan, draft: ModelSpec, settings: EngineSettings
) -> float | None:
    """Of one sequence, with the draft length that is best at the assumed share."""
    ours = forecast(request.machine, request.gguf, plan.llamacpp)
    if ours.rates.basis == "unknown":
        return None
    guess_s = forecast(request.machine, draft, settings).decode_s(_DEPTH)
    costs = [(n, ours.decode_s(_DEPTH, n)) for n in _WIDTHS]
    n = draft_length(costs, ASSUMED_SHARE, 1, plan.llamacpp.n_draft, guess_s)
    expected = sum(ASSUMED_SHARE**i for i in range(n + 1))
    return expected / (cost_of(costs, n + 1) + n * guess_s)
