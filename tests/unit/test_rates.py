"""Measured kernels as the rates of a model: curves, types, layouts, threads."""

from dataclasses import replace

import pytest

from loadmaster.machine.measurements import (
    AttentionTime,
    DeviceTimes,
    Layout,
    Measurements,
    ProductTime,
)
from loadmaster.machine.types import Machine
from loadmaster.plan.curve import Curve, by_fours, gathered, in_tiles, mixed, roofline
from loadmaster.plan.kernel_rates import CPU_COLD_ATTENTION
from loadmaster.plan.rates import rates_of
from loadmaster.plan.weights import weight_mix
from loadmaster.units import MIB
from tests.toy import toy_machine, toy_model

NS = 1e-9


def _product(quant: str, tokens: int, ns: float, *, layout: Layout = "plain") -> ProductTime:
    return ProductTime(type=quant, layout=layout, gathered=False, tokens=tokens, s_per_byte=ns * NS)


def _attention(
    head_dim: int, tokens: int, cells: int, ns: float, shared: int = 2, heads: int = 2
) -> AttentionTime:
    return AttentionTime(
        type="f16",
        head_dim=head_dim,
        heads_per_kv=shared,
        n_head_kv=heads,
        tokens=tokens,
        cells=cells,
        s_per_element=ns * NS,
    )


COLD = CPU_COLD_ATTENTION
CPU = DeviceTimes(
    id="cpu",
    name="toy",
    n_threads=8,
    products=(
        _product("q4_K", 1, 0.1),
        _product("q4_K", 8, 0.4),
        _product("q4_K", 1, 0.05, layout="repacked"),
        _product("q6_K", 1, 0.2),
        _product("q6_K", 8, 0.2),
    ),
    attention=(
        _attention(64, 1, 256, 1.0),
        _attention(64, 1, 1024, 2.0),
        _attention(64, 256, 512, 0.5),
    ),
    node_s=1e-6,
)


def _measured(*devices: DeviceTimes, machine: Machine | None = None) -> Machine:
    found = Measurements(taken="", seconds=1.0, step_s=1e-4, devices=devices)
    return replace(machine or toy_machine(), measured=found)


def test_a_curve_is_straight_between_points_and_arithmetic_beyond() -> None:
    curve = Curve(tokens=(1, 8), s_per_byte=(1.0, 8.0))
    assert curve.at(0.5) == 1.0
    assert curve.at(4.5) == pytest.approx(4.5)
    assert curve.at(16) == pytest.approx(16.0)


def test_a_roofline_is_flat_until_arithmetic_takes_longer() -> None:
    curve = roofline(bytes_s=100.0, s_per_token=0.001)
    assert curve.at(1) == curve.at(10) == pytest.approx(0.01)
    assert curve.at(100) == pytest.approx(0.1)
    assert roofline(bytes_s=100.0, s_per_token=1.0).at(1) == pytest.approx(1.0)


def test_experts_are_read_once_each_and_in_the_end_all_of_them() -> None:
    experts = gathered(Curve(tokens=(1, 1e9), s_per_byte=(1.0, 1.0)), 16, 2)
    assert experts.at(1) == pytest.approx(1.0)
    assert experts.at(2) == pytest.approx(8 * (1 - (7 / 8) ** 2))
    assert experts.at(4096) == pytest.approx(8.0)


def test_a_mixture_weighs_by_bytes() -> None:
    one, three = Curve(tokens=(1,), s_per_byte=(1.0,)), Curve(tokens=(1,), s_per_byte=(3.0,))
    assert mixed([(one, 300), (three, 100)]).at(1) == pytest.approx(1.5)


def test_kernels_of_the_cpu_take_sixteen_tokens_then_four_then_single_ones() -> None:
    points = {1: 10.0, 2: 13.0, 4: 14.0, 8: 20.0, 16: 28.0, 64: 100.0, 512: 800.0}
    fours = by_fours(Curve(tokens=tuple(points), s_per_byte=tuple(points.values())))
    assert [fours.at(n) for n in points] == list(points.values())
    assert [fours.at(n) for n in (3, 5, 6, 7, 12, 15)] == [16, 17, 20, 23, 26, 26 + 9]
    assert [fours.at(n) for n in (17, 20, 21)] == [31, 34, 37]
    whole = mixed([(fours, 1), (roofline(1.0, 1.0), 1)])
    assert whole.at(7) == pytest.approx((23 + 7) / 2)


def test_a_tile_that_is_not_full_costs_as_much_once_there_are_several() -> None:
    tiles = in_tiles(Curve(tokens=(1, 4, 8, 512), s_per_byte=(10.0, 16.0, 30.0, 900.0)), 4)
    assert [tiles.at(n) for n in (1, 3, 4, 5, 7, 8)] == [10, 14, 16, 30, 30, 30]
    assert tiles.at(512) == 900


def test_measured_types_count_by_their_bytes_in_the_model() -> None:
    model = toy_model(ffn_types=("q4_K",))
    mix = weight_mix(model)
    rates = rates_of(_measured(CPU), mix, repacked=False)
    assert rates.basis == "measured"
    assert rates.host.dense.at(1) == pytest.approx(0.1 * NS)
    assert rates.host.output.at(1) == pytest.approx(0.2 * NS)  # q6_K
    assert rates.host.step_s == pytest.approx(mix.n_nodes * 1e-6)
    assert rates.step_s == pytest.approx(1e-4)


def test_the_layout_in_ram_decides_which_times_count() -> None:
    mix = weight_mix(toy_model(ffn_types=("q4_K",)))
    assert rates_of(_measured(CPU), mix).host.dense.at(1) == pytest.approx(0.05 * NS)
    beside_gpu = _measured(CPU, machine=toy_machine(64 * MIB))  # page-locked, so not repacked
    assert rates_of(beside_gpu, mix).host.dense.at(1) == pytest.approx(0.1 * NS)


def test_a_gpu_that_was_not_measured_leaves_the_basis_a_table() -> None:
    mix = weight_mix(toy_model())
    rates = rates_of(_measured(CPU, machine=toy_machine(64 * MIB)), mix)
    assert rates.basis == "table"
    assert rates.gpus[0].dense.at(1) > 0


def test_a_type_that_was_not_timed_counts_per_weight_as_the_nearest_in_bits() -> None:
    mix = weight_mix(toy_model(ffn_types=("q4_K",)))
    only_q6 = replace(CPU, products=(_product("q6_K", 1, 0.2),))
    rates = rates_of(_measured(only_q6), mix, repacked=False)
    per_weight = 0.2 * NS * 210 / 256
    assert rates.host.dense.at(1) == pytest.approx(per_weight / (144 / 256))


def test_fewer_threads_are_slower_in_proportion() -> None:
    mix = weight_mix(toy_model(ffn_types=("q4_K",)))
    rates = rates_of(_measured(CPU), mix, repacked=False, n_threads=2)
    assert rates.host.dense.at(1) == pytest.approx(0.4 * NS)


def test_attention_depends_on_the_cells_that_a_token_sees() -> None:
    rates = rates_of(_measured(CPU), weight_mix(toy_model()))
    attention = rates.host.attention["f16"]
    assert attention.decode_s(256) == pytest.approx(COLD * 256 * 1.0 * NS)
    assert attention.decode_s(640) == pytest.approx(COLD * 640 * 1.5 * NS)
    assert attention.decode_s(8192) == pytest.approx(COLD * 8192 * 2.0 * NS)
    assert attention.prefill_s(100) == pytest.approx(50 * NS)


def test_heads_with_rows_of_their_own_read_more_for_the_same_arithmetic() -> None:
    mix = weight_mix(toy_model())
    assert mix.heads_per_kv == 2
    alone = replace(CPU, attention=(_attention(64, 1, 256, 3.0, 1), _attention(64, 1, 256, 1.5, 4)))
    rates = rates_of(_measured(alone), mix)
    # 1 ns of arithmetic and 2 ns for a row, of which two heads share one
    assert rates.host.attention["f16"].decode_s(256) == pytest.approx(COLD * 256 * 2.0 * NS)
    assert rates.host.attention["q8_0"].decode_s(256) < COLD * 256 * 2.0 * NS


def test_attention_on_a_gpu_costs_what_it_costs_alone() -> None:
    gpu = replace(CPU, id="gpu:0", n_threads=0)
    rates = rates_of(_measured(CPU, gpu, machine=toy_machine(64 * MIB)), weight_mix(toy_model()))
    assert rates.gpus[0].attention["f16"].decode_s(256) == pytest.approx(256 * 1.0 * NS)


def test_narrower_rows_than_those_of_both_head_sizes_cost_less() -> None:
    mix = replace(weight_mix(toy_model()), row_width=64)
    rows = (
        _attention(128, 1, 256, 1.0, heads=1),
        _attention(64, 1, 256, 2.0, heads=2),
        _attention(64, 1, 256, 1.0, heads=1),
    )
    rates = rates_of(_measured(replace(CPU, attention=rows)), mix)
    base = rates_of(_measured(replace(CPU, attention=rows)), replace(mix, row_width=128))
    cost, base_cost = (r.host.attention["f16"].decode_s(256) for r in (rates, base))
    assert cost == pytest.approx(base_cost / 2)


def test_rows_that_lie_further_apart_cost_more_up_to_the_widest_that_was_timed() -> None:
    mix = weight_mix(toy_model())
    assert mix.row_width == 128
    narrow, wide = _attention(64, 1, 256, 1.0, heads=1), _attention(64, 1, 256, 3.0, heads=3)
    rates = rates_of(_measured(replace(CPU, attention=(narrow, wide))), mix)
    assert rates.host.attention["f16"].decode_s(256) == pytest.approx(
        COLD * 256 * 2.0 * NS
    )  # half-way
    widest = rates_of(
        _measured(replace(CPU, attention=(narrow, wide))), replace(mix, row_width=999)
    )
    assert widest.host.attention["f16"].decode_s(256) == pytest.approx(COLD * 256 * 3.0 * NS)


def test_a_measured_disk_and_link_are_used() -> None:
    gpu = replace(CPU, id="gpu:0", n_threads=0, pinned_bytes_s=7e9, pageable_bytes_s=3e9)
    machine = _measured(CPU, gpu, machine=toy_machine(64 * MIB))
    assert machine.measured is not None
    machine = replace(machine, measured=replace(machine.measured, disk_read_bytes_s=5e8))
    rates = rates_of(machine, weight_mix(toy_model()))
    assert rates.basis == "measured"
    assert rates.link_bytes_s == (7e9,)
    assert rates.disk_bytes_s == 5e8
