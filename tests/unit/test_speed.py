"""The roofline against hand-computed figures."""

from dataclasses import replace

import pytest

from loadmaster.plan.speed import RAM_SHARE, Traffic, predict, rates_of
from loadmaster.plan.types import Knobs, Plan, Workload
from loadmaster.units import MIB
from tests.toy import plan_toy, toy_machine, toy_model

TRAFFIC = Traffic(
    host_read_bytes=20 * 10**9,
    gpu_read_bytes=(20 * 10**9,),
    host_cache_bytes=0,
    gpu_cache_bytes=(0,),
    disk_read_bytes=0,
    streamed_bytes=20 * 10**9,
    handovers=0,
    host_attention_width=0,
    flops_per_token=140e9,
)


def _settings() -> Plan:
    plan = plan_toy(toy_model(), toy_machine(64 * MIB))
    assert isinstance(plan, Plan)
    return plan


def test_decode_is_bytes_over_bandwidth() -> None:
    machine = toy_machine(64 * MIB)
    prediction = predict(TRAFFIC, rates_of(machine), _settings().engine, Workload(n_ctx=512))
    host_s = 20e9 / (80e9 * RAM_SHARE)
    vram_s = 20e9 / (900e9 * 0.75)
    assert prediction.decode_tok_s == pytest.approx(1 / (host_s + vram_s))
    assert prediction.bound_by == "ram-bandwidth"
    assert prediction.basis == "table"


def test_an_unknown_bandwidth_gives_no_figure() -> None:
    machine = toy_machine(64 * MIB)
    unknown = replace(machine, ram=replace(machine.ram, bandwidth_bytes_s=None))
    prediction = predict(TRAFFIC, rates_of(unknown), _settings().engine, Workload(n_ctx=512))
    assert prediction.decode_tok_s is None
    assert prediction.basis == "unknown"


def test_streaming_a_prompt_costs_the_link_once_per_ubatch() -> None:
    rates = rates_of(toy_machine(64 * MIB))
    settings = replace(_settings().engine, op_offload=True, n_ubatch=512)
    one = predict(TRAFFIC, rates, settings, Workload(prompt_tokens=512))
    two = predict(TRAFFIC, rates, settings, Workload(prompt_tokens=1024))
    assert one.ttft_s is not None
    assert two.ttft_s is not None
    assert two.ttft_s - one.ttft_s == pytest.approx(20e9 / 20e9 + 512 * 140e9 / rates.gpu_flops[0])


def test_fixed_layers_are_kept() -> None:
    plan = plan_toy(toy_model(n_layer=6), toy_machine(64 * MIB), knobs=Knobs(n_gpu_layers=3))
    assert isinstance(plan, Plan)
    assert plan.engine.n_gpu_layers == 3
