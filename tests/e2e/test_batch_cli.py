"""`loadmaster batch` from the first word to the last, on the fake backend."""

import io
import json
import os
import signal
import stat
import sys
from pathlib import Path

import pytest

from loadmaster.jobs.lock import JobLock
from loadmaster.tasks.batch import jobs as batch_jobs
from loadmaster.tasks.planning import demo_model
from tests.batch_parts import FAKE, FAKE_MODEL, chat, completion, demo, embedding, output, write
from tests.cli_parts import Run


def test_a_file_is_run_and_run_again_costs_nothing(batch: Run, requests: Path) -> None:
    words = ("run", "-i", "in.jsonl", "-o", "out.jsonl", *FAKE)
    code, out, err = batch(*words)
    assert (code, out) == (0, "")
    assert "12 done, 0 left" in err
    assert list(output()) == [f"c{i}" for i in range(12)]
    before = Path("out.jsonl").read_text()
    code, _, err = batch(*words)
    assert code == 0
    assert "going on with job run_" in err
    assert Path("out.jsonl").read_text() == before  # not computed again


def test_failed_items_are_beside_the_answers_and_in_the_exit_code(batch: Run) -> None:
    lines = [demo(completion("good")), demo(completion("bad", [999_999]))]
    write(Path("in.jsonl"), lines)
    code, out, _ = batch("run", "-i", "in.jsonl", "-o", "out.jsonl", "--json", *FAKE)
    value = json.loads(out)
    assert code == 8
    assert value["counts"] == {"total": 2, "done": 1, "failed": 1, "left": 0}
    assert (value["state"], value["reason"]) == ("finished", "finished")
    assert list(output()) == ["good"]
    [failed] = map(json.loads, Path("out.errors.jsonl").read_text().splitlines())
    assert failed["custom_id"] == "bad"
    code, out, _ = batch("status", "run")
    assert "failed: bad: token 999999" in out
    code, _, err = batch("retry", "run")
    assert code == 8
    assert "items to run again: 1" in err


def test_bad_lines_are_listed_and_nothing_is_run(batch: Run) -> None:
    write(Path("in.jsonl"), [demo(completion("a")), completion("b"), "{", demo(completion("a"))])
    code, out, err = batch("run", "-i", "in.jsonl", "-o", "out.jsonl", *FAKE)
    assert (code, out) == (2, "")
    assert "error: 3 of 4 lines" in err
    for words in ("line 2: `model`", "line 3: not JSON", "line 4: custom_id `a`"):
        assert words in err
    assert json.loads(batch("list", "--json")[1])["jobs"] == []


def test_a_changed_line_is_an_error_until_the_job_is_begun_anew(batch: Run, requests: Path) -> None:
    words = ("run", "-i", "in.jsonl", "-o", "out.jsonl", *FAKE)
    batch(*words)
    write(requests, [demo(chat(f"c{i}", "another")) for i in range(12)])
    code, _, err = batch(*words)
    assert code == 2
    assert "`c0` stood for another request" in err
    assert batch(*words, "--fresh")[0] == 0


def test_begun_anew_with_a_bad_file_a_job_keeps_its_answers(batch: Run, requests: Path) -> None:
    words = ("run", "-i", "in.jsonl", "-o", "out.jsonl", *FAKE)
    batch(*words)
    answered = batch("results", "run")[1]
    requests.write_text("{\n")
    assert batch(*words, "--fresh")[0] == 2
    assert batch("results", "run")[1] == answered
    [job_id] = batch_jobs.open_shelf().ids()
    write(requests, [demo(chat("c0"))])
    with JobLock(batch_jobs.open_shelf().path(job_id)):
        assert batch(*words, "--fresh")[0] == 9


def test_another_model_under_the_same_name_is_refused(batch: Run, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(demo_model().read_bytes())
    write(Path("in.jsonl"), [completion("a")])
    words = ("run", "-i", "in.jsonl", "-o", "out.jsonl", "--served-model-name", "m")
    fake = ("-m", "model.gguf", "--backend", "fake")
    assert batch(*words, *fake)[0] == 0
    with model.open("ab") as file:
        file.write(bytes(32))
    code, _, err = batch(*words, *fake)
    assert code == 7
    assert "the job was begun with" in err


@pytest.mark.parametrize(
    "words",
    [
        ("run", "-i", "in.jsonl", "-o", "in.jsonl"),
        ("run", "-i", "in.jsonl", "-o", "out.jsonl", "--error-file", "./out.jsonl"),
        ("run", "-i", "in.errors.jsonl", "-o", "in.jsonl"),
        ("submit", "in.jsonl", "-o", "in.jsonl"),
        ("submit", "in.jsonl", "--error-file", "errors.jsonl"),
    ],
)
def test_no_file_takes_the_place_of_another(
    batch: Run, requests: Path, words: tuple[str, ...]
) -> None:
    Path("in.errors.jsonl").write_bytes(requests.read_bytes())
    before = requests.read_bytes()
    code, out, err = batch(*words, *FAKE)
    assert (code, out) == (2, "")
    assert "-o" in err
    job_id = batch("submit", "in.jsonl", "--hold", *FAKE)[1].strip()
    assert batch("results", job_id, "-o", "in.jsonl")[0] == 2
    assert requests.read_bytes() == Path("in.errors.jsonl").read_bytes() == before


def test_ctrl_c_at_the_question_leaves_the_job_for_later(
    batch: Run, requests: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def ask(_: str) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        return "yes"

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("click.termui.visible_prompt_func", ask)
    code, _, err = batch("run", "-i", "in.jsonl", "-o", "out.jsonl", "--rehearse", "3", *FAKE)
    assert code == 0
    assert "rehearsed: 3 done, 9 left" in err


def test_an_output_that_cannot_be_written_is_refused_before_the_night(
    batch: Run, requests: Path
) -> None:
    code, _, err = batch("run", "-i", "in.jsonl", "-o", "no/out.jsonl", *FAKE)
    assert code == 1
    assert "cannot write `no/out.jsonl`" in err
    assert batch("run", "-i", "missing.jsonl", "-o", "out.jsonl", *FAKE)[0] == 4


def test_an_output_that_becomes_unwritable_loses_nothing(
    batch: Run, requests: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = batch("submit", "in.jsonl", "-o", "later/out.jsonl", "--hold", *FAKE)
    assert code == 1  # it is not there yet
    Path("later").mkdir()
    code, out, _ = batch("submit", "in.jsonl", "-o", "later/out.jsonl", "--hold", *FAKE)
    Path("later").rmdir()
    code, _, err = batch("resume", out.strip())
    assert code == 1
    assert "nothing is lost" in err
    assert batch("results", out.strip(), "-o", "here.jsonl")[0] == 0
    assert len(output("here.jsonl")) == 12


def test_a_job_is_submitted_listed_resumed_and_its_results_read(batch: Run, requests: Path) -> None:
    code, out, err = batch("submit", "in.jsonl", "--hold", *FAKE)
    job_id = out.strip()
    assert code == 0
    assert f"`loadmaster batch resume {job_id}` runs it" in err
    assert "queued" in batch("list")[1]
    assert batch("results", job_id)[1] == ""
    assert batch("resume", job_id[:9])[0] == 0
    assert len(batch("results", job_id)[1].splitlines()) == 12
    code, out, _ = batch("status", job_id, "--json")
    assert json.loads(out)["counts"]["done"] == 12
    assert batch("status", "nonsense")[0] == 4


def test_a_cancelled_job_can_be_resumed(batch: Run, requests: Path) -> None:
    job_id = batch("submit", "in.jsonl", "--hold", *FAKE)[1].strip()
    assert batch("cancel", job_id)[0] == 0
    assert "cancelled" in batch("status", job_id)[1]
    assert batch("resume", job_id)[0] == 0
    assert len(batch("results", job_id)[1].splitlines()) == 12


def test_embeddings_are_run_by_a_model_that_is_opened_for_them(batch: Run) -> None:
    write(Path("in.jsonl"), [demo(embedding(f"e{i}", f"text {i} " * (i + 1))) for i in range(20)])
    code, _, err = batch(
        "run", "-i", "in.jsonl", "-o", "out.jsonl", "-m", "demo", "--backend", "fake"
    )
    assert code == 0
    assert "20 done, 0 left" in err
    vectors = [body["data"][0]["embedding"] for body in output().values()]  # type: ignore[index]
    assert len(vectors) == 20
    assert len(set(map(tuple, vectors))) > 1
    assert "of them shared" in batch("status", "run")[1]


def test_an_input_that_is_too_long_to_embed_fails_alone(batch: Run) -> None:
    write(Path("in.jsonl"), [demo(embedding("long", "a" * 5000)), demo(embedding("fits", "abc"))])
    code, _, _ = batch("run", "-i", "in.jsonl", "-o", "out.jsonl", *FAKE_MODEL)
    assert code == 8
    assert list(output()) == ["fits"]
    [failed] = map(json.loads, Path("out.errors.jsonl").read_text().splitlines())
    error = failed["response"]["body"]["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["numbers"] == {"n_prompt": 5000, "n_ctx": 2048}


def test_a_file_that_mixes_embeddings_with_chats_is_refused(batch: Run) -> None:
    write(Path("in.jsonl"), [demo(chat("c")), demo(embedding("e", "abc"))])
    code, _, err = batch("run", "-i", "in.jsonl", "-o", "out.jsonl", *FAKE)
    assert code == 2
    assert "line 2: `url`: a job either generates or embeds" in err


def test_a_damaged_job_is_listed_as_such(batch: Run, requests: Path) -> None:
    for _ in range(2):
        batch("submit", "in.jsonl", "--hold", *FAKE)
    shelf = batch_jobs.open_shelf()
    whole, damaged = shelf.ids()
    (shelf.path(damaged) / "job.sqlite3").write_bytes(b"rubbish" * 1000)
    code, out, err = batch("list")
    assert code == 0
    assert whole in out
    assert f"{damaged}: cannot be read; `loadmaster batch status {damaged}` says why" in err
    assert json.loads(batch("list", "--json")[1])["unreadable"] == [damaged]
    assert batch("status", damaged)[0] == 65


def test_a_finished_job_cannot_be_cancelled(batch: Run, requests: Path) -> None:
    batch("run", "-i", "in.jsonl", "-o", "out.jsonl", *FAKE)
    code, _, err = batch("cancel", "run")
    assert code == 0
    assert "finished" in err
    assert json.loads(batch("status", "run", "--json")[1])["state"] == "finished"


def test_a_second_process_is_refused(batch: Run, requests: Path) -> None:
    job_id = batch("submit", "in.jsonl", "--hold", *FAKE)[1].strip()
    with JobLock(batch_jobs.open_shelf().path(job_id)):
        code, _, err = batch("resume", job_id)
    assert code == 9
    assert f"process {os.getpid()} works on job" in err


def test_limits_stop_a_run_and_resume_goes_on(batch: Run, requests: Path) -> None:
    words = ("run", "-i", "in.jsonl", "-o", "out.jsonl", "--max-total-tokens", "1", *FAKE)
    code, _, err = batch(*words)
    assert code == 0
    assert "token limit: " in err
    while batch(*words)[0] == 0 and len(output()) < 12:
        pass
    assert len(output()) == 12


def test_a_rehearsal_asks_and_without_an_answer_stops(batch: Run, requests: Path) -> None:
    words = ("run", "-i", "in.jsonl", "-o", "out.jsonl", "--rehearse", "3", *FAKE)
    code, _, err = batch(*words)
    assert code == 0
    assert "measured  predicted" in err
    assert "the other 9 items" in err
    assert "`--yes` goes on" in err
    assert len(output()) == 3
    assert batch(*words, "--yes")[0] == 0
    assert len(output()) == 12


def test_a_served_name_is_what_lines_may_say(batch: Run) -> None:
    write(Path("in.jsonl"), [completion("a")])
    words = ("run", "-i", "in.jsonl", "-o", "out.jsonl", *FAKE)
    assert batch(*words)[0] == 2
    assert batch(*words, "--served-model-name", "m")[0] == 0
    assert output()["a"]["model"] == "m"  # type: ignore[index]


def test_results_are_private(batch: Run, requests: Path, tmp_path: Path) -> None:
    batch("run", "-i", "in.jsonl", "-o", "out.jsonl", *FAKE)
    assert stat.S_IMODE(Path("out.jsonl").stat().st_mode) == 0o600
    [job] = (tmp_path / "home" / "state" / "jobs").iterdir()
    assert stat.S_IMODE(job.stat().st_mode) == 0o700
