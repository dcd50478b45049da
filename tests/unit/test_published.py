"""The published measurements: a rule, sources, and a prediction for each row."""

import json

import pytest

from benchmarks.predict_published import DATA, Row, cause, machine_of, predict_row, summary
from loadmaster.model.shapes.library import parse_shape

CONTENT = json.loads(DATA.read_text("utf-8"))
ROWS = CONTENT["rows"]


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOADMASTER_HOME", str(tmp_path_factory.getbasetemp() / "published"))


def test_there_are_enough_rows_each_with_its_source() -> None:
    assert len(ROWS) >= 25
    assert all(row["source"].startswith("https://") for row in ROWS)
    assert len(CONTENT["rule"]) > 3
    assert all(one["what"] and one["why"] for one in CONTENT["excluded"])


def test_one_row_for_each_shape_machine_and_placement() -> None:
    keys = [
        (r["gpu"], r["n_gpus"], r["model"], r.get("n_gpu_layers"), r.get("n_cpu_moe")) for r in ROWS
    ]
    assert len(set(keys)) == len(keys)


def test_every_machine_and_model_is_known() -> None:
    for row in ROWS:
        machine = machine_of(row)
        assert len(machine.gpus) == row["n_gpus"]
        assert machine.gpus[0].bandwidth_bytes_s, row["gpu"]
        parse_shape(f"shape:{row['model']}")


def test_the_published_placement_is_kept() -> None:
    row = next(row for row in ROWS if row.get("n_gpu_layers") == 16)
    predicted = predict_row(row)
    assert predicted.kind == "GPU and RAM"
    assert predicted.bound_by in ("ram-bandwidth", "cpu-compute")


def test_a_prediction_is_in_the_right_region() -> None:
    row = next(r for r in ROWS if r["n_gpus"] == 2 and r["model"] == "llama-3-70b@Q4_K_M")
    assert abs(predict_row(row).error_pct) < 40


def a_row(predicted: float | None, **more: object) -> Row:
    given = {"label": "x", "measured_tok_s": 10.0, "bound_by": "", "n_expert": 0, "kind": "one GPU"}
    return Row(predicted_tok_s=predicted, vram_share=None, **{**given, **more})  # type: ignore[arg-type]


def test_errors_count_without_their_sign() -> None:
    figures = summary([a_row(9.0), a_row(12.0), a_row(None)])
    assert figures == {"n": 3, "median": 20.0, "p90": 100.0}


def test_an_outlier_has_a_cause() -> None:
    kinds = {
        cause(a_row(99.0)),
        cause(a_row(99.0, label="Apple M1")),
        cause(a_row(99.0, kind="GPU and RAM")),
        cause(a_row(99.0, kind="GPU and RAM", n_expert=8)),
        cause(a_row(None)),
    }
    assert len(kinds) == 5
