"""What is known of a served model: from its header, and where it is open from the engine."""

from dataclasses import dataclass, replace

from loadmaster.model.checkpoint import AnyModel
from loadmaster.model.types import ModelSpec
from loadmaster.tasks.locating import locate_model
from loadmaster.tasks.serving.host import Serving
from loadmaster.tasks.serving.model import ServedModel
from loadmaster.tasks.serving.requests import n_ctx_of

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
    quantization: str
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
        model.header = await model.call(_read, model.offer.model)
    known = model.header
    asked = model.offer.n_ctx or serving.options.plan.workload.n_ctx
    n_ctx = min(asked or known.n_ctx_train, known.n_ctx_train or asked or 0)
    if model.opened is not None:
        n_ctx = n_ctx_of(model.opened)
    facts = _facts(known, n_ctx)
    if model.opened is not None:  # the engine knows such tokens by their texts too
        fills = model.opened.session.loaded.fim_middle is not None
        facts = replace(facts, fills_middle=fills)
    return facts


def _read(model: str) -> AnyModel:
    return locate_model(model).model


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
        quantization=spec.quantization,
        name=spec.name,
        path=str(first.path),
        mtime_s=first.mtime_ns / 1e9,
        chat_template=spec.chat_template,
        digest=f"{first.inode:x}-{first.size_bytes:x}",
        embeds=header is not None and header.pooling is not None,
        fills_middle=header is not None and any(key in header.metadata for key in _FIM_KEYS),
    )
