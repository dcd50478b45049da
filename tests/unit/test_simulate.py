"""Playing a job: what it counts, what bounds it, and what a step costs."""

import time
from dataclasses import replace

import pytest

from loadmaster.plan.objective import cost_s, request_s
from loadmaster.plan.simulate import job_prediction, simulate
from loadmaster.plan.speed import Reads, Traffic, decode_costs, prefill_costs, turn_s
from loadmaster.plan.steps import Step, StepCosts, crossing_tokens
from loadmaster.plan.types import Plan, Workload
from loadmaster.units import MIB
from tests.job_parts import job_of, toy_setting
from tests.toy import plan_toy, toy_machine, toy_model

HALF = Traffic(
    host=Reads(dense_bytes=20 * 10**9),
    gpus=(Reads(dense_bytes=20 * 10**9),),
    host_width=0,
    gpu_width=0,
    streamed_bytes=20 * 10**9,
)


def test_every_token_is_counted_once() -> None:
    traffic, rates, settings = toy_setting()
    found = simulate(traffic, rates, settings, job_of((20, 100, 16, 0), (10, 300, 1, 0)))
    assert found.n_items == 30
    assert found.prefilled_tokens == 20 * 100 + 10 * 300
    assert found.generated_tokens == 20 * 16 + 10
    assert sum(found.costs.values()) == pytest.approx(found.seconds)


def test_a_shared_prefix_is_fed_once() -> None:
    traffic, rates, settings = toy_setting()
    found = simulate(traffic, rates, settings, job_of((20, 100, 16, 80), prefix=80))
    assert found.prefilled_tokens == 80 + 20 * 20
    apart = simulate(traffic, rates, settings, job_of((20, 100, 16, 0)))
    assert found.seconds < apart.seconds
    assert found.peak_cells < apart.peak_cells


def test_caches_of_their_own_share_nothing() -> None:
    traffic, rates, settings = toy_setting()
    streams = replace(settings, kv_unified=False)
    found = simulate(traffic, rates, streams, job_of((20, 100, 16, 80), prefix=80))
    assert found.prefilled_tokens == 20 * 100


def test_cells_bound_how_many_run_and_nobody_is_lost() -> None:
    traffic, rates, settings = toy_setting(n_seq_max=8, n_ctx=512)
    found = simulate(traffic, rates, settings, job_of((16, 40, 200, 0)))
    assert found.n_items == 16
    assert found.generated_tokens == 16 * 200
    assert found.peak_cells <= 512
    assert found.n_preempted > 0
    assert found.prefilled_tokens > 16 * 40  # of those whose states found no room
    ample = simulate(traffic, rates, replace(settings, n_ctx=4096), job_of((16, 40, 200, 0)))
    assert ample.n_preempted == 0
    assert ample.prefilled_tokens == 16 * 40
    assert ample.seconds < found.seconds


def test_an_item_larger_than_all_cells_runs_alone() -> None:
    traffic, rates, settings = toy_setting(n_ctx=256)
    assert simulate(traffic, rates, settings, job_of((2, 400, 8, 0))).n_items == 2


def test_a_long_job_is_as_its_part() -> None:
    traffic, rates, settings = toy_setting()
    shape = (100, 16, 0)
    played = simulate(traffic, rates, settings, job_of((250, *shape)))
    long = simulate(traffic, rates, settings, job_of((10_000, *shape)))
    assert long.seconds == pytest.approx(40 * played.seconds, rel=0.02)
    assert long.prefilled_tokens == 1_000_000
    assert long.n_items == 10_000


def test_a_long_job_feeds_again_as_much_as_its_part() -> None:
    traffic, rates, settings = toy_setting(n_seq_max=32, n_ctx=512)
    played, long = (
        simulate(traffic, rates, settings, job_of((n, 4, 300, 0))) for n in (260, 10_400)
    )
    assert played.prefilled_tokens > 3 * 260 * 4
    assert long.prefilled_tokens == pytest.approx(40 * played.prefilled_tokens, rel=0.05)


def test_ten_thousand_items_take_no_time() -> None:
    traffic, rates, settings = toy_setting(n_seq_max=64, n_ctx=65536)
    job = replace(job_of(*[(1000, 50 + 20 * i, 20 + i, 0) for i in range(10)]), mixed=True)
    took = []
    for _ in range(3):
        start = time.process_time()
        simulate(traffic, rates, settings, job)
        took.append(time.process_time() - start)
    assert min(took) < 0.25  # 0.02 on an idle core


def test_a_prediction_needs_a_machine_and_a_model_alone() -> None:
    machine, model = toy_machine(8 * MIB), toy_model()
    plan = plan_toy(model, machine)
    assert isinstance(plan, Plan)
    job = job_of((4, 100, 16, 0))
    assert job_prediction(machine, model, plan.llamacpp, job).seconds > 0


def test_one_sequence_costs_what_chat_is_told() -> None:
    traffic, rates, settings = toy_setting(n_seq_max=1, type_k="f16")
    costs = StepCosts(traffic, rates, settings)
    alone = Step(n_decode=1, n_outputs=1, decode_cells=300, used_cells=300)
    told = sum(decode_costs(traffic, rates, settings, 300).values())
    assert costs.seconds(alone) == pytest.approx(told)
    chunk = Step(n_decode=0, n_prefill=128, n_outputs=1, prefill_cells=64, used_cells=128)
    told = sum(prefill_costs(traffic, rates, settings, 128, 64).values())
    handover = costs.of(chunk)["handover"]  # which a prompt's prediction leaves out
    assert costs.seconds(chunk) - handover == pytest.approx(told, rel=1e-6)


def test_weights_are_sent_once_for_all_sequences() -> None:
    _, rates, settings = toy_setting()
    few = StepCosts(HALF, rates, replace(settings, op_offload_min_batch=32))
    assert "link" not in few.of(Step(n_decode=31, n_outputs=31))
    at_32 = few.of(Step(n_decode=32, n_outputs=32))["link"]
    at_128 = few.of(Step(n_decode=64, n_prefill=64, n_outputs=64))["link"]
    assert at_32 == at_128 == pytest.approx(1.0)  # 20 GB at 20 GB/s


def test_only_experts_in_use_are_sent() -> None:
    _, rates, settings = toy_setting()
    experts = replace(
        HALF, host=Reads(routed_bytes=10**9), streamed_bytes=16 * 10**9, expert_share=1 / 16
    )
    link = StepCosts(experts, rates, settings).of(Step(n_decode=32, n_outputs=32))["link"]
    assert link == pytest.approx(16 / 20 * (1 - (15 / 16) ** 32))


def test_sending_begins_where_it_is_quicker() -> None:
    _, rates, _ = toy_setting()
    tokens = crossing_tokens(HALF, rates, 512)
    assert tokens is not None
    costs = rates.host.dense
    sent_s = 1.0 + 20e9 * rates.gpus[0].dense.at(tokens)
    assert sent_s < 20e9 * costs.at(tokens)
    slow = replace(rates, link_bytes_s=(1e6,))
    assert crossing_tokens(HALF, slow, 512) is None


def test_sequences_of_one_cache_pass_over_each_other() -> None:
    traffic, rates, settings = toy_setting()
    many = Step(n_decode=8, n_outputs=8, decode_cells=100, used_cells=800)
    together = StepCosts(traffic, rates, settings).of(many)["attention"]
    apart = StepCosts(traffic, rates, replace(settings, kv_unified=False)).of(many)["attention"]
    assert together >= apart > 0


def test_the_workload_names_what_is_made_small() -> None:
    traffic, rates, settings = toy_setting(op_offload=False)
    chat = Workload(n_ctx=512, prompt_tokens=64, output_tokens=16)
    job = replace(chat, kind="batch", n_seq_max=8)
    assert cost_s(traffic, rates, settings, chat) == turn_s(traffic, rates, settings, chat)
    assert cost_s(traffic, rates, settings, job) == request_s(traffic, rates, settings, job)
    shared = replace(job, shared_tokens=48)
    assert request_s(traffic, rates, settings, shared) < request_s(traffic, rates, settings, job)
