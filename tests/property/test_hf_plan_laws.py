"""Laws of plans for the transformers engine, over small machines and any budget."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from loadmaster.machine.profiles import load_profile
from loadmaster.machine.types import Machine
from loadmaster.plan.budget import make_budget
from loadmaster.plan.hf_planner import plan_checkpoint
from loadmaster.plan.hf_weights import loaded_tensors
from loadmaster.plan.overhead import default_overheads
from loadmaster.plan.types import (
    CPU,
    Budget,
    DoesNotFit,
    Knobs,
    Plan,
    TransformersSettings,
    Workload,
)
from loadmaster.units import MIB, Bytes
from tests.checkpoint_parts import shape

MODELS = {name: shape(name) for name in ("llama-3.2-1b", "qwen3-4b", "gemma-2-9b")}
_quantize = st.sampled_from(["none", "int8", "nf4", "fp4"])
_caps = st.lists(st.integers(0, 24 * 1024), min_size=1, max_size=3)


def machine(n_gpus: int) -> Machine:
    found = load_profile("rtx4090-x8")
    return replace(found, gpus=found.gpus[:n_gpus])


def solve(name: str, caps: list[int], knobs: Knobs, n_ctx: int | None = 2048) -> Plan | DoesNotFit:
    host = machine(len(caps))
    budget = make_budget(host)
    sizes = {f"gpu:{index}": Bytes(cap * MIB) for index, cap in enumerate(caps)}
    budget = Budget(caps={**budget.caps, **sizes}, origin=budget.origin)
    return plan_checkpoint(
        host, MODELS[name], Workload(n_ctx=n_ctx), budget, knobs, default_overheads(host.gpus),
        alternatives=False,
    )  # fmt: skip


@given(name=st.sampled_from(list(MODELS)), caps=_caps, quantize=_quantize)
def test_budget_and_conservation(name: str, caps: list[int], quantize: str) -> None:
    outcome = solve(name, caps, Knobs(quantize=quantize))  # type: ignore[arg-type]
    settings = outcome.engine
    assert isinstance(settings, TransformersSettings)
    loaded = sum(tensor.size_bytes for tensor in loaded_tensors(MODELS[name], settings))
    assert sum(device.of("model") for device in outcome.devices) == loaded
    if isinstance(outcome, Plan):
        assert all(device.left_bytes >= 0 for device in outcome.devices)
        on_cpu = any(device == CPU for _, device in settings.device_map)
        assert not on_cpu or not any(caps)  # never unasked beside a GPU
    else:
        assert outcome.shortfalls
        assert all(short.bytes > 0 for short in outcome.shortfalls)


@given(name=st.sampled_from(list(MODELS)), cap=st.integers(1, 24 * 1024), more=st.integers(0, 4096))
def test_more_memory_never_refuses(name: str, cap: int, more: int) -> None:
    knobs = Knobs(quantize="nf4")
    if isinstance(solve(name, [cap], knobs), Plan):
        assert isinstance(solve(name, [cap + more], knobs), Plan)


@given(
    name=st.sampled_from(list(MODELS)), quantize=_quantize, n_ctx=st.sampled_from([256, 1024, 4096])
)
def test_more_context_never_needs_less(name: str, quantize: str, n_ctx: int) -> None:
    knobs = Knobs(quantize=quantize)  # type: ignore[arg-type]
    short, long = (solve(name, [24 * 1024], knobs, n) for n in (n_ctx, 2 * n_ctx))
    assert short.devices[0].planned_bytes <= long.devices[0].planned_bytes


@given(name=st.sampled_from(list(MODELS)), n_gpu=st.integers(0, 50))
def test_layers_on_the_gpu_are_as_many_as_asked_for(name: str, n_gpu: int) -> None:
    outcome = solve(name, [24 * 1024], Knobs(n_gpu_layers=n_gpu))
    settings = outcome.engine
    assert isinstance(settings, TransformersSettings)
    devices = [device for module, device in settings.device_map if ".layers." in module]
    n_layer = MODELS[name].n_layer
    if 0 < n_gpu < n_layer:
        assert devices.count("gpu:0") == n_gpu
    else:
        assert settings.device_map == (("", "gpu:0" if n_gpu else CPU),)
