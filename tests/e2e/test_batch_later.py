"""Batch jobs that run later than they are asked for: in a window, in the background, resumed."""

import itertools
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from loadmaster.errors import NotFoundError, OverBudgetError
from loadmaster.jobs.store import JobStore
from loadmaster.tasks.batch import jobs as batch_jobs
from loadmaster.tasks.batch.opening import OpenJob, open_in_window
from loadmaster.tasks.batch.policy import Clock
from tests.batch_parts import FAKE, Seen, completion, demo, output, write
from tests.cli_parts import Run


def test_before_its_window_a_job_has_no_model(batch: Run, requests: Path) -> None:
    """It is planned and loaded when the window opens: by then more may be free, or less."""
    batch("submit", "in.jsonl", "--hold", "--window", "22:00-07:00", *FAKE)
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


def test_the_wait_for_its_window_is_no_time_that_a_job_ran(batch: Run, requests: Path) -> None:
    batch("submit", "in.jsonl", "--hold", "--window", "22:00-07:00", *FAKE)
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


def test_a_window_that_opens_on_a_busy_card_is_not_lost(batch: Run, requests: Path) -> None:
    batch("submit", "in.jsonl", "--hold", "--window", "22:00-07:00", *FAKE)
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


def test_a_stopped_job_goes_on_in_the_background(batch: Run, requests: Path) -> None:
    batch("run", "-i", "in.jsonl", "-o", "out.jsonl", "--max-total-tokens", "1", *FAKE)
    limits = ("--max-total-tokens", "1000", "--retries", "5")
    code, out, err = batch("resume", "run", "--background", *limits)
    job_id = out.strip()
    assert code == 0
    assert f"status {job_id} --watch" in err
    code, out, _ = batch("status", job_id, "--watch")
    assert "12 done" in out
    assert "log.txt" in out
    shelf = batch_jobs.open_shelf()
    with JobStore(shelf.path(job_id), read_only=True) as store:
        kept = batch_jobs.read_settings(store.job())
    assert (kept.max_tokens, kept.retries) == (1000, 5), "limits stay for runs to come"
    assert batch("resume", "run", "--background", "--rehearse", "2")[0] == 2


def test_a_job_in_the_background_holds_nothing_of_the_script_that_began_it(
    batch: Run, requests: Path
) -> None:
    later = [f"{datetime.now() + timedelta(hours=n):%H:%M}" for n in (2, 3)]
    ours, handed_on = os.pipe()
    os.set_inheritable(handed_on, True)
    job_id = batch("submit", "in.jsonl", "--window", "-".join(later), *FAKE)[1].strip()
    shelf = batch_jobs.open_shelf()
    assert shelf.owner(job_id)
    os.close(handed_on)
    os.set_blocking(ours, False)
    assert os.read(ours, 1) == b""  # nobody else can write to it
    os.close(ours)
    batch("cancel", job_id)
    while shelf.owner(job_id):
        os.sched_yield()
    assert json.loads(batch("status", job_id, "--json")[1])["state"] == "cancelled"


def test_a_job_in_the_background_outlives_its_command(batch: Run, requests: Path) -> None:
    code, out, err = batch("submit", "in.jsonl", "-o", "out.jsonl", *FAKE)
    job_id = out.strip()
    assert code == 0
    assert "--watch" in err
    code, out, _ = batch("status", job_id, "--watch")  # its process has the job by now
    assert "12 done" in out
    shelf = batch_jobs.open_shelf()
    while shelf.owner(job_id) is not None:
        os.sched_yield()
    assert len(output()) == 12


def test_ctrl_c_drains_and_resume_goes_on(batch: Run, tmp_path: Path) -> None:
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
            not any(job.state == "running" for job in shelf.jobs())
            or not batch("results", "run")[1]
        ):
            os.sched_yield()
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
    assert process.returncode == 130
    assert "finishing what is in flight" in err
    assert "goes on" in err
    done = len(output())
    assert 0 < done < 2000
    assert json.loads(batch("status", "run", "--json")[1])["reason"] == "interrupted"
