"""Memory outside the engine's buffers: GPU context, worker process, tokenizer, work buffers.

None of it is in the engine's own breakdown. Device figures are calibrated on the machine (measured
total less breakdown, after the peak was committed) or, until then, bounds from published reports.
Host figures were fitted to measured worker processes; `docs/log.md` has the runs.
"""

from collections.abc import Sequence

from loadmaster.machine.types import Gpu
from loadmaster.model.types import ModelSpec, TensorSpec
from loadmaster.plan import memory
from loadmaster.plan.layout import opened_gpus
from loadmaster.plan.types import CPU, EngineSettings, MemoryItem, Overheads, Source
from loadmaster.units import MIB, Bytes

# CUDA context and kernels (107–555 MiB reported), cuBLAS workspace (4 or 32 MiB), the first growth
# of the scratch pool and graphs: the highest reported, rounded up.
CUDA_CONTEXT_BYTES = 640 * MIB
ROCM_CONTEXT_BYTES = 640 * MIB
VULKAN_CONTEXT_BYTES = 256 * MIB
METAL_CONTEXT_BYTES = 64 * MIB
_CONTEXT_BYTES = {
    "cuda": CUDA_CONTEXT_BYTES,
    "rocm": ROCM_CONTEXT_BYTES,
    "sycl": ROCM_CONTEXT_BYTES,
    "vulkan": VULKAN_CONTEXT_BYTES,
    "metal": METAL_CONTEXT_BYTES,
    "virtual": 0,
}

# Private memory before a model is open: the command (20.8 MiB) and the worker with the engine's
# libraries (14.4), and what the kernel keeps for them.
PROCESS_BYTES = 38 * MIB
# A server in the command: its libraries, connections and what requests leave in caches.
SERVER_BYTES = 32 * MIB
# The child that renders the model's own chat template (11.9 MiB).
TEMPLATE_BYTES = 12 * MIB
# A line editor in the command, `chat` beside `run`.
LINE_EDITOR_BYTES = 12 * MIB
# An open engine without a vocabulary: threads, backends, a file's metadata.
ENGINE_BYTES = 3 * MIB // 2
# The tables by which the engine splits text before byte-pair encoding.
BPE_TABLES_BYTES = 23 * MIB // 10
# A token in the engine's vocabulary (text, two hash tables, a candidate of the sampler: 163–190)
# and what the reader of the header keeps of it (30); a merge in its hash table.
TOKEN_BYTES = 230
MERGE_BYTES = 112
# A candidate of a sampler (llama_token_data).
CANDIDATE_BYTES = 12
# A string of the vocabulary while the engine loads, in the file's own table beside the vocabulary.
HEADER_STRING_BYTES = 32
# llguidance with its compiled schemas, and a token in its vocabulary: 3.6 MiB for 4,096 tokens,
# 8.2 for 32,000, at the highest 26.4 for 128,000 and 47.5 for 256,000.
SCHEMA_BYTES = 8 * MIB
SCHEMA_TOKEN_BYTES = 185
# What a GPU with asynchronous copies loads through: four blocks of 1 MiB.
ASYNCHRONOUS_STAGING_BYTES = 4 * MIB
_ASYNCHRONOUS = frozenset({"cuda", "rocm"})
# A node of the largest graph that the engine makes room for: tensor, hash tables, allocations.
GRAPH_NODE_BYTES = 1280
# graph_max_nodes (llama-context.cpp): nodes for each tensor and token of architectures that unroll
# their recurrence; for the others 8 for each tensor, 1,024 at the least.
_UNROLLED = frozenset({"qwen3next", "kimi-linear", "bailingmoe3", "qwen35", "qwen35moe", "qwen4exp",
                       "deepseek4", "nanbeige", "minimax-01", "minimax-m3", "hy_v4"})  # fmt: skip
_UNROLLED_DEEPLY = frozenset({"kimi-k3", "glm5-next", "hrm_text"})
_LEAST_NODES = 1024


def default_overheads(
    gpus: Sequence[Gpu], *, line_editor: bool = False, server: bool = False, schemas: bool = False
) -> Overheads:
    """Bounds for a machine where nothing has been calibrated."""
    extra = (LINE_EDITOR_BYTES if line_editor else 0) + (SERVER_BYTES if server else 0)
    return Overheads(
        device_bytes={gpu.id: Bytes(_CONTEXT_BYTES[gpu.backend]) for gpu in gpus},
        device_source="bound",
        process_bytes=Bytes(PROCESS_BYTES + extra),
        process_source="bound",
        schemas=schemas or server,
    )


def host_items(
    model: ModelSpec, settings: EngineSettings, overheads: Overheads
) -> tuple[MemoryItem, ...]:
    """The host's memory outside the engine's buffers, once the model is loaded."""
    rows: list[tuple[int, Source, str]] = [
        (overheads.process_bytes, overheads.process_source, "parent and worker process"),
        (TEMPLATE_BYTES if model.chat_template else 0, "bound", "the chat template's process"),
        (ENGINE_BYTES + tokenizer_bytes(model), "bound", f"tokenizer, {model.n_vocab:,} entries"),
        (graph_bytes(model, settings), "bound", "graph metadata"),
        (work_bytes(model, settings), "bound", f"CPU work buffer, n_ubatch {settings.n_ubatch}"),
    ]
    if settings.n_seq_max > 1:
        rows.append((sampler_bytes(model, settings), "bound", "samplers of the other sequences"))
    if overheads.schemas:
        rows.append((schema_bytes(model), "bound", "JSON schemas and their vocabulary"))
    items = [
        MemoryItem(device=CPU, kind="overhead", bytes=Bytes(size), source=source, why=why)
        for size, source, why in rows
    ]
    output = MemoryItem(
        device=CPU,
        kind="output",
        bytes=memory.output_bytes(model, settings),
        source="header",
        why=f"logits, {settings.n_outputs_max} outputs",
    )
    return (output, *items)


def tokenizer_bytes(model: ModelSpec) -> Bytes:
    """The engine's vocabulary."""
    if model.tokenizer_model in ("none", "no_vocab"):
        return Bytes(0)
    tables = BPE_TABLES_BYTES if model.tokenizer_model == "gpt2" else 0
    return Bytes(tables + model.n_vocab * TOKEN_BYTES + model.n_merges * MERGE_BYTES)


def sampler_bytes(model: ModelSpec, settings: EngineSettings) -> Bytes:
    """A sampler chain keeps a candidate for each token (llama_sampler_chain.cur): id, logit,
    probability. `tokenizer_bytes` has those of one sequence."""
    return Bytes((settings.n_seq_max - 1) * model.n_vocab * CANDIDATE_BYTES)


def schema_bytes(model: ModelSpec) -> Bytes:
    """What following JSON schemas takes, from the first one on."""
    if model.tokenizer_model in ("none", "no_vocab"):
        return Bytes(0)
    return Bytes(SCHEMA_BYTES + model.n_vocab * SCHEMA_TOKEN_BYTES)


def graph_bytes(model: ModelSpec, settings: EngineSettings) -> Bytes:
    """Graphs and the scheduler's tables, made for the largest step."""
    n_tokens, n_tensors = min(settings.n_ctx, settings.n_ubatch), len(model.tensors)
    if model.architecture in _UNROLLED_DEEPLY:
        nodes = max(160 * n_tokens, 64 * n_tensors)
    elif model.architecture in _UNROLLED:
        nodes = max(40 * n_tokens, 32 * n_tensors)
    else:
        nodes = max(_LEAST_NODES, 8 * n_tensors)
    return Bytes(nodes * GRAPH_NODE_BYTES)


def work_bytes(model: ModelSpec, settings: EngineSettings) -> Bytes:
    """The CPU backend's scratch, for the operation that needs most (ggml_graph_plan, ggml-cpu.c).

    A matrix product converts its activations to the type that the weights are multiplied with; an
    expert product also sorts tokens by expert. Without flash attention the largest may be the
    attention weights, one for each head, token and cell.
    """
    if settings.n_gpu_layers > model.n_layer and not settings.overrides:
        return Bytes(0)
    n_tokens = min(settings.n_ctx, settings.n_ubatch)
    widest = max((_activation_bytes(model, tensor) for tensor in model.tensors), default=0)
    routed = 8 * model.n_expert * model.n_expert_used  # an index pair for each expert and use
    attention = 0
    if not settings.flash_attn:
        heads = max((layer.n_head for layer in model.layers), default=0)
        attention = 2 * heads * settings.n_ctx // settings.n_seq_max
    return Bytes(n_tokens * max(widest + routed, attention))


def _activation_bytes(model: ModelSpec, tensor: TensorSpec) -> int:
    """One token's activations before this matrix, as its product wants them."""
    if len(tensor.shape) < 2 or tensor.type.name == "f32" or tensor.name in _LOOKED_UP:
        return 0
    uses = model.n_expert_used if ".ffn_down_exps." in tensor.name else 1
    if tensor.type.block_size == 1:
        return 2 * tensor.shape[0] * uses
    return tensor.shape[0] * uses * 73 // 64  # q8_K: 292 bytes for 256 elements, the widest of all


_LOOKED_UP = frozenset({"token_embd.weight", "position_embd.weight", "token_types.weight"})


def header_strings_bytes(model: ModelSpec) -> Bytes:
    """The file's own table of tokens and merges, kept until the weights are loaded."""
    return Bytes(HEADER_STRING_BYTES * (model.n_vocab + model.n_merges))


def staging_bytes(model: ModelSpec, settings: EngineSettings, gpus: Sequence[Gpu]) -> Bytes:
    """What weights pass through on their way to a GPU (load mode `none`).

    load_all_data (llama-model-loader.cpp): four pinned blocks where the device copies
    asynchronously, else a block as large as the tensor, the largest tensor first. Host weights in
    pinned memory come after those of the GPUs, caches and compute buffers after all weights.
    """
    if not opened_gpus(settings) or not (settings.n_gpu_layers or settings.overrides):
        return Bytes(0)
    if all(gpu.backend in _ASYNCHRONOUS for gpu in gpus):
        return Bytes(ASYNCHRONOUS_STAGING_BYTES)
    tensors = (t.size_bytes for t in model.tensors if t.name not in _LOOKED_UP)
    return max(tensors, default=Bytes(0))
