"""A draft model beside a model: the same vocabulary, inside the same budget."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from loadmaster.errors import UsageError
from loadmaster.model.checkpoint import AnyModel, CheckpointSpec
from loadmaster.model.damage import quoted
from loadmaster.model.hf_vocabulary import checkpoint_tokens
from loadmaster.model.source import read_tokens
from loadmaster.model.stamp import model_stamp
from loadmaster.model.types import LayerKind, ModelSpec
from loadmaster.plan.drafts import (
    draft_items,
    draft_settings,
    hf_draft_items,
    hf_draft_settings,
)
from loadmaster.plan.forecast import forecast
from loadmaster.plan.hf_checks import check_request
from loadmaster.plan.hf_ledger import HfBooks
from loadmaster.plan.hf_speed import speed_of
from loadmaster.plan.ledger import Books, sizing_key
from loadmaster.plan.types import (
    CPU,
    AnySettings,
    DoesNotFit,
    DraftModel,
    EngineSettings,
    Knobs,
    MemoryItem,
    Plan,
    Sizing,
    SizingFailure,
    TransformersSettings,
    Workload,
)
from loadmaster.scheduler.drafting import cost_of, draft_length
from loadmaster.tasks.planning import PlanRequest, Sizes, plan_model

# The chance of a guessed token to be right: reports have 42 % of drafts of 8 accepted
# (ikawrakow/ik_llama.cpp#2369), which is 0.8 for each token, and 58.7 % (an 8B for a 70B), 0.86.
ASSUMED_SHARE = 0.8
_WIDTHS = (1, 2, 4, 8, 16)
_DEPTH = 512  # cells of the sequence that is predicted for
# Vocabularies end in padding of their own: lists may differ in length by so many tokens.
_PADDING_TOKENS = 512


# ---- whether the two go together


def check_draft(model: AnyModel, draft: AnyModel) -> None:
    """Whether what one model guesses means the same to the other.

    Raises:
        UsageError: their vocabularies differ, or the draft cannot take back what it was fed.
    """
    if isinstance(model, CheckpointSpec) != isinstance(draft, CheckpointSpec):
        raise UsageError(
            f"`{draft.name}` cannot draft for `{model.name}`: one is a GGUF, the other safetensors",
            hint="give both in the same format",
        )
    if isinstance(draft, ModelSpec) and draft.is_recurrent:
        raise UsageError(
            f"`{draft.name}` keeps a recurrent state: what it guessed cannot be taken back",
            hint="take a draft model with attention alone",
        )
    for number, (token, other) in enumerate(zip(_tokens(model), _tokens(draft), strict=False)):
        if token != other:
            difference = f"token {number} is {quoted(other)} instead of {quoted(token)}"
            raise _other_vocabulary(model, draft, difference)
    if abs(model.n_vocab - draft.n_vocab) > _PADDING_TOKENS:
        difference = f"{draft.n_vocab:,} tokens instead of {model.n_vocab:,}"
        raise _other_vocabulary(model, draft, difference)


def _tokens(model: AnyModel) -> Sequence[str | bytes]:
    """None of a model that is not here."""
    if isinstance(model, CheckpointSpec):
        return checkpoint_tokens(model.folder)
    return read_tokens(model.path) if model.path.is_file() else []


def _other_vocabulary(model: AnyModel, draft: AnyModel, difference: str) -> UsageError:
    return UsageError(
        f"`{draft.name}` cannot draft for `{model.name}`: its vocabulary is another, {difference}",
        hint="a smaller model of the same family and generation has the same tokens",
    )


def _check_window(draft: AnyModel, settings: AnySettings) -> None:
    """A checkpoint's cache of a window cannot take back what was fed."""
    if not isinstance(draft, CheckpointSpec):
        return
    windowed = any(layer.kind is LayerKind.SWA for layer in draft.layers)
    if windowed and draft.n_swa < settings.n_ctx // settings.n_seq_max:
        raise UsageError(
            f"`{draft.name}` keeps the last {draft.n_swa} tokens of some layers alone: what it "
            "guessed cannot be taken back",
            hint=f"take another draft model, or `--ctx {draft.n_swa}`",
        )


# ---- where it goes


def plan_with_draft(
    request: PlanRequest, draft: AnyModel, sizer: Sizes | None
) -> Plan | DoesNotFit:
    """A plan with room for the draft model: all of it on the GPU with the largest budget, where
    both fit so, else on the CPU.

    Raises:
        UsageError: the two do not go together.
    """
    check_draft(request.model, draft)
    alone = plan_model(request, sizer, alternatives=False)
    if not isinstance(alone, Plan):
        return alone
    outcome: Plan | DoesNotFit = alone
    for device in _places(request, draft):
        outcome = _beside(request, draft, alone.engine, device, sizer)
        if isinstance(outcome, Plan):
            break
    return outcome


def _places(request: PlanRequest, draft: AnyModel) -> Iterator[str]:
    """Where it may be: refused on a GPU it is refused, on the CPU beside one it goes without."""
    gpus = [gpu.id for gpu in request.machine.gpus if request.budget.cap(gpu.id)]
    if not gpus:
        _check_runs(request, draft, CPU)
        yield CPU
        return
    largest = max(gpus, key=request.budget.cap)
    _check_runs(request, draft, largest)
    yield largest
    with suppress(UsageError):
        _check_runs(request, draft, CPU)
        yield CPU


def _check_runs(request: PlanRequest, draft: AnyModel, device: str) -> None:
    """What a checkpoint of its own must be to run there, its cells apart, which are the target's.

    Raises:
        UsageError: the engine cannot run it; the hint has what it can.
    """
    if isinstance(draft, CheckpointSpec):
        gpus = [gpu for gpu in request.machine.gpus if gpu.id == device]
        knobs = Knobs(flash_attn=request.knobs.flash_attn)
        check_request(request.machine, draft, Workload(), knobs, gpus)


def _beside(
    request: PlanRequest, draft: AnyModel, target: AnySettings, device: str, sizer: Sizes | None
) -> Plan | DoesNotFit:
    """A plan with all of the draft model on `device`."""
    settings = _settings(request, draft, target, device)
    _check_window(draft, settings)
    overheads = replace(request.overheads, draft_items=_items(request, draft, settings, sizer))
    outcome = plan_model(replace(request, overheads=overheads), sizer)
    if not isinstance(outcome, Plan):
        return outcome
    found = outcome.engine
    if found.n_ctx < target.n_ctx:  # less context beside it: then the draft needs less, too
        workload = replace(request.workload, n_ctx=found.n_ctx // found.n_seq_max)
        return _beside(replace(request, workload=workload), draft, found, device, sizer)
    speed = _speed(request, found, draft, settings)
    model = DraftModel(
        model_name=draft.name,
        quantization=draft.quantization if isinstance(draft, ModelSpec) else draft.dtype.upper(),
        model_files=tuple(str(file.path) for file in draft.files),
        model_stamp=model_stamp(draft),
        device=device,
        engine=settings,
        decode_tok_s=speed and speed[0],
        n_guessed=speed and speed[1],
        assumed_share=ASSUMED_SHARE,
    )
    notes = (*outcome.notes, note_of(model), *_beyond_training(draft, found))
    return replace(outcome, draft=model, notes=notes)


def note_of(draft: DraftModel) -> str:
    """What a person should know of the draft model."""
    place = f"{draft.model_name} drafts on {draft.device}"
    if draft.decode_tok_s is None or draft.assumed_share is None:
        return place
    assumed = f"if {draft.assumed_share:.0%} of its tokens are right, an assumption"
    if not draft.n_guessed:
        return f"{place}: it does not pay, not even {assumed}"
    speed = f"decode {draft.decode_tok_s:.1f} tok/s with {draft.n_guessed} guessed in a step"
    return f"{place}: {speed}, {assumed}"


def _beyond_training(draft: AnyModel, target: AnySettings) -> Iterator[str]:
    """Its guesses are checked, so they may be poor."""
    n_ctx = target.n_ctx // target.n_seq_max
    if 0 < draft.n_ctx_train < n_ctx:
        yield (
            f"{draft.name} was trained for {draft.n_ctx_train} of the {n_ctx} tokens of a "
            "sequence: beyond them few of its guesses will be right"
        )


def _settings(
    request: PlanRequest, draft: AnyModel, target: AnySettings, device: str
) -> AnySettings:
    if isinstance(draft, CheckpointSpec):
        assert isinstance(target, TransformersSettings)
        return hf_draft_settings(target, device)
    assert isinstance(target, EngineSettings)
    return draft_settings(draft, target, device, n_gpus=len(request.machine.gpus))


def _items(
    request: PlanRequest, draft: AnyModel, settings: AnySettings, sizer: Sizes | None
) -> tuple[MemoryItem, ...]:
    machine, overheads = request.machine, replace(request.overheads, schemas=False)
    if isinstance(draft, CheckpointSpec):
        assert isinstance(settings, TransformersSettings)
        hf_books = HfBooks(
            model=draft, gpus=machine.gpus, budget=request.budget, overheads=overheads,
            cpu_isa=machine.cpu.isa,
        )  # fmt: skip
        return hf_draft_items(hf_books, settings)
    assert isinstance(settings, EngineSettings)
    books = Books(
        model=draft, gpus=machine.gpus, budget=request.budget, overheads=overheads,
        cpu_isa=machine.cpu.isa,
    )  # fmt: skip
    return draft_items(books, settings, _sized(draft, settings, sizer))


def _sized(draft: ModelSpec, settings: EngineSettings, sizer: Sizes | None) -> Sizing | None:
    if sizer is None:
        return None
    key = sizing_key(settings)
    found = sizer.sizes(draft, [key])[key]
    if isinstance(found, SizingFailure):
        raise UsageError(f"the engine cannot open `{draft.name}` to draft: {found.reason}")
    return found


# ---- what it may bring


def _speed(
    request: PlanRequest, target: AnySettings, draft: AnyModel, settings: AnySettings
) -> tuple[float, int] | None:
    """Tokens per second of one sequence, and the draft length that is best at the assumed share."""
    seconds = [_step_s(request, request.model, target, n) for n in _WIDTHS]
    guess_s = _step_s(request, draft, settings, 1)
    costs = [(n, one) for n, one in zip(_WIDTHS, seconds, strict=True) if one is not None]
    if guess_s is None or len(costs) < len(_WIDTHS):
        return None
    n = draft_length(costs, ASSUMED_SHARE, 1, target.n_draft, guess_s)
    expected = sum(ASSUMED_SHARE**i for i in range(n + 1))
    return expected / (cost_of(costs, n + 1) + n * guess_s), n


def _step_s(
    request: PlanRequest, model: AnyModel, settings: AnySettings, n_tokens: int
) -> float | None:
    """Seconds of a step; None where the machine's rates are not known."""
    if isinstance(model, CheckpointSpec):
        assert isinstance(settings, TransformersSettings)
        speed = speed_of(request.machine, model, settings)
        return None if speed.basis == "unknown" else speed.decode_s(_DEPTH, n_tokens)
    assert isinstance(settings, EngineSettings)
    found = forecast(request.machine, model, settings)
    return None if found.rates.basis == "unknown" else found.decode_s(_DEPTH, n_tokens)
