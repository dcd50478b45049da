"""`loadmaster plan --compare` from the command line, without an engine."""

import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from loadmaster.interfaces.cli.scatter import Point, scatter_text
from loadmaster.interfaces.cli.svg import scatter_svg
from loadmaster.machine.profiles import load_profile, save_profile
from loadmaster.tasks.planning import demo_model
from tests.cli_parts import Capture, document, said

TWO = ("shape:llama-3-8b@Q8_0", "shape:llama-3-8b@Q4_K_M")
HERE = ("--machine", "rtx3060-12g", "-c", "2048")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOADMASTER_HOME", str(tmp_path / "home"))


def test_the_table_the_plot_and_the_answer(capsys: Capture) -> None:
    code, out, _ = said(capsys, "plan", "--compare", *TWO, *HERE)
    assert code == 0
    assert "take shape:llama-3-8b@Q8_0" in out
    assert "rule: the lowest KL divergence at 5 tok/s or more" in out
    assert "KL divergence, 0.0014 at the top" in out
    assert "source: llama.cpp tools/perplexity/README.md" in out
    table = [line.split() for line in out.splitlines() if "llama-3-8b" in line]
    assert [row[2] for row in table[:2]] == ["Q8_0", "Q4_K_M"]


def test_the_json_has_every_candidate(capsys: Capture) -> None:
    content = document(capsys, "plan", "--compare", *TWO, *HERE)
    assert content["schema_version"] == 1
    rows = content["candidates"]
    assert [(row["quantization"], row["type_k"]) for row in rows] == [
        ("Q8_0", "f16"), ("Q8_0", "q8_0"), ("Q4_K_M", "f16"), ("Q4_K_M", "q8_0"),
    ]  # fmt: skip
    assert [row["picked"] for row in rows] == [True, False, False, False]
    assert all(row["fits"] and row["decode_tok_s"] > 5 for row in rows)
    assert rows[0]["weights_kl"]["value"] == 0.001355
    assert "README" in rows[0]["weights_kl"]["source"]
    assert rows[0]["mmlu"]["value"] == 65.23
    weights = rows[0]["weights_bytes"]
    assert sum(weights.values()) == pytest.approx(rows[0]["file_bytes"], rel=0.01)


def test_the_smaller_model_is_an_answer(capsys: Capture) -> None:
    models = ("shape:llama-3-70b@IQ2_XS", "shape:llama-3-8b@Q8_0")
    slow = document(capsys, "plan", "--compare", *models, *HERE, "--min-speed", "20")
    fast = document(capsys, "plan", "--compare", *models, *HERE, "--min-speed", "1")
    assert [row["reference"] for row in slow["candidates"] if row["picked"]] == [models[1]]
    assert [row["model"] for row in fast["candidates"] if row["picked"]] == ["llama-3-70b"]
    assert any("does not rank different models" in note for note in slow["notes"])


def test_what_nothing_reaches_says_what_would(capsys: Capture) -> None:
    code, out, err = said(
        capsys, "plan", "--compare", "shape:llama-3-70b@Q4_K_M", *HERE, "--min-speed", "10"
    )
    assert code == 3
    assert "llama-3-70b" in out  # the table all the same
    assert "nothing reaches 10 tok/s on rtx3060-12g: the fastest is" in err
    assert "--machine" in err
    assert "loadmaster plan shape:" in err
    assert "--min-speed" in err


def test_a_machine_of_unknown_speed(capsys: Capture, tmp_path: Path) -> None:
    machine = load_profile("cpu-64g")
    path = tmp_path / "here.json"
    save_profile(replace(machine, ram=replace(machine.ram, bandwidth_bytes_s=None)), path)
    words = ("--compare", *TWO, "--machine", str(path))
    code, out, _ = said(capsys, "plan", *words)
    assert (code, "take shape:llama-3-8b@Q8_0" in out) == (0, True)
    code, _, err = said(capsys, "plan", *words, "--min-speed", "5")
    assert (code, "doctor --measure" in err) == (2, True)


def test_a_quality_that_nothing_has(capsys: Capture) -> None:
    code, _, err = said(capsys, "plan", "--compare", *TWO, *HERE, "--max-kl", "0.001")
    assert code == 3
    assert "the lowest is 0.0014" in err
    assert "`--max-kl 0.0014`" in err


def test_a_longer_context_is_looked_for(capsys: Capture) -> None:
    models = ("shape:qwen3-8b@Q8_0", "shape:qwen3-8b@F16")
    content = document(
        capsys, "plan", "--compare", *models, "--machine", "rtx3060-12g", "--goal", "context"
    )
    longest = {row["quantization"]: row["largest_n_ctx"] for row in content["candidates"]}
    assert longest["Q8_0"] == 40960
    assert longest["F16"] < 40960


def test_a_fixed_cache_is_kept(capsys: Capture) -> None:
    content = document(capsys, "plan", "--compare", TWO[0], *HERE, "--kv", "q4_0")
    assert [row["type_k"] for row in content["candidates"]] == ["q4_0"]
    assert content["candidates"][0]["kl"] is None


def test_a_folder_of_files(capsys: Capture, tmp_path: Path) -> None:
    for name in ("a-Q8_0.gguf", "b-Q4_K_M.gguf", "mmproj-b.gguf", "readme.md"):
        shutil.copy(demo_model(), tmp_path / name)
    content = document(capsys, "plan", "--compare", str(tmp_path), "--machine", "cpu-64g")
    names = {Path(row["reference"]).name for row in content["candidates"]}
    assert names == {"a-Q8_0.gguf", "b-Q4_K_M.gguf"}


def test_an_empty_folder(capsys: Capture, tmp_path: Path) -> None:
    assert said(capsys, "plan", "--compare", str(tmp_path), *HERE)[0] == 4


def test_the_plot_as_a_file(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "plot.svg"
    assert said(capsys, "plan", "--compare", *TWO, *HERE, "--plot", str(path))[0] == 0
    root = ElementTree.fromstring(path.read_text())
    circles = root.findall("{http://www.w3.org/2000/svg}circle")
    assert [circle.get("class") for circle in circles] == ["picked", "point"]
    assert (
        said(capsys, "plan", "--compare", *TWO, *HERE, "--plot", str(tmp_path / "no" / "x.svg"))[0]
        == 2
    )


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (TWO, "2 models, and a plan is of one", "--compare"),
        ((TWO[0], "--goal", "speed"), "`--goal` chooses", "--compare --goal"),
        ((TWO[0], "--min-speed", "5"), "`--min-speed` chooses", "--compare"),
        (("--compare", "shape:llama-9"), "no shape `llama-9`", "nearest"),
        ((TWO[0], "--machine", "rtx4090"), "no machine profile", "rtx4090-24g"),
        (("--compare", *TWO, "--min-speed", "0"), "min-speed", ""),
    ],
)
def test_wrong_words(capsys: Capture, words: tuple[str, ...], message: str, hint: str) -> None:
    code, _, err = said(capsys, "plan", *words)
    assert code in (2, 4)
    assert message in err
    assert hint in err


def test_a_shape_plans_without_a_file(capsys: Capture) -> None:
    code, out, _ = said(capsys, "plan", "shape:llama-3-70b@Q4_K_M", "--machine", "rtx4090-24g")
    assert code == 0
    assert "39.59 GiB on disk" in out
    assert "note: a shape" in out


def test_the_prompt_changes_the_first_token(capsys: Capture) -> None:
    shape = ("shape:llama-3.2-3b", "--machine", "jetson-orin-64g", "-c", "2048")
    short = document(capsys, "plan", *shape, "--prompt-tokens", "16")
    long = document(capsys, "plan", *shape, "--prompt-tokens", "1024")
    assert short["predicted"]["ttft_s"] < long["predicted"]["ttft_s"]


# ---- plots by themselves


def a_point(letter: str, speed: float, kl: float, *, beaten: bool = False) -> Point:
    return Point(
        letter=letter, label=f"<{letter}>", speed=speed, kl=kl, beaten=beaten, picked=False
    )


def test_faster_is_right_and_better_is_up() -> None:
    lines = scatter_text([a_point("a", 1, 0.0), a_point("b", 50, 0.5, beaten=True)]).splitlines()
    row = {letter: i for i, line in enumerate(lines[1:-2]) for letter in "ab" if letter in line}
    assert row["a"] < row["b"]
    assert next(line for line in lines if "b." in line).index("b") > 40


def test_one_point_is_no_plot() -> None:
    assert scatter_text([a_point("a", 1, 0.1)]) == ""


def test_labels_are_escaped_and_nothing_is_drawn_outside() -> None:
    points = [a_point("a", 1, 0.0), a_point("b", 1, 0.0), a_point("c", 200, 2.2)]
    root = ElementTree.fromstring(scatter_svg(points))
    for circle in root.iter("{http://www.w3.org/2000/svg}circle"):
        assert 0 <= float(circle.get("cx", "-1")) <= 720
        assert 0 <= float(circle.get("cy", "-1")) <= 440
    assert ElementTree.fromstring(scatter_svg([])) is not None
