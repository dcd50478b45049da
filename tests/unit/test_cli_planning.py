"""The driver around the planner: it asks the engine what the planner asks, and clamps wishes."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from loadmaster.errors import NotFoundError, UsageError
from loadmaster.machine.profiles import load_profile
from loadmaster.model.source import read_model
from loadmaster.model.types import ModelSpec
from loadmaster.plan.budget import make_budget
from loadmaster.plan.overhead import default_overheads
from loadmaster.plan.types import (
    CPU,
    BufferSizes,
    DoesNotFit,
    EngineSettings,
    Knobs,
    Plan,
    Sizing,
    SizingFailure,
    Workload,
)
from loadmaster.tasks.planning import (
    PlanRefusedError,
    PlanRequest,
    demo_model,
    model_path,
    plan_model,
    read_adapter,
    require_plan,
)
from loadmaster.units import MIB, Bytes


def request(vram: str | None = None, **changes: object) -> PlanRequest:
    machine = load_profile("rtx4090-24g")
    base = PlanRequest(
        model=read_model(demo_model()),
        machine=machine,
        workload=Workload(n_ctx=512),
        budget=make_budget(machine, vram),
        knobs=Knobs(),
        overheads=default_overheads(machine.gpus),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


class Table:
    """Sizes of an engine that needs 7 MiB of compute buffer everywhere."""

    def __init__(self) -> None:
        self.asked: list[EngineSettings] = []

    def sizes(
        self, model: ModelSpec, settings: Iterable[EngineSettings]
    ) -> Mapping[EngineSettings, Sizing | SizingFailure]:
        answer: dict[EngineSettings, Sizing | SizingFailure] = {}
        for item in settings:
            self.asked.append(item)
            rows = (_row("gpu:0"), _row(CPU))
            answer[item] = Sizing(buffers=rows, n_ctx=item.n_ctx)
        return answer


def _row(device: str) -> BufferSizes:
    size = Bytes(7 * MIB)
    return BufferSizes(device=device, model_bytes=size, context_bytes=size, compute_bytes=size)


def test_what_the_planner_asks_the_engine_answers() -> None:
    table = Table()
    plan = plan_model(request(), table)
    assert isinstance(plan, Plan)
    assert table.asked
    assert plan.device("gpu:0").of("compute") == 7 * MIB
    assert {item.source for item in plan.device("gpu:0").items if item.kind == "compute"} == {
        "engine"
    }


def test_without_an_engine_the_plan_rests_on_bounds_and_says_so() -> None:
    plan = plan_model(request(), None)
    assert isinstance(plan, Plan)
    assert "bound" in {item.source for item in plan.devices[0].items if item.kind == "compute"}
    assert any("no engine build" in note for note in plan.notes)


def test_all_layers_are_what_the_model_has() -> None:
    plan = plan_model(request(knobs=Knobs(n_gpu_layers=1 << 20)), None)
    assert isinstance(plan, Plan)
    assert plan.llamacpp.n_gpu_layers == plan.n_layer + 1


def test_a_refusal_becomes_an_error_with_its_numbers() -> None:
    # A GPU below its own overhead is left out, so the layers that are asked for have no place.
    outcome = plan_model(request("642MiB", knobs=Knobs(n_gpu_layers=7)), None)
    assert isinstance(outcome, DoesNotFit)
    with pytest.raises(PlanRefusedError, match="does not fit at n_ctx 512") as caught:
        require_plan(outcome)
    [short] = outcome.shortfalls
    assert caught.value.numbers == {f"shortfall_bytes.{short.device}": short.bytes}
    assert caught.value.exit_code == 3


def test_more_tokens_than_the_model_knows_are_refused() -> None:
    with pytest.raises(UsageError, match="n_ctx 4096 is beyond the 2048 tokens") as caught:
        plan_model(request(workload=Workload(n_ctx=4096)), None)
    assert caught.value.hint == "`--ctx 2048` is the most it takes"


def test_gpu_layers_without_a_gpu_are_refused_not_ignored() -> None:
    wish = request(knobs=Knobs(n_gpu_layers=3))
    bare = replace(wish, machine=replace(wish.machine, gpus=()))
    with pytest.raises(UsageError, match="-ngl"):
        plan_model(bare, None)


def test_smaller_caps_keep_their_reason() -> None:
    smaller = request("8GiB").with_caps({"gpu:0": Bytes(5 * MIB)}, "less this")
    assert smaller.budget.cap("gpu:0") == 5 * MIB
    assert smaller.budget.origin["gpu:0"] == "`--vram 8GiB`, less this"
    assert "less this" not in smaller.budget.origin[CPU]


def test_demo_is_the_packaged_model_unless_a_file_has_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_path("demo") == demo_model()
    (tmp_path / "demo").touch()
    assert model_path("demo") == Path("demo")
    with pytest.raises(NotFoundError, match=r"nothing\.gguf"):
        model_path("nothing.gguf")


def test_an_adapter_counts_with_its_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "lora.gguf"
    file.write_bytes(b"x" * 1000)
    adapter = read_adapter(str(file), 0.5)
    assert (adapter.size_bytes, adapter.scale, adapter.path) == (1000, 0.5, str(file))
    with pytest.raises(NotFoundError):
        read_adapter(str(tmp_path / "none.gguf"), 1.0)


def test_a_split_is_for_gpus_that_are_there() -> None:
    two = request(knobs=Knobs(layers_per_device=(2, 4)))
    with pytest.raises(UsageError, match="`-ts 2,4` is for 2 GPUs, and rtx4090-24g has 1"):
        plan_model(two, None)
    with pytest.raises(UsageError, match="`-ts` fixes layers on the GPU"):
        plan_model(replace(two, machine=load_profile("cpu-64g")), None)
