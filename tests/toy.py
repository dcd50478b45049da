"""A toy world for the planner: small models, machines, and an engine that sizes by arithmetic."""

from collections.abc import Callable
from pathlib import Path

from loadmaster.machine.types import Cpu, Gpu, Machine, Ram, SizingRules
from loadmaster.model.quants import BY_NAME
from loadmaster.model.types import FileStamp, LayerKind, LayerSpec, ModelSpec, TensorSpec
from loadmaster.plan import layout, memory
from loadmaster.plan.planner import planning
from loadmaster.plan.types import (
    CPU,
    Budget,
    BufferSizes,
    DoesNotFit,
    EngineSettings,
    Knobs,
    Overheads,
    Plan,
    Sizing,
    SizingFailure,
    Workload,
)
from loadmaster.units import GIB, MIB, Bytes

CUDA_RULES = SizingRules(
    alignment_bytes=128, row_padding=512, offload_min_batch=32, pinned_host=True
)
NO_OVERHEADS = Overheads(
    device_bytes={}, device_source="calibrated", process_bytes=Bytes(0), process_source="calibrated"
)


def toy_model(
    *,
    n_layer: int = 4,
    n_embd: int = 256,
    n_ff: int = 768,
    n_vocab: int = 1024,
    n_expert: int = 0,
    ffn_types: tuple[str, ...] = ("q4_K", "q6_K"),
) -> ModelSpec:
    """A llama-shaped model without a file; feed-forward types alternate between layers."""
    tensors = [
        _tensor("token_embd.weight", "q4_K", n_embd, n_vocab),
        _tensor("output_norm.weight", "f32", n_embd),
        _tensor("output.weight", "q6_K", n_embd, n_vocab),
    ]
    for index in range(n_layer):
        tensors += _layer_tensors(index, n_embd, n_ff, n_expert, ffn_types[index % len(ffn_types)])
    layers = tuple(
        LayerSpec(
            index=index,
            kind=LayerKind.FULL,
            n_head=n_embd // 64,
            n_head_kv=max(1, n_embd // 128),
            k_width=max(64, n_embd // 2),
            v_width=max(64, n_embd // 2),
        )
        for index in range(n_layer)
    )
    size = Bytes(sum(tensor.size_bytes for tensor in tensors))
    stamp = FileStamp(path=Path("toy.gguf"), size_bytes=size, device=1, inode=1, mtime_ns=1)
    return ModelSpec(
        files=(stamp,),
        file_bytes=size,
        header_bytes=Bytes(4096),
        name="toy",
        architecture="llama",
        quantization="Q4_K_M",
        n_layer=n_layer,
        n_ctx_train=8192,
        n_embd=n_embd,
        n_vocab=n_vocab,
        n_ff=n_ff,
        n_expert=n_expert,
        n_expert_used=min(2, n_expert),
        n_swa=0,
        tied_output=False,
        layers=layers,
        tensors=tuple(tensors),
        kv_formula=True,
        chat_template=None,
        tokenizer_model="gpt2",
        metadata={},
    )


def _layer_tensors(
    index: int, n_embd: int, n_ff: int, n_expert: int, ffn_type: str
) -> list[TensorSpec]:
    def name(role: str) -> str:
        return f"blk.{index}.{role}.weight"

    kv = max(64, n_embd // 2)
    tensors = [
        _tensor(name("attn_norm"), "f32", n_embd),
        _tensor(name("attn_q"), "q4_K", n_embd, n_embd),
        _tensor(name("attn_k"), "q4_K", n_embd, kv),
        _tensor(name("attn_v"), "q4_K", n_embd, kv),
        _tensor(name("attn_output"), "q4_K", n_embd, n_embd),
        _tensor(name("ffn_norm"), "f32", n_embd),
    ]
    if not n_expert:
        return [
            *tensors,
            _tensor(name("ffn_gate"), "q4_K", n_embd, n_ff),
            _tensor(name("ffn_up"), "q4_K", n_embd, n_ff),
            _tensor(name("ffn_down"), ffn_type, n_ff, n_embd),
        ]
    return [
        *tensors,
        _tensor(name("ffn_gate_inp"), "f32", n_embd, n_expert),
        _tensor(name("ffn_gate_exps"), "q4_K", n_embd, n_ff, n_expert),
        _tensor(name("ffn_up_exps"), "q4_K", n_embd, n_ff, n_expert),
        _tensor(name("ffn_down_exps"), ffn_type, n_ff, n_embd, n_expert),
    ]


def _tensor(name: str, quant: str, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, type=BY_NAME[quant], shape=shape, offset_bytes=0, shard=0)


def toy_machine(*gpu_bytes: int, ram_bytes: int = 8 * GIB) -> Machine:
    """A machine with one GPU for each size."""
    gpus = tuple(
        Gpu(
            id=f"gpu:{index}",
            name=f"toy {index}",
            vendor="virtual",
            backend="virtual",
            total_bytes=Bytes(size),
            free_bytes=Bytes(size),
            free_source="profile",
            unified_memory=False,
            rules=CUDA_RULES,
            bandwidth_bytes_s=900 * 10**9,
            link_bytes_s=20 * 10**9,
        )
        for index, size in enumerate(gpu_bytes)
    )
    cpu = Cpu(name="toy", architecture="x86_64", physical_cores=8, logical_cores=16, isa=())
    ram = Ram(
        total_bytes=Bytes(ram_bytes),
        available_bytes=Bytes(ram_bytes),
        swap_total_bytes=Bytes(0),
        swap_free_bytes=Bytes(0),
        cgroup_version=None,
        cgroup_limit_bytes=None,
        cgroup_used_bytes=None,
        mlock_limit_bytes=None,
        bandwidth_bytes_s=80 * 10**9,
    )
    return Machine(name="toy", os="Linux", wsl=None, cpu=cpu, ram=ram, gpus=gpus)


def toy_budget(machine: Machine) -> Budget:
    """Everything the toy machine has."""
    caps = {gpu.id: gpu.total_bytes for gpu in machine.gpus}
    caps[CPU] = machine.ram.total_bytes
    return Budget(caps=caps, origin=dict.fromkeys(caps, "toy"))


def toy_engine(
    model: ModelSpec, machine: Machine
) -> Callable[[EngineSettings], Sizing | SizingFailure]:
    """An engine that says what the header says, and a compute buffer that depends on placement."""
    rules = {gpu.id: gpu.rules for gpu in machine.gpus}

    def size(settings: EngineSettings) -> Sizing:
        weights = memory.model_bytes(model, settings, rules)
        contexts = memory.context_bytes(model, settings, rules)
        streams = settings.op_offload and weights[CPU] > 0
        rows = []
        for device in (*(gpu.id for gpu in machine.gpus), CPU):
            compute = settings.n_ubatch * model.n_embd * 8
            if device != CPU and streams:
                compute += model.n_embd * model.n_ff * 2
            if device != CPU and device not in layout.opened_gpus(settings):
                continue
            rows.append(
                BufferSizes(
                    device=device,
                    model_bytes=weights[device],
                    context_bytes=contexts[device],
                    compute_bytes=Bytes(compute),
                )
            )
        return Sizing(buffers=tuple(rows), n_ctx=settings.n_ctx)

    return size


def plan_toy(
    model: ModelSpec,
    machine: Machine,
    *,
    workload: Workload | None = None,
    budget: Budget | None = None,
    knobs: Knobs | None = None,
    alternatives: bool = False,
) -> Plan | DoesNotFit:
    """Plan to the end, answering every question with the toy engine."""
    engine = toy_engine(model, machine)
    sizes: dict[EngineSettings, Sizing | SizingFailure] = {}
    steps = planning(
        machine,
        model,
        workload or Workload(n_ctx=512),
        budget or toy_budget(machine),
        knobs or Knobs(),
        NO_OVERHEADS,
        sizes,
        alternatives=alternatives,
    )
    for _ in range(400):
        try:
            asked = next(steps).settings
        except StopIteration as done:
            outcome: Plan | DoesNotFit = done.value
            return outcome
        assert not set(asked) & sizes.keys(), "asked for a size it already has"
        sizes.update({settings: engine(settings) for settings in asked})
    raise AssertionError("the planner keeps asking")


__all__ = ["MIB", "plan_toy", "toy_budget", "toy_engine", "toy_machine", "toy_model"]
