"""`bench` and the steps it times, on the fake backend."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from loadmaster.engine.backends.fake import Fake
from loadmaster.engine.step_timing import time_steps
from loadmaster.engine.timing import TimeSteps
from loadmaster.engine.types import LoadRequest, SequenceWork, StepResult
from loadmaster.interfaces.cli import bench as cli
from loadmaster.interfaces.cli import main
from loadmaster.tasks.bench import BenchRow
from tests.cli_parts import settings


class Recording(Fake):
    """Notes every step it is asked for."""

    def __init__(self) -> None:
        super().__init__(devices=(), options={})
        self.steps: list[Sequence[SequenceWork]] = []

    def step(self, work: Sequence[SequenceWork]) -> StepResult:
        self.steps.append(work)
        return super().step(work)


def _open(tmp_path: Path) -> Recording:
    backend = Recording()
    path = tmp_path / "model.gguf"
    path.write_bytes(b"")
    request = LoadRequest(
        model_path=path, model_stamp="", settings=settings(n_seq_max=4), ram_cap_bytes=None
    )
    backend.load(request, lambda _: True)
    return backend


def test_a_prompt_is_fed_in_chunks_and_then_every_sequence_decodes_together(
    tmp_path: Path,
) -> None:
    backend = _open(tmp_path)
    ticks = iter(range(1000))
    question = TimeSteps(depth=10, n_sequences=2, n_steps=3)
    seconds = time_steps(backend, question, 4, clock=lambda: float(next(ticks)))
    assert seconds == (1.0,) * (3 + 3)  # the chunks of the first sequence, then the steps
    sizes = [[len(part.tokens) for part in work] for work in backend.steps]
    assert sizes == [[4], [4], [2]] * 2 + [[1, 1]] * 3
    assert [part.position for part in backend.steps[-1]] == [12, 12]
    assert backend.save_state(0) == b""  # nothing is left in the cells


def test_without_a_prompt_decode_begins_at_position_0(tmp_path: Path) -> None:
    backend = _open(tmp_path)
    assert len(time_steps(backend, TimeSteps(depth=0, n_sequences=1, n_steps=2), 4)) == 2
    assert backend.steps[0][0].position == 0


def test_an_error_is_relative_to_what_was_measured() -> None:
    row = BenchRow(
        phase="decode", n_sequences=1, depth=0, measured_tok_s=10.0, predicted_tok_s=12.0
    )
    assert row.error_pct == pytest.approx(20.0)
    assert cli._line(row)[-1] == "+20 %"


def test_bench_prints_every_phase(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "demo", "--backend", "fake", "--positions", "0,64", "--sequences", "1,3"]
    assert main.run([*words, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    found = [(row["phase"], row["n_sequences"], row["position"]) for row in value["rows"]]
    assert found == [
        ("prefill", 1, 0), ("decode", 1, 0), ("decode", 1, 64), ("decode", 3, 128),
    ]  # fmt: skip
    assert value["plan"]["fits"] is True
    assert main.run(words) == 0
    assert "measured  predicted" in capsys.readouterr().out


def test_positions_beyond_n_ctx_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["bench", "demo", "--backend", "fake", "-c", "256", "--positions", "9000"]) == 2
    assert "beyond n_ctx 256" in capsys.readouterr().err
    assert main.run(["bench", "demo", "--backend", "fake", "--positions", "x"]) == 2
    assert "--positions 0,512" in capsys.readouterr().err
