"""What is published of quality, which candidates are beaten, and which is taken."""

from dataclasses import replace
from typing import Any

import pytest

from loadmaster.plan.compare import Candidate, Limits, choose, dominated, shown
from loadmaster.plan.quality import Figure, Quality, family_key, quality_of
from loadmaster.plan.types import (
    CPU,
    DevicePlan,
    DoesNotFit,
    EngineSettings,
    Plan,
    Prediction,
    Workload,
)
from loadmaster.units import Bytes

_ENGINE = EngineSettings(
    n_gpu_layers=0, layers_per_device=(), overrides=(), n_ctx=4096, n_seq_max=1, n_batch=512,
    n_ubatch=512, n_outputs_max=1, type_k="f16", type_v="f16", flash_attn=True, offload_kqv=True,
    op_offload=False, op_offload_min_batch=32, swa_full=False, kv_unified=False, load_mode="none",
    use_extra_bufts=True, n_threads=8, n_threads_batch=8,
)  # fmt: skip


def a_plan(tok_s: float | None) -> Plan:
    host = DevicePlan(
        id=CPU, name="host", budget_bytes=Bytes(1), budget_origin="", items=(),
        mapped_bytes=Bytes(0),
    )  # fmt: skip
    predicted = Prediction(
        decode_tok_s=tok_s, prefill_tok_s=None, ttft_s=None, bound_by="x", basis="table"
    )
    return Plan(
        model_name="m", architecture="llama", quantization="Q", model_files=(), model_stamp="",
        file_bytes=Bytes(1), n_layer=1, machine_name="here", workload=Workload(), engine=_ENGINE,
        devices=(host,), predicted=predicted,
    )  # fmt: skip


def candidate(label: str, tok_s: float | None, kl: float | None, **more: Any) -> Candidate:
    def figure(value: float | None) -> Figure | None:
        return None if value is None else Figure(value=value, measured_on="x", source="y")

    mmlu = more.pop("mmlu", None)
    zero = Figure(value=0.0, measured_on="x", source="y")
    fits = more.pop("fits", True)
    plan = a_plan(tok_s)
    refused = DoesNotFit(
        model_name="m", workload=Workload(), engine=_ENGINE, devices=plan.devices, shortfalls=(),
        nearest=(),
    )  # fmt: skip
    given = {"model": "m", "type_k": "f16", "type_v": "f16", **more}
    return Candidate(
        reference=label, quantization=label, file_bytes=Bytes(1),
        quality=Quality(weights_kl=figure(kl), cache_kl=zero, mmlu=figure(mmlu)),
        outcome=plan if fits else refused, **given,
    )  # fmt: skip


LADDER = (
    candidate("Q8_0", 2.0, 0.001), candidate("Q4_K_M", 6.0, 0.03), candidate("Q3_K_M", 9.0, 0.08),
    candidate("Q2_K", 8.0, 0.33), candidate("IQ2_XS", 30.0, 0.55),
)  # fmt: skip


# ---- published figures


def test_figures_have_a_source() -> None:
    quality = quality_of("Meta-Llama-3-8B-Instruct", "llama", "Q4_K_M", "q8_0", "q8_0")
    assert quality.weights_kl is not None
    assert quality.weights_kl.value == 0.028152
    assert "perplexity/README.md" in quality.weights_kl.source
    assert quality.cache_kl is not None
    assert "#7412" in quality.cache_kl.source
    assert quality.mmlu is not None
    assert quality.mmlu.value == 64.64
    assert quality.kl == pytest.approx(0.029132)


def test_what_nobody_published_is_unknown() -> None:
    quality = quality_of("x", "llama", "Q4_K_XXL", "q4_0", "q4_0")
    assert (quality.weights_kl, quality.cache_kl, quality.mmlu, quality.kl) == (None,) * 4


def test_the_published_weights_differ_in_nothing() -> None:
    assert quality_of("gpt-oss-120b", "gpt-oss", "MXFP4_MOE", "f16", "f16").kl == 0.0
    assert quality_of("any", "llama", "MXFP4_MOE", "f16", "f16").kl is None


@pytest.mark.parametrize("name", ["Meta-Llama-3-70B-Instruct", "llama-3-70b", "Llama 3 70B"])
def test_names_of_one_model(name: str) -> None:
    assert family_key(name) == "llama-3-70b"


def test_a_later_model_is_another_one() -> None:
    assert quality_of("Llama-3.1-8B-Instruct", "llama", "Q8_0", "f16", "f16").mmlu is None


# ---- the front


def test_the_beaten_are_marked_with_what_beats_them() -> None:
    assert dominated(LADDER) == (None, None, None, 2, None)


def test_models_are_compared_by_mmlu_alone() -> None:
    large = candidate("70B", 4.0, 0.5, model="large", mmlu=75.0)
    small = candidate("8B", 3.0, 0.001, model="small", mmlu=65.0)
    assert dominated((large, small)) == (None, 0)
    assert dominated((large, replace(small, quality=LADDER[0].quality))) == (None, None)


def test_equals_do_not_beat_each_other() -> None:
    twin = candidate("Q4_K_M", 6.0, 0.03)
    assert dominated((twin, replace(twin, reference="copy"))) == (None, None)


def test_a_smaller_cache_is_shown_where_it_helps() -> None:
    exact = candidate("Q4_K_M", 6.0, 0.03)
    same = candidate("Q4_K_M", 6.1, 0.031, type_k="q8_0", type_v="q8_0")
    faster = candidate("Q4_K_M", 6.4, 0.031, type_k="q8_0", type_v="q8_0")
    alone = candidate("Q4_K_M", 6.4, 0.031, type_k="q8_0", type_v="q8_0")
    assert shown((exact, same)) == (exact,)
    assert shown((exact, faster)) == (exact, faster)
    plain = replace(exact, type_k="bf16", type_v="bf16", engine="transformers")
    assert shown((plain, replace(same, engine="transformers"))) == (plain,)
    assert shown((replace(exact, outcome=candidate("x", 1, 0, fits=False).outcome), alone))[1:]


# ---- the choice


@pytest.mark.parametrize(
    ("limits", "label", "rule"),
    [
        (Limits(), "Q4_K_M", "the lowest KL divergence at 5 tok/s or more"),
        (Limits(min_speed=7), "Q3_K_M", "at 7 tok/s or more"),
        (Limits(goal="speed"), "Q3_K_M", "the fastest with a KL divergence up to 0.2"),
        (Limits(goal="speed", max_kl=1), "IQ2_XS", "the fastest with a KL divergence up to 1"),
        (Limits(min_speed=1), "Q8_0", "the lowest KL divergence at 1 tok/s or more"),
        (Limits(max_kl=0.01), "Q8_0", "the fastest, for nothing reaches 5 tok/s"),
    ],
)
def test_the_rule_and_what_it_takes(limits: Limits, label: str, rule: str) -> None:
    choice = choose(LADDER, limits)
    assert [one.reference for one in choice.picked] == [label]
    assert rule in choice.rule


def test_nothing_keeps_what_was_asked() -> None:
    assert choose(LADDER, Limits(min_speed=100)).picked == ()
    assert choose(LADDER, Limits(max_kl=0.0001)).picked == ()
    assert choose((candidate("x", None, 0.1, fits=False),), Limits()).picked == ()


def test_take_the_smaller_model() -> None:
    large = [
        candidate("70B-Q4", 2.0, 0.03, model="large", mmlu=80.0),
        candidate("70B-IQ2", 4.0, 0.5, model="large", mmlu=75.0),
    ]
    small = candidate("8B-Q8", 40.0, 0.001, model="small", mmlu=65.0)
    assert choose([*large, small], Limits(min_speed=20)).picked == (small,)
    assert choose([*large, small], Limits(min_speed=3)).picked == (large[1],)


def test_models_that_nothing_ranks_get_an_answer_each() -> None:
    one, other = candidate("a", 9, 0.03, model="a"), candidate("b", 9, 0.01, model="b")
    choice = choose((one, other), Limits())
    assert choice.picked == (one, other)
    assert choice.rule.startswith("the lowest KL divergence of each model")


def test_the_longest_context_then_the_better() -> None:
    pool = (
        candidate("long", 6, 0.1, largest_n_ctx=32768),
        candidate("short", 9, 0.01, largest_n_ctx=8192),
        candidate("fine", 6, 0.05, largest_n_ctx=32768),
    )
    assert choose(pool, Limits(goal="context")).picked == (pool[2],)


def test_where_no_speed_is_known_quality_decides() -> None:
    pool = (candidate("Q4", None, 0.03), candidate("Q8", None, 0.001))
    assert choose(pool, Limits()).picked == (pool[1],)
    assert choose(pool, Limits()).rule == "the lowest KL divergence"
    assert "speeds are unknown" in choose(pool, Limits(goal="speed")).rule
    assert choose(pool, Limits(min_speed=1)).picked == ()
    assert dominated(pool) == (None, None)
