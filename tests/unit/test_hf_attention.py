"""Which attention a plan for the transformers engine names, and what its small caches take."""

from dataclasses import replace

import pytest

from loadmaster.errors import UsageError
from loadmaster.machine.profiles import load_profile
from loadmaster.machine.types import Machine
from loadmaster.plan.hf_attention import attention_text, kernels_text
from loadmaster.plan.hf_caches import cell_bytes, group_of
from tests import checkpoint_parts as parts

CARD = load_profile("rtx4090-24g")
OLD = replace(CARD, gpus=(replace(CARD.gpus[0], compute_capability=(7, 5)),))


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (CARD, "FlashAttention-2"),
        (OLD, "compute capability 7.5, flash wants 8.0"),
        (load_profile("cpu-64g"), "flash kernels for the CPU"),
    ],
)
def test_a_plan_says_which_attention_it_gets(machine: Machine, expected: str) -> None:
    plan = parts.fitting(parts.shape(), machine, quantize="nf4", n_threads=1)
    (note,) = [note for note in plan.notes if note.startswith("attention is")]
    assert expected in note


def test_spelled_out_attention_says_why() -> None:
    model = parts.shape()
    plan = parts.fitting(model, CARD, quantize="nf4", flash_attn=False)
    assert any("as `-fa off` asks" in note for note in plan.notes)
    capped = replace(model, softcap=True)
    assert "caps its scores" in attention_text(CARD.gpus, capped, parts.SETTINGS)
    with pytest.raises(UsageError, match="caps its scores"):
        parts.plan(capped, CARD, quantize="nf4", flash_attn=True)
    assert "heads of up to 256" in kernels_text(CARD.gpus, 512)


def test_flash_is_refused_where_the_hardware_has_none() -> None:
    with pytest.raises(UsageError, match=r"compute capability 8\.0, and this is NVIDIA"):
        parts.plan(parts.shape(), OLD, quantize="nf4", flash_attn=True)
    parts.fitting(parts.shape(), CARD, quantize="nf4", flash_attn=True)


@pytest.mark.parametrize(("head", "group"), [(128, 32), (96, 32), (80, 16), (16, 16), (24, 8)])
def test_a_group_divides_a_head(head: int, group: int) -> None:
    assert group_of(head) == group
    assert cell_bytes("q8_0", 4 * head, 4) == (4 * head, 4 * head // group * 2)
    assert cell_bytes("q4_0", 4 * head, 4) == (2 * head, 4 * head // group * 2)
    assert cell_bytes("bf16", 4 * head, 4) == (8 * head,)


def test_caches_in_8_and_4_bits_take_what_ggmls_types_take() -> None:
    sizes = {
        kind: parts.fitting(parts.shape(), quantize="nf4", type_k=kind, type_v=kind)
        .device("gpu:0").of("kv")
        for kind in ("bf16", "q8_0", "q4_0")
    }  # fmt: skip
    assert sizes["q8_0"] * 32 == sizes["bf16"] // 2 * 34
    assert sizes["q4_0"] * 32 == sizes["bf16"] // 2 * 18


def test_a_cache_in_8_bits_is_proposed_and_frees_what_it_says() -> None:
    plan = parts.fitting(parts.shape(), quantize="nf4")
    (found,) = [one for one in plan.alternatives if one.flags == ("--kv", "q8_0")]
    given = parts.fitting(parts.shape(), quantize="nf4", type_k="q8_0", type_v="q8_0")
    assert given.workload.n_ctx == plan.workload.n_ctx
    freed = plan.device("gpu:0").planned_bytes - given.device("gpu:0").planned_bytes
    assert found.frees_bytes["gpu:0"] == freed > 0
    assert all(one.flags[0] != "--kv" for one in given.alternatives)
