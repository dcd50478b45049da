"""Plans for the transformers engine: ledgers, device maps, refusals, speed."""

import json
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from loadmaster.errors import UsageError
from loadmaster.machine.profiles import load_profile
from loadmaster.model.checkpoint import CheckpointSpec, CheckpointTensor, Stored
from loadmaster.model.hf_tensors import role_of
from loadmaster.plan.codec import does_not_fit_to_json, plan_from_json, plan_to_json
from loadmaster.plan.hf_memory import DRAWING_BYTES, INT8_BYTES, reserved_bytes
from loadmaster.plan.hf_rates import kind_of
from loadmaster.plan.hf_weights import loaded_tensors
from loadmaster.plan.types import CPU, DoesNotFit, TransformersSettings, Workload
from loadmaster.units import GIB, MIB, Bytes
from tests import checkpoint_parts as parts


def engine(plan: Any) -> TransformersSettings:
    assert isinstance(plan.engine, TransformersSettings)
    return plan.engine


def test_nf4_of_the_8b_on_12_gib() -> None:
    plan = parts.fitting(parts.shape(), quantize="nf4")
    gpu = plan.device("gpu:0")
    assert (plan.quantization, engine(plan).device_map) == ("NF4", (("", "gpu:0"),))
    # 6.979 G weights of matrices in 4.127 bits, 1.051 G of embedding and output in 16.
    assert gpu.of("model") == pytest.approx(6.979e9 * 4.127 / 8 + 1.0507e9 * 2, rel=1e-3)
    assert gpu.of("kv") == 8192 * 32 * 2 * 8 * 128 * 2
    assert {item.source for item in gpu.items if item.kind in ("model", "kv")} == {"header"}
    assert plan.predicted.decode_tok_s is not None


def test_the_ledger_has_every_tensor_once() -> None:
    model = parts.shape("llama-3-70b")
    plan = parts.fitting(model, "rtx4090-x8", quantize="nf4")
    loaded = sum(tensor.size_bytes for tensor in loaded_tensors(model, engine(plan)))
    assert sum(device.of("model") for device in plan.devices) == loaded
    assert sum(device.of("kv") for device in plan.devices) == 8192 * 80 * 2 * 8 * 128 * 2


def test_layers_are_split_evenly_over_as_few_gpus_as_hold_them() -> None:
    plan = parts.fitting(parts.shape("llama-3-70b"), "rtx4090-x8", quantize="nf4")
    gpus = [device for device in plan.devices if device.id != CPU]
    assert [gpu.id for gpu in gpus] == ["gpu:0", "gpu:1"]
    assert abs(gpus[0].planned_bytes - gpus[1].planned_bytes) < GIB
    layers = [device for name, device in engine(plan).device_map if ".layers." in name]
    assert layers == sorted(layers)
    assert dict(engine(plan).device_map)["lm_head"] == "gpu:1"
    assert dict(engine(plan).device_map)["model.embed_tokens"] == "gpu:0"
    assert any("1 of 2 wait" in note for note in plan.notes)


def test_a_tied_output_stays_with_its_embedding() -> None:
    plan = parts.fitting(parts.shape("gemma-3-27b"), "rtx4090-x8", quantize="none")
    devices = dict(engine(plan).device_map)
    assert devices["lm_head"] == devices["model.embed_tokens"] == "gpu:0"


def test_a_faster_gpu_is_filled_first() -> None:
    machine = load_profile("rtx3090-x2")
    fast = replace(machine.gpus[1], bandwidth_bytes_s=2 * (machine.gpus[0].bandwidth_bytes_s or 1))
    machine = replace(machine, gpus=(machine.gpus[0], fast))
    plan = parts.fitting(parts.shape("llama-3-70b"), machine, quantize="nf4")
    assert plan.device("gpu:1").of("model") > 1.1 * plan.device("gpu:0").of("model")


def test_nothing_slips_to_the_cpu_unasked() -> None:
    outcome = parts.plan(parts.shape(), quantize="none")
    assert isinstance(outcome, DoesNotFit)
    assert [short.device for short in outcome.shortfalls] == ["gpu:0"]
    flags = [" ".join(one.flags) for one in outcome.nearest]
    assert flags[:2] == ["--quantize int8", "--quantize nf4"]
    assert any(flag.startswith("-ngl ") for flag in flags)
    assert does_not_fit_to_json(outcome)["shortfall_bytes"]["gpu:0"] > 0


def test_a_cpu_share_is_unquantized_and_said_so() -> None:
    plan = parts.fitting(parts.shape(), quantize="nf4", n_gpu_layers=20)
    host = plan.device(CPU)
    per_layer = 2 * 218_112_000
    assert host.of("model") == pytest.approx(12 * per_layer, rel=1e-3)
    assert plan.predicted.bound_by == "link"
    assert any("unquantized" in note for note in plan.notes)
    whole = parts.fitting(parts.shape(), quantize="nf4")
    assert (plan.predicted.decode_tok_s or 0) < (whole.predicted.decode_tok_s or 0) / 10
    assert host.of("kv") == 0  # the layers compute on the GPU all the same


def test_hints_work() -> None:
    outcome = parts.plan(parts.shape(), quantize="none", vram="8GiB")
    assert isinstance(outcome, DoesNotFit)
    for one in outcome.nearest:
        if one.flags[0] == "--quantize":
            parts.fitting(parts.shape(), quantize=one.flags[1], vram="8GiB")
        if one.flags[0] == "-ngl":
            parts.fitting(parts.shape(), n_gpu_layers=int(one.flags[1]), vram="8GiB")


def test_a_smaller_n_ctx_is_taken_unless_one_was_asked_for() -> None:
    model = parts.shape()
    plan = parts.fitting(model, vram="6.6GiB", quantize="nf4")
    assert engine(plan).n_ctx < 8192
    asked = parts.plan(model, vram="6.6GiB", quantize="nf4", workload=Workload(n_ctx=8192))
    assert isinstance(asked, DoesNotFit)


def test_sequences_have_cells_of_their_own() -> None:
    workload = Workload(kind="serve", n_ctx=2048, n_seq_max=4)
    plan = parts.fitting(parts.shape(), quantize="nf4", workload=workload)
    assert (engine(plan).n_ctx, engine(plan).n_seq_max) == (8192, 4)
    assert plan.device("gpu:0").of("kv") == GIB


def test_on_a_machine_without_a_gpu() -> None:
    plan = parts.fitting(parts.shape("llama-3.2-1b"), "cpu-64g", quantize="nf4")
    assert engine(plan).device_map == (("", CPU),)
    assert plan.predicted.decode_tok_s is None  # nothing is published of it
    plain = parts.fitting(parts.shape("llama-3.2-1b"), "cpu-64g")
    assert plain.predicted.decode_tok_s is not None


def test_a_plan_survives_its_json(tmp_path: Path) -> None:
    for plan in (
        parts.fitting(parts.spec(tmp_path, "gemma2")),
        parts.fitting(parts.shape("llama-3-70b"), "rtx4090-x8", quantize="nf4"),
    ):
        assert plan_from_json(json.loads(json.dumps(plan_to_json(plan)))) == plan
    with pytest.raises(TypeError, match="llama"):
        _ = plan.llamacpp


def test_experts_that_stay_large_are_told_of() -> None:
    plan = parts.fitting(parts.shape("mixtral-8x7b"), "a100-80g-x4", quantize="nf4")
    assert any("experts are not quantized" in note for note in plan.notes)


def test_published_latencies_are_met() -> None:
    """bitsandbytes' benchmark on an RTX 4090: Llama 3.1 8B at batch 1."""
    model = parts.shape("llama-3.1-8b")
    workload = Workload(prompt_tokens=64, n_ctx=4096)
    for knobs, published in (
        ({"quantize": "none"}, 47.46),
        ({"quantize": "nf4", "double_quant": False}, 67.71),
        ({"quantize": "nf4"}, 57.08),
        ({"quantize": "int8"}, 22.26),
    ):
        plan = parts.fitting(model, "rtx4090-24g", workload=workload, **knobs)
        assert plan.predicted.decode_tok_s == pytest.approx(published, rel=0.07)


def test_scales_that_are_stored_quantized_are_priced_as_those_that_are_made_so() -> None:
    shape, settings = parts.shape(), parts.SETTINGS
    for double, kind in ((False, "nf4"), (True, "nf4-double")):
        stored = Stored(method="bnb4", label="NF4", bits=4, double_quant=double)
        assert kind_of(replace(shape, stored=stored), settings) == kind
    made = replace(settings, quantize="nf4", double_quant=True)
    assert kind_of(shape, made) == "nf4-double"
    assert kind_of(shape, settings) == "none"


def test_of_what_is_stored_quantized_nothing_is_predicted_on_a_cpu_either() -> None:
    plan = parts.fitting(quantized("bnb8", "INT8"), "cpu-64g")
    assert (plan.predicted.basis, plan.predicted.decode_tok_s) == ("unknown", None)
    assert any("nothing is published of quantized decode on a CPU" in note for note in plan.notes)
    assert parts.fitting(parts.shape(), "cpu-64g").predicted.basis == "table"


def test_logits_that_are_made_on_a_gpu_are_sampled_from_in_ram() -> None:
    model, n_vocab = parts.shape(), 128_256
    one, many = (
        parts.fitting(model, quantize="nf4", workload=Workload(n_ctx=1024, n_seq_max=n))
        for n in (1, 8)
    )
    assert one.device(CPU).of("output") == n_vocab * (4 + DRAWING_BYTES)
    assert many.device(CPU).of("output") - one.device(CPU).of("output") == 7 * n_vocab * 4
    drafting = parts.fitting(model, quantize="nf4", workload=Workload(n_ctx=1024), n_draft=7)
    assert drafting.device(CPU).of("output") > one.device(CPU).of("output")
    vectors = parts.fitting(model, quantize="nf4", workload=Workload(n_ctx=1024), pooling="mean")
    assert vectors.device(CPU).of("output") == 0
    on_cpu = parts.fitting(model, "cpu-64g", workload=Workload(n_ctx=1024))
    assert on_cpu.device(CPU).of("output") == 0  # made there: `compute` has them


# ---- refused


def quantized(method: Any = "bnb4", label: str = "NF4") -> Any:
    return replace(parts.shape(), stored=Stored(method=method, label=label))


@pytest.mark.parametrize(
    ("machine", "knobs", "said"),
    [
        ("m3max-128g", {}, "CUDA and ROCm"),
        ("rtx3090", {"type_k": "q5_1"}, "llama.cpp's caches"),
        ("rtx3090", {"load_mode": "mmap"}, "--load-mode"),
        ("rtx3090", {"n_cpu_moe": 3}, "--n-cpu-moe"),
        ("cpu-64g", {"flash_attn": True}, "8.0"),
        ("cpu-64g", {"n_gpu_layers": 3}, "`-ngl` fixes layers on the GPU, and cpu-64g has none"),
        ("cpu-64g", {"layers_per_device": (3,)}, "`-ts` fixes layers on the GPU"),
    ],
)
def test_what_the_engine_cannot_do(machine: str, knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        parts.plan(parts.shape(), machine, **knobs)
    assert caught.value.hint


def test_nothing_is_quantized_twice() -> None:
    with pytest.raises(UsageError, match="NF4 already"):
        parts.plan(quantized(), quantize="nf4")
    assert parts.fitting(quantized(), "rtx4090-24g").quantization == "NF4"


def test_fp8_stays_fp8_on_every_device() -> None:
    for machine in ("rtx3090", "rtx4090-24g", "cpu-64g"):
        plan = parts.fitting(parts.shape(), machine, quantize="fp8")
        device = plan.device(CPU if machine == "cpu-64g" else "gpu:0")
        # 6.979 G weights of matrices in a byte, 1.051 G of embedding and output in 16 bits.
        assert device.of("model") == pytest.approx(6.979e9 + 1.0507e9 * 2, rel=1e-3)
        assert any("written out in BF16" in note for note in plan.notes)


def test_what_a_product_makes_beside_its_result_is_counted() -> None:
    def compute(quantize: str) -> int:
        plan = parts.fitting(
            parts.shape(), "cpu-64g", workload=Workload(n_ctx=2048), quantize=quantize
        )
        return plan.device(CPU).of("compute")

    plain = compute("none")
    # A part of 2**20, as values, as BF16 and in F32.
    assert compute("fp8") - plain == (1 << 20) * 10
    # 512 tokens of as many numbers as the widest matrix has rows or columns; two of the four
    # activations of 16 bits are not there while it is made.
    assert compute("int8") - plain == 512 * (14336 + INT8_BYTES * 14336 - 2 * 2 * 14336)


def packed(method: Any) -> CheckpointSpec:
    """The 8B in four bits and groups of 128, as GPTQ and AWQ pack it."""
    model = parts.shape()
    tensors: list[CheckpointTensor] = []
    for tensor in model.tensors:
        if tensor.role != "linear":
            tensors.append(tensor)
            continue
        (rows, columns), groups = tensor.shape, tensor.shape[1] // 128
        words = (columns // 8, rows) if method == "gptq" else (columns, rows // 8)
        for name, dtype, shape in (
            ("qweight", "I32", words), ("qzeros", "I32", (groups, rows // 8)),
            ("scales", "F16", (groups, rows)), ("g_idx", "I32", (columns,)),
        ):  # fmt: skip
            if name != "g_idx" or method == "gptq":
                made = replace(
                    tensor, name=f"{tensor.module}.{name}", dtype=dtype, shape=shape,
                    size_bytes=Bytes(prod(shape) * (4 if dtype == "I32" else 2)),
                    role=role_of(f"{tensor.module}.{name}", len(shape)),
                )  # fmt: skip
                tensors.append(made)
    stored = Stored(method=method, label="4-bit", bits=4, block=(1, 128))
    return replace(model, tensors=tuple(tensors), stored=stored)


def test_packed_checkpoints_are_planned_by_their_own_bytes() -> None:
    plain = parts.fitting(parts.shape(), "cpu-64g").device(CPU)
    for method in ("gptq", "awq"):
        model = packed(method)
        for machine in ("rtx3060-12g", "cpu-64g"):
            plan = parts.fitting(model, machine)
            device = plan.device(CPU if machine == "cpu-64g" else "gpu:0")
            # As hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4, whose files have 5.73 GB.
            assert device.of("model") == pytest.approx(5.73e9, rel=1e-3)
            rows = {item.source for item in device.items if item.kind == "model"}
            assert rows == {"header"}
            assert any("keep their bits" in note for note in plan.notes)
        host = parts.fitting(model, "cpu-64g").device(CPU)
        inside = sum(
            t.n_elements for t in loaded_tensors(model, parts.SETTINGS) if t.kind == "int4"
        )
        assert inside == sum(t.n_elements for t in parts.shape().tensors if t.role == "linear")
        assert host.of("compute") - plain.of("compute") == (1 << 20) * 10


def test_kernels_that_are_not_here() -> None:
    gptq = replace(quantized("gptq", "GPTQ 4-bit"))
    gptq = replace(gptq, stored=replace(gptq.stored, runs=False, bits=4))
    with pytest.raises(UsageError, match="GPTQ 4-bit, whose kernels are for CUDA"):
        parts.plan(gptq, "cpu-64g")
    plan = parts.fitting(gptq, "rtx4090-24g")
    assert any("needs kernels that the engine does not have" in note for note in plan.notes)
    assert {item.source for item in plan.device("gpu:0").items if item.kind == "model"} == {"bound"}


def test_quantized_layers_of_bitsandbytes_are_not_sent_to_a_gpu() -> None:
    with pytest.raises(UsageError, match="no quantized layers of the CPU") as caught:
        parts.plan(quantized(), "rtx4090-24g", n_gpu_layers=3)
    assert "-ngl" in (caught.value.hint or "")


def test_more_context_than_the_model_has() -> None:
    with pytest.raises(UsageError, match="8192"):
        parts.plan(parts.shape(), quantize="nf4", workload=Workload(n_ctx=9000))


# ---- the allocator


def test_small_tensors_share_segments_of_2_mib() -> None:
    assert reserved_bytes([]) == 0
    assert reserved_bytes([1]) == 2 * MIB
    assert reserved_bytes([512] * 4096) == 2 * MIB
    assert reserved_bytes([512] * 4097) == 4 * MIB
    assert reserved_bytes([MIB] * 3) == 4 * MIB


def test_middle_tensors_share_segments_of_20_mib() -> None:
    assert reserved_bytes([5 * MIB]) == 20 * MIB
    assert reserved_bytes([5 * MIB] * 4) == 20 * MIB
    assert reserved_bytes([5 * MIB] * 5) == 40 * MIB


def test_large_tensors_have_segments_of_their_own_unless_room_was_taken_before() -> None:
    assert reserved_bytes([11 * MIB, 11 * MIB]) == 24 * MIB
    assert reserved_bytes([11 * MIB, 11 * MIB], 22 * MIB) == 22 * MIB
