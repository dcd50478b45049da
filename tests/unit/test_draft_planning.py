"""Plans with a draft model: its lines, where it goes, and what cannot draft for what."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gguf_writer import tiny_llama, write_random
from benchmarks.shapes import build_tiny
from loadmaster.engine.types import MemoryReport
from loadmaster.errors import UsageError
from loadmaster.interfaces.cli.main import run
from loadmaster.interfaces.cli.render import settings_text
from loadmaster.machine.profiles import load_profile
from loadmaster.model.checkpoint import Stored
from loadmaster.model.hf_source import read_checkpoint
from loadmaster.model.shapes.library import parse_shape, shape_model
from loadmaster.model.source import read_model, read_tokens
from loadmaster.plan.budget import make_budget
from loadmaster.plan.codec import plan_from_json, plan_to_json
from loadmaster.plan.overhead import default_overheads
from loadmaster.plan.types import (
    CPU,
    DRAFT_STEP_TOKENS,
    BufferSizes,
    DoesNotFit,
    Knobs,
    Plan,
    TransformersSettings,
    Workload,
)
from loadmaster.tasks.drafting import check_draft, plan_with_draft
from loadmaster.tasks.measurement import compare
from loadmaster.tasks.planning import PlanRequest, demo_model, plan_model
from loadmaster.units import MIB, Bytes
from tests.hf_parts import write_llama

DEMO = read_model(demo_model())
LOOKUP = Knobs(n_draft=DRAFT_STEP_TOKENS - 1)
_NF4 = Stored(method="bnb4", label="NF4", bits=4)
# Nothing that could be made smaller to fit.
FIXED = replace(LOOKUP, type_k="f16", type_v="f16", n_ubatch=512, load_mode="none")


def request(
    vram: str | None = None, ram: str | None = None, profile: str = "rtx4090-24g"
) -> PlanRequest:
    machine = load_profile(profile)
    return PlanRequest(
        model=DEMO,
        machine=machine,
        workload=Workload(n_ctx=512),
        budget=make_budget(machine, vram, ram),
        knobs=LOOKUP,
        overheads=default_overheads(machine.gpus),
    )


def planned(given: PlanRequest) -> Plan:
    plan = plan_with_draft(given, DEMO, None)
    assert isinstance(plan, Plan)
    return plan


def test_the_draft_is_on_the_gpu_where_both_fit() -> None:
    plan = planned(request())
    assert plan.draft is not None
    assert plan.draft.device == "gpu:0"
    assert plan.draft.engine.n_ctx == plan.engine.n_ctx == 512
    assert plan.device("gpu:0").of("draft") > DEMO.weight_bytes // 2
    assert all(device.left_bytes >= 0 for device in plan.devices)
    assert "gpu:0" in plan.notes[-1]


def test_without_room_on_the_gpu_it_is_on_the_cpu() -> None:
    knobs = replace(FIXED, n_gpu_layers=7)
    alone = plan_model(replace(request(), knobs=knobs), None)
    assert isinstance(alone, Plan)
    needed = alone.device("gpu:0").needed_bytes
    narrow = replace(request(f"{(needed + MIB) // MIB}MiB"), knobs=knobs)
    plan = planned(narrow)
    assert plan.draft is not None
    assert plan.draft.device == CPU
    assert plan.device(CPU).of("draft") > 0
    assert plan.device("gpu:0").of("draft") == 0


def test_a_draft_that_fits_nowhere_is_refused_with_its_lines() -> None:
    alone = plan_model(replace(request("0", "1GiB"), knobs=FIXED), None)
    assert isinstance(alone, Plan)
    room = alone.device(CPU).needed_bytes + MIB
    narrow = replace(request("0", f"{room // MIB}MiB"), knobs=FIXED)
    refusal = plan_with_draft(narrow, DEMO, None)
    assert isinstance(refusal, DoesNotFit)
    assert any(item.kind == "draft" for device in refusal.devices for item in device.items)
    assert sum(short.bytes for short in refusal.shortfalls) > 0


def test_the_rest_of_the_ledger_stays_as_it_is() -> None:
    given = request("0")
    alone, plan = plan_model(given, None), planned(given)
    assert isinstance(alone, Plan)
    ours = [item for item in plan.device(CPU).items if item in given.overheads.draft_items]
    assert ours == []
    added = [item for item in plan.device(CPU).items if item not in alone.device(CPU).items]
    assert {item.kind for item in added} == {"draft", "overhead"}
    assert all("of the draft" in item.why or item.kind == "draft" for item in added)
    assert plan.engine == alone.engine


def test_every_token_of_a_draft_is_an_output() -> None:
    plan = plan_model(request(), None)
    plain = plan_model(replace(request(), knobs=Knobs()), None)
    assert isinstance(plan, Plan)
    assert isinstance(plain, Plan)
    assert (plain.llamacpp.n_outputs_max, plan.llamacpp.n_outputs_max) == (1, DRAFT_STEP_TOKENS)
    assert plan.device(CPU).of("output") == DRAFT_STEP_TOKENS * plain.device(CPU).of("output")
    assert "--draft lookup" in settings_text(plan)
    assert "--draft" not in settings_text(plain)


def test_a_plan_with_a_draft_survives_its_json() -> None:
    plan = planned(request())
    text = json.dumps(plan_to_json(plan))
    assert plan_from_json(json.loads(text)) == plan
    alone = replace(plan, draft=None)
    assert "draft" not in plan_to_json(alone)
    assert plan_from_json(plan_to_json(alone)) == alone
    assert f"--draft {plan.draft.model_files[0]}" in settings_text(plan)  # type: ignore[union-attr]


def test_the_speed_is_said_with_what_it_assumes() -> None:
    plan = planned(request("0"))
    assert plan.draft is not None
    assert plan.predicted.decode_tok_s is not None
    assert plan.draft.decode_tok_s is not None
    assert plan.draft.n_guessed == 0  # it takes as long as the model itself
    assert "not even if 80% of its tokens are right, an assumption" in plan.notes[-1]


def test_a_small_draft_is_predicted_to_pay() -> None:
    machine = load_profile("rtx4090-24g")
    large, small = (
        shape_model(parse_shape(f"shape:{name}@Q4_K_M")) for name in ("llama-3-70b", "llama-3.2-1b")
    )
    given = replace(
        request(), model=large, machine=machine, budget=make_budget(machine),
        workload=Workload(n_ctx=2048),
    )  # fmt: skip
    plan = plan_with_draft(given, small, None)
    assert isinstance(plan, Plan)
    assert plan.draft is not None
    assert plan.draft.device == "gpu:0"
    assert plan.draft.n_guessed
    assert plan.draft.decode_tok_s is not None
    assert plan.predicted.decode_tok_s is not None
    assert plan.draft.decode_tok_s > 1.2 * plan.predicted.decode_tok_s
    assert f"with {plan.draft.n_guessed} guessed in a step" in plan.notes[-1]


def test_measured_draft_buffers_stand_beside_their_line() -> None:
    plan = planned(request("0"))
    row = BufferSizes(
        device=CPU, model_bytes=Bytes(5 * MIB), context_bytes=Bytes(MIB), compute_bytes=Bytes(7)
    )
    report = MemoryReport(
        buffers=(), process_bytes=Bytes(MIB), process_peak_bytes=Bytes(MIB), mapped_bytes=Bytes(0),
        device_used_bytes={}, device_peak_bytes={}, device_denied={}, draft_buffers=(row,),
    )  # fmt: skip
    (found,) = [r for r in compare(plan, report, parent_bytes=Bytes(0)) if r.kind == "draft"]
    assert found.planned_bytes == plan.device(CPU).of("draft")
    assert found.measured_bytes == 6 * MIB + 7
    assert found.exact


def test_another_vocabulary_is_refused_with_the_first_difference(tmp_path: Path) -> None:
    path = write_random(tmp_path / "other.gguf", *tiny_llama())
    tokens = read_tokens(path)
    assert len(tokens) == 269
    with pytest.raises(UsageError) as refusal:
        check_draft(DEMO, read_model(path))
    first = next(i for i, t in enumerate(read_tokens(demo_model())) if t != tokens[i])
    assert f"token {first} is" in refusal.value.message
    check_draft(read_model(path), read_model(path))


def test_a_longer_list_is_padding_up_to_a_point(tmp_path: Path) -> None:
    short = read_model(write_random(tmp_path / "short.gguf", *tiny_llama(n_vocab=300)))
    padded = read_model(write_random(tmp_path / "padded.gguf", *tiny_llama(n_vocab=300 + 512)))
    long = read_model(write_random(tmp_path / "long.gguf", *tiny_llama(n_vocab=300 + 513)))
    check_draft(short, padded)
    check_draft(padded, short)
    with pytest.raises(UsageError, match="813 tokens instead of 300"):
        check_draft(short, long)


def test_recurrent_models_neither_draft_nor_are_drafted_for(tmp_path: Path) -> None:
    path = tmp_path / "mamba.gguf"
    write_random(path, *build_tiny("mamba-2.8b", "f16"))
    mamba = read_model(path)
    with pytest.raises(UsageError, match="recurrent state"):
        check_draft(DEMO, mamba)
    with pytest.raises(UsageError, match="recurrent state"):
        plan_model(replace(request(), model=mamba), None)


def test_the_two_formats_do_not_mix(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write_llama(tmp_path / "c"))
    with pytest.raises(UsageError, match="one is a GGUF, the other safetensors"):
        check_draft(DEMO, checkpoint)


def test_a_checkpoint_drafts_for_a_checkpoint(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write_llama(tmp_path / "c"))
    plan = plan_with_draft(replace(request(), model=checkpoint), checkpoint, None)
    assert isinstance(plan, Plan)
    assert plan.draft is not None
    assert isinstance(plan.draft.engine, TransformersSettings)
    assert plan.draft.engine.n_draft == 0
    assert plan.draft.engine.device_map == (("", plan.draft.device),)
    assert plan.device(plan.draft.device).of("draft") > 0
    assert plan_from_json(json.loads(json.dumps(plan_to_json(plan)))) == plan


def test_checkpoints_with_other_tokens_are_refused(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "a")
    other = write_llama(tmp_path / "b")
    path = other / "tokenizer.json"
    document = json.loads(path.read_text())
    vocabulary = document["model"]["vocab"]
    (first, a), (second, b) = list(vocabulary.items())[10:12]
    vocabulary[first], vocabulary[second] = b, a
    path.write_text(json.dumps(document))
    with pytest.raises(UsageError, match=f"token {min(a, b)} is"):
        check_draft(read_checkpoint(folder), read_checkpoint(other))


def test_a_window_of_a_checkpoint_takes_nothing_back(tmp_path: Path) -> None:
    changes = {"model_type": "mistral", "architectures": ["MistralForCausalLM"],
               "sliding_window": 24, "head_dim": 16}  # fmt: skip
    windowed = read_checkpoint(write_llama(tmp_path / "w", **changes))
    with pytest.raises(UsageError, match="the last 24 tokens"):
        plan_model(replace(request(), model=windowed), None)


def test_a_draft_checkpoint_is_checked_as_a_model_of_its_own(tmp_path: Path) -> None:
    model = read_checkpoint(write_llama(tmp_path / "c"))
    given = replace(request(), model=model)
    with pytest.raises(UsageError, match="writes no text"):
        plan_with_draft(given, replace(model, writes_text=False), None)
    flash = replace(given, knobs=replace(LOOKUP, flash_attn=True))
    with pytest.raises(UsageError, match="caps its scores"):
        plan_with_draft(flash, replace(model, softcap=True), None)
    on_cpu = replace(request("0", profile="cpu-64g"), model=model)
    with pytest.raises(UsageError, match="bitsandbytes restores them wrongly"):
        plan_with_draft(on_cpu, replace(model, n_ff=80, stored=_NF4), None)


def test_a_draft_that_is_wrong_on_the_cpu_stays_on_the_gpu_or_out(tmp_path: Path) -> None:
    model = read_checkpoint(write_llama(tmp_path / "c"))
    alone = plan_model(replace(request(), model=model), None)
    assert isinstance(alone, Plan)
    room = f"{alone.device('gpu:0').needed_bytes // MIB + 1}MiB"
    narrow = replace(request(room), model=model)
    beside = plan_with_draft(narrow, model, None)
    assert isinstance(beside, Plan)
    assert beside.draft is not None
    assert beside.draft.device == CPU
    only_gpu = plan_with_draft(narrow, replace(model, n_ff=80, stored=_NF4), None)
    assert isinstance(only_gpu, DoesNotFit)
    assert [short.device for short in only_gpu.shortfalls] == ["gpu:0"]


def test_beyond_its_training_a_draft_is_said_to_guess_poorly() -> None:
    short = replace(DEMO, n_ctx_train=256)
    plan = plan_with_draft(request(), short, None)
    assert isinstance(plan, Plan)
    assert "trained for 256 of the 512 tokens" in plan.notes[-1]
    assert not any("trained for" in note for note in planned(request()).notes)


def test_a_draft_of_a_checkpoint_alone_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """The model stays on the CPU and computes there; no layers are split."""
    words = [
        "plan",
        "shape:llama-3.1-8b@nf4",
        "--machine",
        "rtx3060-12g",
        "-ngl",
        "0",
        "-c",
        "2048",
    ]
    assert run([*words, "--json"]) == 0
    without = json.loads(capsys.readouterr().out)
    words += ["--draft", "shape:llama-3.2-1b@none"]
    assert run([*words, "--json"]) == 0
    beside = json.loads(capsys.readouterr().out)
    assert _line(beside, "cpu", "compute") == _line(without, "cpu", "compute") > 0
    assert run(words) == 0
    shown = capsys.readouterr().out
    assert "--draft shape:llama-3.2-1b@none" in shown
    assert "layers are split" not in shown


def test_a_shape_that_drafts_is_named_as_it_was_typed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    draft = "shape:llama-3.2-1b@Q8_0"
    words = ["plan", "shape:llama-3.1-8b@Q4_K_M", "--machine", "rtx3060-12g", "--draft", draft]
    assert run([*words, "-c", "2048"]) == 0
    settings = capsys.readouterr().out.split("settings as flags")[1].split("\n\n")[0]
    assert settings.endswith(f"--draft {draft}")
    assert str(tmp_path) not in settings


def _line(document: dict[str, Any], device: str, kind: str) -> int:
    plan = next(one for one in document["devices"] if one["id"] == device)
    return sum(line["bytes"] for line in plan["items"] if line["kind"] == kind)
