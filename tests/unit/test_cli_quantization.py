"""`loadmaster quantization` from the command line."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from loadmaster.model.codes import NF4
from loadmaster.plan.hf_weights import four_bit_allocations
from tests.cli_parts import Capture, document, said

SVG = "{http://www.w3.org/2000/svg}"


def test_the_table(capsys: Capture) -> None:
    code, out, _ = said(capsys, "quantization")
    assert code == 0
    table = out.split("\n\n")[1]
    lines = {line.split("  ")[1]: line for line in table.splitlines()}
    assert "4.127" in lines["nf4, double"]
    assert "9.20 %" in lines["nf4, double"]
    assert "8.008" in lines["int8"]
    assert "to compare with" in lines["int4"]
    assert "-1.0000 -0.6962 -0.5251" in out


def test_bits_are_a_plan_s_bytes(capsys: Capture) -> None:
    content = document(capsys, "quantization", "--rows", "1000", "--columns", "96")
    assert content["schema_version"] == 1
    by_name = {one["name"]: one for one in content["formats"]}
    assert by_name["nf4"]["bits_per_weight"] == 8 * sum(four_bit_allocations(96000, False)) / 96000
    assert by_name["int8"]["block"] == 96
    assert [row["block"] for row in by_name["nf4"]["by_block"]] == [32, 64]
    assert content["codes"]["nf4"] == list(NF4.values)


def test_weights_there_and_back(capsys: Capture) -> None:
    code, out, _ = said(capsys, "quantization", "--weights", "0.6,-2, 0.9")
    assert code == 0
    nf4 = next(line for line in out.splitlines() if line.split()[:1] == ["nf4"])
    assert nf4.split()[1:4] == ["11", "0", "12"]
    rows = document(capsys, "quantization", "--weights", "0.6 -2 0.9")["weights"]
    assert [row["code"] for row in rows] == ["nf4", "fp4", "int4", "int8"]
    assert [row["kept"] for row in rows] == [[11, 0, 12], [4, 11, 5], [2, -7, 3], [38, -127, 57]]
    assert rows[0]["scale"] == 2
    assert rows[0]["weights"] == pytest.approx([0.67583, -2, 0.88142], abs=1e-4)
    assert rows[3]["relative_error"] < 0.01 < rows[0]["relative_error"]


@pytest.mark.parametrize("given", ["", "0.5,abc", "inf", "nan"])
def test_what_is_no_weight(capsys: Capture, given: str) -> None:
    code, _, err = said(capsys, "quantization", "--weights", given)
    assert code == 2
    assert "--weights" in err


def test_the_plots(capsys: Capture, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "plots"
    assert said(capsys, "quantization", "--plots", str(folder), "--columns", "256")[0] == 0
    roots = {path.name: ElementTree.fromstring(path.read_text()) for path in folder.iterdir()}
    assert sorted(roots) == [
        "quantization-bits.svg", "quantization-error.svg", "quantization-values.svg",
    ]  # fmt: skip
    marks = list(roots["quantization-values.svg"].iter(f"{SVG}line"))
    assert len(marks) == 255 + 16 + 15 + 15
    lines = list(roots["quantization-error.svg"].iter(f"{SVG}polyline"))
    assert len(lines) == 4
    for line in lines:
        places = [tuple(map(float, one.split(","))) for one in line.get("points", "").split()]
        assert len(places) == 4  # blocks of 32, 64, 128, 256
        assert all(0 <= x <= 720 and 0 <= y <= 340 for x, y in places)
        assert [y for _, y in places] == sorted((y for _, y in places), reverse=True)
    assert len(list(roots["quantization-bits.svg"].iter(f"{SVG}polyline"))) == 2


def test_the_plots_of_rows_of_one_block(capsys: Capture, tmp_path: Path) -> None:
    assert said(capsys, "quantization", "--plots", str(tmp_path), "--columns", "32")[0] == 0
    assert len(list(tmp_path.glob("*.svg"))) == 3


def test_plots_need_a_folder(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert said(capsys, "quantization", "--plots", str(tmp_path / "file" / "x"))[0] == 2
