"""What is known of a served model: from its header, and where it is open from the engine."""

from dataclasses import dataclass, replace

from loadmaster.model.checkpoint import AnyModel
from loadmaster.model.types import ModelSpec
from loadmaster.tasks.locating import locate_model
from loadmaster.tasks.serving.host import Serving
from loadmaster.tasks.serving.model import ServedModel
from loadmaster.tasks.serving.opening import options_for
from loadmaster.tasks.serving.requests import n_ctx_of
from loadmaster.tasks.serving.types import Offer

_FIM_KEYS = ("tokenizer.ggml.fim_pre_token_id", "tokenizer.ggml.prefix_token_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What clients ask of a model before they use it."""

    n_ctx: int  # tokens of one request; what the model was trained for until it is open
    n_ctx_train: int
    n_vocab: int
    n_embd: int
    n_layer: int
    file_bytes: int
    architecture: str
    file_format: str  # `gguf` or `safetensors`
    quantization: str  # as stored; of an open model, as it is in memory
    name: str
    path: str
    mtime_s: float
    chat_template: str | None
    digest: str
    embeds: bool  # its header says how vectors are made of a text
    fills_middle: bool


def capabilities(model: ServedModel, facts: ModelFacts) -> list[str]:
    """What a model can be asked for, in Ollama's words."""
    if facts.embeds or model.offer.embeds:
        return ["embedding"]
    takes_tools = "tools" in (facts.chat_template or "")
    able = {"completion": True, "insert": facts.fills_middle, "tools": takes_tools}
    return [kind for kind, can in able.items() if can]


async def model_facts(serving: Serving, model: ServedModel) -> ModelFacts:
    """The facts of a model; its header is read once."""
    if model.header is None:
        model.header = await model.call(_read, serving, model.offer)
    known = model.header
    asked = model.offer.n_ctx or serving.options.plan.workload.n_ctx
    n_ctx = min(asked or known.n_ctx_train, known.n_ctx_train or asked or 0)
    if model.opened is not None:
        n_ctx = n_ctx_of(model.opened)
    facts = _facts(known, n_ctx)
    if model.opened is not None:  # the engine knows such tokens by their texts too
        session = model.opened.session
        fills = session.loaded.fim_middle is not None
        facts = replace(facts, fills_middle=fills, quantization=session.plan.quantization)
    return facts


def _read(serving: Serving, offer: Offer) -> AnyModel:
    options = options_for(offer, serving.options.plan, serving.offers)
    return locate_model(offer.model, options.knobs.quantize).model


def _facts(spec: AnyModel, n_ctx: int) -> ModelFacts:
    header = spec if isinstance(spec, ModelSpec) else None  # of a GGUF, which says more
    first = spec.files[0]
    return ModelFacts(
        n_ctx=n_ctx,
        n_ctx_train=spec.n_ctx_train,
        n_vocab=spec.n_vocab,
        n_embd=spec.n_embd,
        n_layer=spec.n_layer,
        file_bytes=spec.file_bytes,
        architecture=spec.architecture,
        file_format="safetensors" if header is None else "gguf",
        quantization=spec.quantization,
        name=spec.name,
        path=str(first.path),
        mtime_s=first.mtime_ns / 1e9,
        chat_template=spec.chat_template,
        digest=f"{first.inode:x}-{first.size_bytes:x}",
        embeds=spec.pooling is not None,
        fills_middle=header is not None and any(key in header.metadata for key in _FIM_KEYS),
    )
