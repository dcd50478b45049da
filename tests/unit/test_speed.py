"""The roofline against hand-computed figures."""

from dataclasses import replace

import pytest

from loadmaster.plan.forecast import forecast
from loadmaster.plan.levers import levers_of
from loadmaster.plan.rates import GPU_FLOP_PER_BYTE, RAM_SHARE, VRAM_SHARE, Rates, rates_of
from loadmaster.plan.speed import Reads, Traffic, decode_costs, predict, prefill_costs
from loadmaster.plan.types import EngineSettings, Knobs, Plan, Workload
from loadmaster.plan.weights import weight_mix
from loadmaster.units import MIB
from tests.toy import plan_toy, toy_machine, toy_model

TRAFFIC = Traffic(
    host=Reads(dense_bytes=20 * 10**9),
    gpus=(Reads(dense_bytes=20 * 10**9),),
    host_width=0,
    gpu_width=0,
    streamed_bytes=20 * 10**9,
)
MIX = weight_mix(toy_model())


def _settings(**changes: object) -> EngineSettings:
    plan = plan_toy(toy_model(), toy_machine(64 * MIB))
    assert isinstance(plan, Plan)
    return replace(plan.llamacpp, **changes)  # type: ignore[arg-type]


def _rates() -> Rates:
    return rates_of(toy_machine(64 * MIB), MIX)


def test_decode_is_bytes_over_bandwidth() -> None:
    prediction = predict(TRAFFIC, _rates(), _settings(), Workload(n_ctx=512))
    host_s = 20e9 / (80e9 * RAM_SHARE)
    vram_s = 20e9 / (900e9 * VRAM_SHARE)
    assert prediction.decode_tok_s == pytest.approx(1 / (host_s + vram_s))
    assert prediction.bound_by == "ram-bandwidth"
    assert prediction.basis == "table"


def test_an_unknown_bandwidth_gives_no_figure() -> None:
    machine = toy_machine(64 * MIB)
    unknown = rates_of(replace(machine, ram=replace(machine.ram, bandwidth_bytes_s=None)), MIX)
    prediction = predict(TRAFFIC, unknown, _settings(), Workload(n_ctx=512))
    assert prediction.decode_tok_s is None
    assert prediction.jobs_per_hour is None
    assert prediction.basis == "unknown"
    assert levers_of(TRAFFIC, unknown, _settings(), Workload()) == ()


def test_streaming_a_prompt_costs_the_link_once_per_ubatch() -> None:
    settings = _settings(op_offload=True, n_ubatch=512)
    one = predict(TRAFFIC, _rates(), settings, Workload(prompt_tokens=512))
    two = predict(TRAFFIC, _rates(), settings, Workload(prompt_tokens=1024))
    assert one.ttft_s is not None
    assert two.ttft_s is not None
    flop_s = 900e9 * VRAM_SHARE * GPU_FLOP_PER_BYTE
    products = 512 * 2 * MIX.elements_per_byte * 40e9 / flop_s
    assert two.ttft_s - one.ttft_s == pytest.approx(20e9 / 20e9 + products)


def test_a_short_prompt_is_not_streamed() -> None:
    settings = _settings(op_offload=True, op_offload_min_batch=32)
    assert prefill_costs(TRAFFIC, _rates(), settings, 31, 16)["link"] == 0
    assert prefill_costs(TRAFFIC, _rates(), settings, 32, 16)["link"] == pytest.approx(1.0)


def test_the_output_matrix_is_wanted_once_for_a_prompt_and_once_for_each_sequence() -> None:
    output = Traffic(host=Reads(output_bytes=8 * 10**9), gpus=(Reads(),), host_width=0, gpu_width=0)
    settings, rates = _settings(op_offload=False), _rates()
    once = 8e9 / (80e9 * RAM_SHARE)
    assert prefill_costs(output, rates, settings, 512, 0)["compute"] == pytest.approx(once)
    assert decode_costs(output, rates, settings, 0, 1)["ram-bandwidth"] == pytest.approx(once)


def test_attention_grows_with_the_cells_that_are_seen() -> None:
    traffic = replace(TRAFFIC, host_width=1000, host_window_width=1000, window=100)
    settings, rates = _settings(kv_unified=False), _rates()

    def attention(depth: int, n_sequences: int = 1) -> float:
        return decode_costs(traffic, rates, settings, depth, n_sequences)["attention"]

    assert attention(100) == pytest.approx(2 * attention(50))
    assert attention(200) == pytest.approx(1.5 * attention(100))  # the window sees no more
    assert attention(100, 4) == pytest.approx(4 * attention(100))


def test_many_sequences_share_the_weights() -> None:
    rates, settings = _rates(), _settings()
    one, eight, many = (
        decode_costs(TRAFFIC, rates, settings, 0, count)["vram-bandwidth"] for count in (1, 8, 256)
    )
    assert eight == pytest.approx(one)
    assert many > 4 * one  # arithmetic takes over


def test_levers_say_what_each_would_give_and_leave_out_what_would_not_help() -> None:
    rates, settings = _rates(), _settings()
    levers = {it.what: it.decode_tok_s for it in levers_of(TRAFFIC, rates, settings, Workload())}
    now = predict(TRAFFIC, rates, settings, Workload()).decode_tok_s
    assert now is not None
    assert levers["half the bits per weight"] == pytest.approx(2 * now)
    host_s, vram_s = 20e9 / 64e9, 20e9 / 675e9
    assert levers["RAM and cores twice as fast"] == pytest.approx(1 / (host_s / 2 + vram_s))
    on_gpu = replace(TRAFFIC, host=Reads())
    left = {it.what for it in levers_of(on_gpu, rates, settings, Workload())}
    assert "RAM and cores twice as fast" not in left


def test_fixed_layers_are_kept() -> None:
    plan = plan_toy(toy_model(n_layer=6), toy_machine(64 * MIB), knobs=Knobs(n_gpu_layers=3))
    assert isinstance(plan, Plan)
    assert plan.llamacpp.n_gpu_layers == 3


@pytest.mark.parametrize("n_expert", [0, 4])
@pytest.mark.parametrize("gpu_mib", [(), (1,), (64,)])
def test_the_search_and_the_settings_tell_the_same_speed(
    n_expert: int, gpu_mib: tuple[int, ...]
) -> None:
    model = toy_model(n_expert=n_expert)
    machine = toy_machine(*(size * MIB for size in gpu_mib))
    workload = Workload(n_ctx=1024)
    plan = plan_toy(model, machine, workload=workload)
    assert isinstance(plan, Plan)
    expected = forecast(machine, model, plan.llamacpp)
    assert plan.predicted.decode_tok_s is not None
    told = 1 / plan.predicted.decode_tok_s
    assert told == pytest.approx(expected.decode_s(workload.prompt_tokens), rel=0.02)
