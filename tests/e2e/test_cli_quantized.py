"""Checkpoints that come quantized, and FP8, through the command people type."""

import json
from pathlib import Path

import pytest

from tests.cli_parts import in_own_process
from tests.quantized_parts import quantized

SMALL = ("-c", "256", "-ub", "64", "--temp", "0", "-n", "8")


def run(*words: str) -> tuple[int, str, str]:
    return in_own_process("run", *words, *SMALL)


@pytest.mark.parametrize(("kind", "label"), [("nf4-nested", "NF4"), ("fp8-rows", "FP8")])
def test_it_runs_as_it_is_and_is_not_quantized_again(tmp_path: Path, kind: str, label: str) -> None:
    folder = quantized(tmp_path, kind)
    code, out, err = run(str(folder), "Hello", "--json")
    assert code == 0, err
    value = json.loads(out)
    assert value["usage"]["completion_tokens"] > 0
    assert value["plan"]["model"]["quantization"] == label
    rows = {row["kind"]: row for row in value["memory"]}
    for name in ("model", "kv"):
        assert rows[name]["planned_bytes"] == rows[name]["measured_bytes"]
    assert rows["total"]["measured_bytes"] <= rows["total"]["planned_bytes"]
    code, _, err = run(str(folder), "Hello", "--quantize", "nf4")
    assert code == 2
    assert f"is {label} already" in err
    assert "leave `--quantize` out" in err


def test_fp8_runs_without_a_gpu(checkpoint: Path) -> None:
    code, out, err = run(str(checkpoint), "Hello", "--quantize", "fp8", "--json")
    assert code == 0, err
    value = json.loads(out)
    assert value["plan"]["engine"]["quantize"] == "fp8"
    rows = {row["kind"]: row for row in value["memory"]}
    assert rows["model"]["planned_bytes"] == rows["model"]["measured_bytes"]
