"""`loadmaster batch` from the first word to the last, on the fake backend."""

import io
import itertools
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from loadmaster.errors import NotFoundError, OverBudgetError
from loadmaster.interfaces.cli import main
from loadmaster.jobs.lock import JobLock
from loadmaster.jobs.store import JobStore
from loadmaster.tasks.batch import jobs as batch_jobs
from loadmaster.tasks.batch.opening import OpenJob, open_in_window
from loadmaster.tasks.batch.policy import Clock
from loadmaster.tasks.planning import demo_model
from tests.batch_parts import Seen, chat, completion, write

Run = Callable[..., tuple[int, str, str]]
FAKE_MODEL = ("-m", "demo", "--backend", "fake")
FAKE = (*FAKE_MODEL, "-np", "4")


def demo(line: dict[str, object]) -> dict[str, object]:
    """A line for the demo model."""
    body = line["body"]
    assert isinstance(body, dict)
    return {**line, "body": {**body, "model": "demo"}}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run `batch` with jobs of its own: exit code, stdout, stderr."""
    monkeypatch.setenv("LOADMASTER_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))

    def call(*words: str) -> tuple[int, str, str]:
        code = main.run(["batch", *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    return write(tmp_path / "in.jsonl", [demo(chat(f"c{i}", f"say {i}")) for i in range(12)])


def output(path: str = "out.jsonl") -> dict[str, object]:
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return {line["custom_id"]: line["response"]["body"] for line in lines}


def test_a_file_is_run_and_run_again_costs_nothing(run: Run, requests: Path) -> None:
    words = ("run", "-i", "in.jsonl", "-o", "out.jsonl", *FAKE)
    code, out, err = run(*words)
    assert (code, out) == (0, "")
    assert "12 done, 0 left" in err
    assert list(output()) == [f"c{i}" for i in range(12)]
    before = Path("out.jsonl").read_text()
    code, _, err = run(*words)
    assert code == 0
    assert "going on with job run_" in err
    assert Path("out.jsonl").read_text() == before  # not computed again


def test_failed_items_are_beside_the_answers_and_in_the_exit_code(run: Run) -> None:
    lines = [demo(completion("good")), demo(completion("bad", [999_999]))]
    write(Path("in.jsonl"), lines)
    code, out, _ = run("run", "-i", "in.jsonl", "-o", "out.jsonl", "--json", *FAKE)
    value = json.loads(out)
    assert code == 8
    assert value["counts"] == {"total": 2, "done": 1, "failed": 1, "left": 0}
    assert (value["state"], value["reason"]) == ("finished", "finished")
    assert list(output()) == ["good"]
    [failed] = map(json.loads, Path("out.errors.jsonl").read_text().splitlines())
    assert failed["custom_id"] == "bad"
    code, out, _ = run("status", "run")
    assert "failed: bad: token 999999" in out
    code, _, err = run("retry", "run")
    assert code == 8
    assert "items to run again: 1" in err


def test_bad_lines_are_listed_and_nothing_is_run(run: Run) -> None:
    write(Path("in.jsonl"), [demo(completion("a")), completion("b"), "{", demo(completion("a"))])
    code, out, err = run("run", "-i", "in.jsonl", "-o", "out.jsonl", *FAKE)
    assert (code, out) == (2, "")
    assert "error: 3 of 4 lines" in err
    for words in ("line 2: `model`", "line 3: not JSON", "line 4: custom_id `a`"):
        assert words in err
    assert json.loads(run("list", "--json")[1])["jobs"] == []


def test_a_changed_line_is_an_error_until_the_job_is_begun_anew(run: Run, requests: Path) -> None:
    words = ("run", "-i", "in.jsonl", "-o", "out.jsonl", *FAKE)
    run(*words)
    write(requests, [demo(chat(f"c{i}", "another")) for i in range(12)])
    code, _, err = run(*words)
    assert code == 2
    assert "`c0` stood for another request" in err
    assert run(*words, "--fresh")[0] == 0


def test_begun_anew_with_a_bad_file_a_job_keeps_its_answers(run: Run, requests: Path) -> None:
    words = ("run", "-i", "in.jsonl", "-o", "out.jsonl", *FAKE)
    run(*words)
    answered = run("results", "run")[1]
    requests.write_text("{\n")
    assert run(*words, "--fresh")[0] == 2
    assert run("results", "run")[1] == answered
    [job_id] = batch_jobs.open_shelf().ids()
    write(requests, [demo(chat("c0"))])
    with JobLock(batch_jobs.open_shelf().path(job_id)):
        assert run(*words, "--fresh")[0] == 9


def test_another_model_under_the_same_name_is_refused(run: Run, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(demo_model().read_bytes())
    write(Path("in.jsonl"), [completion("a")])
    words = ("run", "-i", "in.jsonl", "-o", "out.jsonl", "--served-model-name", "m")
    fake = ("-m", "model.gguf", "--backend", "fake")
    assert run(*words, *fake)[0] == 0
    with model.open("ab") as file:
        file.write(bytes(32))
    code, _, err = run(*words, *fake)
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
    run: Run, requests: Path, words: tuple[str, ...]
) -> None:
    Path("in.errors.jsonl").write_bytes(requests.read_bytes())
    before = requests.read_bytes()
    code, out, err = run(*words, *FAKE)
    assert (code, out) == (2, "")
    assert "-o" in err
    job_id = run("submit", "in.jsonl", "--hold", *FAKE)[1].strip()
    assert run("results", job_id, "-o", "in.jsonl")[0] == 2
    assert requests.read_bytes() == Path("in.errors.jsonl").read_bytes() == before


def test_ctrl_c_at_the_question_leaves_the_job_for_later(
    run: Run, requests: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def ask(_: str) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        return "yes"

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("click.termui.visible_prompt_func", ask)
    code, _, err = run("run", "-i", "in.jsonl", "-o", "out.jsonl", "--rehearse", "3", *FAKE)
    assert code == 0
    assert "rehearsed: 3 done, 9 left" in err


def test_an_output_that_cannot_be_written_is_refused_before_the_night(
    run: Run, requests: Path
) -> None:
    code, _, err = run("run", "-i", "in.jsonl", "-o", "no/out.jsonl", *FAKE)
    assert code == 1
    assert "cannot write `no/out.jsonl`" in err
    assert run("run", "-i", "missing.jsonl", "-o", "out.jsonl", *FAKE)[0] == 4


def test_an_output_that_becomes_unwritable_loses_nothing(
    run: Run, requests: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = run("submit", "in.jsonl", "-o", "later/out.jsonl", "--hold", *FAKE)
    assert code == 1  # it is not there yet
    Path("later").mkdir()
    code, out, _ = run("submit", "in.jsonl", "-o", "later/out.jsonl", "--hold", *FAKE)
    Path("later").rmdir()
    code, _, err = run("resume", out.strip())
    assert code == 1
    assert "nothing is lost" in err
    assert run("results", out.strip(), "-o", "here.jsonl")[0] == 0
    assert len(output("here.jsonl")) == 12


def test_a_job_is_submitted_listed_resumed_and_its_results_read(run: Run, requests: Path) -> None:
    code, out, err = run("submit", "in.jsonl", "--hold", *FAKE)
    job_id = out.strip()
    assert code == 0
    assert f"`loadmaster batch resume {job_id}` runs it" in err
    assert "queued" in run("list")[1]
    assert run("results", job_id)[1] == ""
    assert run("resume", job_id[:9])[0] == 0
    assert len(run("results", job_id)[1].splitlines()) == 12
    code, out, _ = run("status", job_id, "--json")
    assert json.loads(out)["counts"]["done"] == 12
    assert run("status", "nonsense")[0] == 4


def test_a_cancelled_job_can_be_resumed(run: Run, requests: Path) -> None:
    job_id = run("submit", "in.jsonl", "--hold", *FAKE)[1].strip()
    assert run("cancel", job_id)[0] == 0
    assert "cancelled" in run("status", job_id)[1]
    assert run("resume", job_id)[0] == 0
    assert len(run("results", job_id)[1].splitlines()) == 12


def embedding(custom_id: str, text: object) -> dict[str, object]:
    body = {"model": "demo", "input": text}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/embeddings", "body": body}


def test_embeddings_are_run_by_a_model_that_is_opened_for_them(run: Run) -> None:
    write(Path("in.jsonl"), [embedding(f"e{i}", f"text {i} " * (i + 1)) for i in range(20)])
    code, _, err = run(
        "run", "-i", "in.jsonl", "-o", "out.jsonl", "-m", "demo", "--backend", "fake"
    )
    assert code == 0
    assert "20 done, 0 left" in err
    vectors = [body["data"][0]["embedding"] for body in output().values()]  # type: ignore[index]
    assert len(vectors) == 20
    assert len(set(map(tuple, vectors))) > 1
    assert "of them shared" in run("status", "run")[1]


def test_an_input_that_is_too_long_to_embed_fails_alone(run: Run) -> None:
    write(Path("in.jsonl"), [embedding("long", "a" * 5000), embedding("fits", "abc")])
    code, _, _ = run("run", "-i", "in.jsonl", "-o", "out.jsonl", *FAKE_MODEL)
    assert code == 8
    assert list(output()) == ["fits"]
    [failed] = map(json.loads, Path("out.errors.jsonl").read_text().splitlines())
    error = failed["response"]["body"]["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["numbers"] == {"n_prompt": 5000, "n_ctx": 2048}


def test_a_file_that_mixes_embeddings_with_chats_is_refused(run: Run) -> None:
    write(Path("in.jsonl"), [demo(chat("c")), embedding("e", "abc")])
    code, _, err = run("run", "-i", "in.jsonl", "-o", "out.jsonl", *FAKE)
    assert code == 2
    assert "line 2: `url`: a job either generates or embeds" in err


def test_a_damaged_job_is_listed_as_such(run: Run, requests: Path) -> None:
    for _ in range(2):
        run("submit", "in.jsonl", "--hold", *FAKE)
    shelf = batch_jobs.open_shelf()
    whole, damaged = shelf.ids()
    (shelf.path(damaged) / "job.sqlite3").write_bytes(b"rubbish" * 1000)
    code, out, err = run("list")
    assert code == 0
    assert whole in out
    assert f"{damaged}: cannot be read; `loadmaster batch status {damaged}` says why" in err
    assert json.loads(run("list", "--json")[1])["unreadable"] == [damaged]
    assert run("status", damaged)[0] == 65


def test_a_finished_job_cannot_be_cancelled(run: Run, requests: Path) -> None:
    run("run", "-i", "in.jsonl", "-o", "out.jsonl", *FAKE)
    code, _, err = run("cancel", "run")
    assert code == 0
    assert "finished" in err
    assert json.loads(run("status", "run", "--json")[1])["state"] == "finished"


def test_before_its_window_a_job_has_no_model(run: Run, requests: Path) -> None:
    """It is planned and loaded when the window opens: by then more may be free, or less."""
    run("submit", "in.jsonl", "--hold", "--window", "22:00-07:00", *FAKE)
    shelf = batch_jobs.open_shelf()
    [job_id] = shelf.ids()
    now, said = datetime(2026, 3, 1, 21, 59, 59).timestamp(), Seen()

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    clock = Clock(wall_s=lambda: now, sleep=sleep)
    with batch_jobs.Run(shelf, job_id) as work:
        assert work.wait_for_window(said, clock) is None
        assert datetime.fromtimestamp(now).hour == 22
        assert said.lines == ["waiting for 22:00-07:00"]
        now -= 3600
        work.store.ask_to_cancel(os.getpid())
        assert work.wait_for_window(said, clock) == "cancelled"


def test_the_wait_for_its_window_is_no_time_that_a_job_ran(run: Run, requests: Path) -> None:
    run("submit", "in.jsonl", "--hold", "--window", "22:00-07:00", *FAKE)
    shelf = batch_jobs.open_shelf()
    [job_id] = shelf.ids()
    ticks = itertools.count(0.0, 1000.0)

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    clock = Clock(wall_s=lambda: 0.0, monotonic_s=lambda: next(ticks), sleep=interrupt)
    window = f"{datetime.fromtimestamp(3600):%H:%M}-{datetime.fromtimestamp(7200):%H:%M}"
    batch_jobs.change_settings(shelf, job_id, lambda it: replace(it, window=window))
    with pytest.raises(KeyboardInterrupt), batch_jobs.Run(shelf, job_id) as work:
        work.wait_for_window(Seen(), clock)
    with JobStore(shelf.path(job_id)) as store:
        assert store.job().run_s < 0  # 1,000 s of it were waited, by a clock of the test


def test_a_window_that_opens_on_a_busy_card_is_not_lost(run: Run, requests: Path) -> None:
    run("submit", "in.jsonl", "--hold", "--window", "22:00-07:00", *FAKE)
    shelf = batch_jobs.open_shelf()
    [job_id] = shelf.ids()
    now, last, said = datetime(2026, 3, 1, 21, 59).timestamp(), 6, Seen()

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    def open_model() -> OpenJob:
        if datetime.fromtimestamp(now).minute <= last:
            raise OverBudgetError("others have the card")
        raise NotFoundError("the model is gone")

    clock = Clock(wall_s=lambda: now, monotonic_s=lambda: now, sleep=sleep)
    with batch_jobs.Run(shelf, job_id) as work, pytest.raises(NotFoundError):
        open_in_window(work, open_model, said, clock)
    assert said.lines == [
        "waiting for 22:00-07:00",
        *["others have the card; trying again in 5 min"] * 2,
    ]
    now, last = datetime(2026, 3, 1, 21, 59).timestamp(), 59
    with batch_jobs.Run(shelf, job_id) as work, pytest.raises(OverBudgetError):
        open_in_window(work, open_model, said, clock)
    assert datetime.fromtimestamp(now).hour == 23  # an hour later it has not fitted yet
    now = datetime(2026, 3, 1, 23, 0).timestamp()  # it need not wait: someone is there
    with batch_jobs.Run(shelf, job_id) as work, pytest.raises(OverBudgetError):
        open_in_window(work, open_model, said, clock)


def test_a_second_process_is_refused(run: Run, requests: Path) -> None:
    job_id = run("submit", "in.jsonl", "--hold", *FAKE)[1].strip()
    with JobLock(batch_jobs.open_shelf().path(job_id)):
        code, _, err = run("resume", job_id)
    assert code == 9
    assert f"process {os.getpid()} works on job" in err


def test_limits_stop_a_run_and_resume_goes_on(run: Run, requests: Path) -> None:
    words = ("run", "-i", "in.jsonl", "-o", "out.jsonl", "--max-total-tokens", "1", *FAKE)
    code, _, err = run(*words)
    assert code == 0
    assert "token limit: " in err
    while run(*words)[0] == 0 and len(output()) < 12:
        pass
    assert len(output()) == 12


def test_a_stopped_job_goes_on_in_the_background(run: Run, requests: Path) -> None:
    run("run", "-i", "in.jsonl", "-o", "out.jsonl", "--max-total-tokens", "1", *FAKE)
    limits = ("--max-total-tokens", "1000", "--retries", "5")
    code, out, err = run("resume", "run", "--background", *limits)
    job_id = out.strip()
    assert code == 0
    assert f"status {job_id} --watch" in err
    code, out, _ = run("status", job_id, "--watch")
    assert "12 done" in out
    assert "log.txt" in out
    shelf = batch_jobs.open_shelf()
    with JobStore(shelf.path(job_id), read_only=True) as store:
        kept = batch_jobs.read_settings(store.job())
    assert (kept.max_tokens, kept.retries) == (1000, 5), "limits stay for runs to come"
    assert run("resume", "run", "--background", "--rehearse", "2")[0] == 2


def test_a_rehearsal_asks_and_without_an_answer_stops(run: Run, requests: Path) -> None:
    words = ("run", "-i", "in.jsonl", "-o", "out.jsonl", "--rehearse", "3", *FAKE)
    code, _, err = run(*words)
    assert code == 0
    assert "measured  predicted" in err
    assert "the other 9 items" in err
    assert "`--yes` goes on" in err
    assert len(output()) == 3
    assert run(*words, "--yes")[0] == 0
    assert len(output()) == 12


def test_a_job_in_the_background_holds_nothing_of_the_script_that_began_it(
    run: Run, requests: Path
) -> None:
    later = [f"{datetime.now() + timedelta(hours=n):%H:%M}" for n in (2, 3)]
    ours, handed_on = os.pipe()
    os.set_inheritable(handed_on, True)
    job_id = run("submit", "in.jsonl", "--window", "-".join(later), *FAKE)[1].strip()
    shelf = batch_jobs.open_shelf()
    assert shelf.owner(job_id)
    os.close(handed_on)
    os.set_blocking(ours, False)
    assert os.read(ours, 1) == b""  # nobody else can write to it
    os.close(ours)
    run("cancel", job_id)
    while shelf.owner(job_id):
        os.sched_yield()
    assert json.loads(run("status", job_id, "--json")[1])["state"] == "cancelled"


def test_a_served_name_is_what_lines_may_say(run: Run) -> None:
    write(Path("in.jsonl"), [completion("a")])
    words = ("run", "-i", "in.jsonl", "-o", "out.jsonl", *FAKE)
    assert run(*words)[0] == 2
    assert run(*words, "--served-model-name", "m")[0] == 0
    assert output()["a"]["model"] == "m"  # type: ignore[index]


def test_results_are_private(run: Run, requests: Path, tmp_path: Path) -> None:
    run("run", "-i", "in.jsonl", "-o", "out.jsonl", *FAKE)
    assert stat.S_IMODE(Path("out.jsonl").stat().st_mode) == 0o600
    [job] = (tmp_path / "home" / "state" / "jobs").iterdir()
    assert stat.S_IMODE(job.stat().st_mode) == 0o700


def test_a_job_in_the_background_outlives_its_command(run: Run, requests: Path) -> None:
    code, out, err = run("submit", "in.jsonl", "-o", "out.jsonl", *FAKE)
    job_id = out.strip()
    assert code == 0
    assert "--watch" in err
    code, out, _ = run("status", job_id, "--watch")  # its process has the job by now
    assert "12 done" in out
    shelf = batch_jobs.open_shelf()
    while shelf.owner(job_id) is not None:
        os.sched_yield()
    assert len(output()) == 12


def test_ctrl_c_drains_and_resume_goes_on(run: Run, tmp_path: Path) -> None:
    lines = [demo(completion(f"c{i}", max_tokens=100)) for i in range(2000)]
    write(Path("in.jsonl"), lines)
    words = ["run", "-i", "in.jsonl", "-o", "out.jsonl", *FAKE]
    process = subprocess.Popen(
        [sys.executable, "-m", "loadmaster", "batch", *words],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )
    with process:
        assert process.stderr
        shelf = batch_jobs.open_shelf()
        while (
            not any(job.state == "running" for job in shelf.jobs()) or not run("results", "run")[1]
        ):
            os.sched_yield()
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
    assert process.returncode == 130
    assert "finishing what is in flight" in err
    assert "goes on" in err
    done = len(output())
    assert 0 < done < 2000
    assert json.loads(run("status", "run", "--json")[1])["reason"] == "interrupted"
