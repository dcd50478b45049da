"""What a scheduler may count on: the limits of an open model. Pure."""

from loadmaster.engine.types import Capabilities, LoadedModel, LoadRequest
from loadmaster.plan.types import DRAFT_STEP_TOKENS, AnySettings, EngineSettings
from loadmaster.scheduler.types import Limits

_STATE_BYTES = 1 << 30  # for the states of preempted requests where nobody caps the RAM


def limits_of(request: LoadRequest, loaded: LoadedModel, capabilities: Capabilities) -> Limits:
    """From what was asked of the backend, and what it says of the model and of itself."""
    return Limits(
        n_ctx=loaded.n_ctx,
        n_ctx_seq=loaded.n_ctx_seq,
        n_seq_max=capabilities.n_seq_max,
        n_batch=request.settings.n_batch,
        n_ubatch=min(request.settings.n_ubatch, request.settings.n_batch),
        partial_removal=capabilities.partial_removal,
        n_seq_ids=capabilities.n_seq_ids,
        shared_prefix=capabilities.shared_prefix,
        shared_at_end=capabilities.shared_at_end,
        partial_state=capabilities.partial_state,
        state_bytes=_state_room(request) if capabilities.state_save else 0,
        answers_beside=answers_beside(request.settings),
        n_draft=request.settings.n_draft if capabilities.drafts else 0,
        n_draft_step=_draft_step(request.settings),
        draft_model=request.draft is not None,
    )


def _draft_step(settings: AnySettings) -> int:
    """Tokens of a step with drafts: of one pass, and not more than it may have outputs."""
    n_tokens = min(DRAFT_STEP_TOKENS, settings.n_ubatch, settings.n_batch)
    outputs = settings.n_outputs_max if isinstance(settings, EngineSettings) else n_tokens
    return min(n_tokens, outputs)


def _state_room(request: LoadRequest) -> int:
    """Host RAM for the states of preempted requests. Under a cap nobody can say before the peak
    is committed."""
    if request.state_bytes is not None:
        return request.state_bytes
    return _STATE_BYTES if request.ram_cap_bytes is None else 0


def answers_beside(settings: AnySettings) -> int:
    """On a GPU answers go along with a prompt for next to nothing; the CPU's kernels take four
    tokens at a time, and each costs what one of the prompt costs."""
    on_cpu = isinstance(settings, EngineSettings) and settings.n_gpu_layers == 0
    return 4 if on_cpu else 0
