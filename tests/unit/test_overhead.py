"""Host memory outside the engine's buffers: each term counts what it says."""

from dataclasses import replace

import pytest

from loadmaster.plan import overhead
from loadmaster.plan.choices import base_settings, first_choice
from loadmaster.plan.types import CPU, EngineSettings, Knobs, Override, Workload
from loadmaster.units import MIB
from tests.toy import toy_machine, toy_model


def settings_for(*, n_ubatch: int = 512, n_gpus: int = 0, **changes: object) -> EngineSettings:
    model, workload, knobs = toy_model(), Workload(n_ctx=2048), Knobs(n_ubatch=n_ubatch)
    choice = first_choice(model, workload, knobs)
    base = base_settings(choice, workload, knobs, n_gpus=n_gpus, n_threads=2)
    return replace(base, **changes)  # type: ignore[arg-type]


def test_a_vocabulary_costs_its_tokens_and_merges() -> None:
    plain = toy_model(n_vocab=1000)
    small = overhead.tokenizer_bytes(plain)
    merged = overhead.tokenizer_bytes(replace(plain, n_merges=500))
    assert merged - small == 500 * overhead.MERGE_BYTES
    larger = overhead.tokenizer_bytes(replace(plain, n_vocab=3000))
    assert larger - small == 2000 * overhead.TOKEN_BYTES


def test_byte_pair_tables_are_for_byte_pair_tokenizers() -> None:
    bpe = toy_model()
    spm = replace(bpe, tokenizer_model="llama")
    gap = overhead.tokenizer_bytes(bpe) - overhead.tokenizer_bytes(spm)
    assert gap == overhead.BPE_TABLES_BYTES
    assert overhead.tokenizer_bytes(replace(bpe, tokenizer_model="no_vocab")) == 0


def test_the_template_process_is_counted_for_models_with_a_template() -> None:
    model, overheads = toy_model(), overhead.default_overheads(())
    without = overhead.host_items(model, settings_for(), overheads)
    templated = replace(model, chat_template="{{ messages }}")
    with_template = overhead.host_items(templated, settings_for(), overheads)
    gap = sum(i.bytes for i in with_template) - sum(i.bytes for i in without)
    assert gap == overhead.TEMPLATE_BYTES


def test_a_line_editor_is_part_of_the_command() -> None:
    plain, editing = (overhead.default_overheads((), line_editor=on) for on in (False, True))
    assert editing.process_bytes - plain.process_bytes == overhead.LINE_EDITOR_BYTES


@pytest.mark.parametrize("architecture", ["llama", "qwen3next", "kimi-k3"])
def test_graphs_are_made_for_tensors_or_tokens(architecture: str) -> None:
    model = replace(toy_model(n_layer=2), architecture=architecture)
    small, large = (overhead.graph_bytes(model, settings_for(n_ubatch=n)) for n in (64, 2048))
    assert (large > small) is (architecture != "llama")
    assert small >= 1024 * overhead.GRAPH_NODE_BYTES


def test_work_is_the_widest_activation_of_a_step() -> None:
    model = toy_model(n_embd=256, n_ff=768)
    assert overhead.work_bytes(model, settings_for(n_ubatch=128)) == 128 * (768 * 73 // 64)


def test_without_flash_attention_work_is_a_row_for_each_head_and_cell() -> None:
    model = toy_model(n_embd=256, n_ff=256)  # four heads
    settings = settings_for(n_ubatch=64, flash_attn=False)
    assert overhead.work_bytes(model, settings) == 64 * 2 * 4 * 2048


def test_routed_tokens_are_sorted_by_expert() -> None:
    dense, routed = toy_model(n_ff=768), toy_model(n_ff=768, n_expert=8)
    settings = settings_for(n_ubatch=32)
    assert overhead.work_bytes(routed, settings) > 2 * overhead.work_bytes(dense, settings)


def test_nothing_is_worked_on_the_host_when_all_is_on_gpus() -> None:
    model = toy_model(n_layer=4)
    all_on_gpu = settings_for(n_gpus=1, n_gpu_layers=5, layers_per_device=(5,))
    assert overhead.work_bytes(model, all_on_gpu) == 0
    kept = replace(all_on_gpu, overrides=(Override(pattern="ffn_up", device=CPU),))
    assert overhead.work_bytes(model, kept) > 0


def test_weights_are_staged_whole_where_copies_are_not_asynchronous() -> None:
    model, virtual = toy_model(), toy_machine(MIB).gpus
    on_gpu = settings_for(n_gpus=1, n_gpu_layers=2, layers_per_device=(2,))
    largest = max(t.size_bytes for t in model.tensors if t.name != "token_embd.weight")
    assert overhead.staging_bytes(model, on_gpu, virtual) == largest
    cuda = (replace(virtual[0], backend="cuda"),)
    assert overhead.staging_bytes(model, on_gpu, cuda) == overhead.ASYNCHRONOUS_STAGING_BYTES
    assert overhead.staging_bytes(model, settings_for(), ()) == 0
