"""`doctor --measure` of the transformers engine: what is asked, and what becomes of the answers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loadmaster.engine import builds, probe_checkpoint
from loadmaster.engine.process import Engine
from loadmaster.engine.timing import (
    Question,
    TimeAttention,
    TimeLink,
    TimeProducts,
    TimeSmall,
    TimeSteps,
)
from loadmaster.engine.types import EngineBuild, LoadRequest
from loadmaster.errors import EngineMissingError
from loadmaster.interfaces.cli.measured import measured_text
from loadmaster.machine.measurements import Measurements
from loadmaster.machine.profiles import load_profile
from loadmaster.model.hf_source import read_checkpoint
from loadmaster.plan.hf_rates import host_rates, timed
from loadmaster.plan.types import TransformersSettings
from loadmaster.schema import from_json, to_json
from loadmaster.tasks import doctor
from loadmaster.tasks.measured import keep, with_measurements
from loadmaster.tasks.measuring import torch_machine
from loadmaster.tasks.measuring.torch_machine import measure_torch
from tests import checkpoint_parts as parts

LAYER_S, STEP_S, PART_S = 2e-4, 1e-3, 3e-5
BUILD = EngineBuild(id="transformers-5.23.0", target="cpu", version="", root=Path("/"))


class Worker:
    """Stands for the engine: 10 GB/s, and layers that take what they take."""

    def __init__(self) -> None:
        self.n_layer = 0
        self.loaded: list[str] = []

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def load(self, request: LoadRequest, **_: Any) -> None:
        self.n_layer = read_checkpoint(request.model_path).n_layer
        assert isinstance(request.settings, TransformersSettings)
        self.loaded.append(request.settings.quantize)

    def time(self, question: Question) -> tuple[float, ...] | None:
        match question:
            case TimeProducts(type="f32"):
                return None
            case TimeProducts():
                size = torch_machine._size_bytes(question.type, question.n_out, question.n_in)
                points = [used * size / 10e9 for _, used in question.points]
                return tuple(s for s in points for _ in range(question.runs))
            case TimeSteps():
                return (1.0, *(STEP_S + self.n_layer * LAYER_S,) * question.n_steps)
            case TimeSmall(operation="part"):
                parts = self.n_layer * (question.n_tokens - 1) * PART_S
                return (STEP_S + parts,) * question.runs
            case TimeSmall() | TimeAttention() | TimeLink():
                return (1e-3,) * question.runs
        return None


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Measurements:
    monkeypatch.setattr(Engine, "start", lambda *_, **__: Worker())
    monkeypatch.setattr(torch_machine, "disk_read_bytes_s", lambda folder: 1e9)
    return measure_torch(BUILD, load_profile("cpu-64g"), tmp_path)


def test_layers_and_what_is_outside_them_are_told_apart(measured: Measurements) -> None:
    layers = {layer.kind: layer.seconds for layer in measured.devices[0].layers}
    assert set(layers) == {"none", "nf4", "nf4-double", "int8", "part"}
    assert layers["none"] == pytest.approx(LAYER_S)
    assert layers["part"] == pytest.approx(PART_S)
    assert measured.step_s == pytest.approx(STEP_S)


def test_every_kind_of_weights_is_timed_and_what_cannot_be_is_named(measured: Measurements) -> None:
    row = measured.devices[0]
    assert {point.type for point in row.products} == {"bf16", "nf4", "nf4-double", "int8"}
    assert row.not_measured == ("f32",)
    assert all(point.s_per_byte == pytest.approx(1e-10) for point in row.products)
    assert measured.engine == "transformers"


def test_figures_are_kept_for_the_build_and_read_by_plans(
    measured: Measurements, tmp_path: Path
) -> None:
    machine = replace(load_profile("cpu-64g"), measured=None)
    keep(machine, BUILD.id, measured, tmp_path)
    assert from_json(Measurements, to_json(measured)) == measured
    found = with_measurements(machine, BUILD.id, tmp_path)
    assert timed(found, "cpu") == measured.devices[0]
    assert with_measurements(machine, "0.3.36-cpu", tmp_path).measured is None
    half = measured.devices[0].n_threads // 2
    settings = replace(parts.SETTINGS, quantize="nf4", double_quant=True, n_threads=half)
    rates = host_rates(found, parts.shape(), settings)
    assert rates.launch_s == pytest.approx(LAYER_S)
    assert rates.part_s == pytest.approx(PART_S)
    assert rates.curves["nf4"].at(1) == pytest.approx(2e-10), "half the threads, twice the time"


def test_what_was_measured_is_shown(measured: Measurements) -> None:
    text = measured_text(measured)
    assert "nf4-double" in text
    assert "layer, nf4" in text
    assert "200 µs at the least" in text


def test_both_engines_are_measured_where_both_are(monkeypatch: pytest.MonkeyPatch) -> None:
    timed_builds: list[str] = []

    def note(build: EngineBuild, timer: Callable[..., object], report: object) -> None:
        timed_builds.append(build.id)

    llamacpp = replace(BUILD, id="0.3.36-cpu")
    monkeypatch.setattr(doctor, "_keep_measured", note)
    monkeypatch.setattr(builds, "list_builds", lambda: (llamacpp,))
    monkeypatch.setattr(builds, "find_build", lambda: llamacpp)
    monkeypatch.setattr(doctor, "find_python_build", lambda: BUILD)
    doctor.measure(lambda _: None)
    assert timed_builds == ["0.3.36-cpu", BUILD.id]
    monkeypatch.setattr(builds, "list_builds", lambda: ())
    doctor.measure(lambda _: None)
    assert timed_builds[2:] == [BUILD.id]


def test_without_any_engine_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> EngineBuild:
        raise EngineMissingError("no engine")

    monkeypatch.setattr(doctor, "find_python_build", missing)
    monkeypatch.setattr(builds, "find_build", missing)
    with pytest.raises(EngineMissingError):
        doctor.measure(lambda _: None)


def test_the_probe_is_a_checkpoint_of_holes(tmp_path: Path) -> None:
    model = read_checkpoint(probe_checkpoint.write(tmp_path, 5))
    assert (model.n_layer, model.architecture, model.dtype) == (5, "llama", "bf16")
    assert model.n_vocab == probe_checkpoint.N_VOCAB
