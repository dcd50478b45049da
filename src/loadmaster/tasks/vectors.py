"""Planning a model for vectors: a prompt is pooled within one step, so that is as long as one."""

from dataclasses import replace

from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.model.types import Pooling
from loadmaster.tasks.planning import PlanRequest

# Tokens of a text to embed, where `--ctx` says nothing: retrieval cuts texts into less.
EMBED_N_CTX = 2048


def for_vectors(request: PlanRequest, pooling: Pooling) -> PlanRequest:
    """The same request for a model that is opened to make vectors."""
    asked = request.workload.n_ctx or EMBED_N_CTX
    n_ctx = min(asked, request.model.n_ctx_train or asked)
    knobs = replace(request.knobs, pooling=pooling, n_ubatch=request.knobs.n_ubatch or n_ctx)
    return replace(request, knobs=knobs, workload=replace(request.workload, n_ctx=n_ctx))


def of_its_kind(request: PlanRequest) -> PlanRequest:
    """For vectors, where the model makes nothing else."""
    model = request.model
    if isinstance(model, CheckpointSpec) and not model.writes_text and model.pooling is not None:
        return for_vectors(request, model.pooling)
    return request
