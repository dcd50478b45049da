"""Files of requests, the store of a job, its lock: what is refused, and what is kept."""

import errno
import itertools
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loadmaster.errors import BusyError, DamagedFileError, NotFoundError, UsageError
from loadmaster.jobs import database, intake, lock
from loadmaster.jobs.database import JobStoreError
from loadmaster.jobs.files import OutputError, atomic_file, check_writable, write_lines
from loadmaster.jobs.intake import MOST_LISTED, BadInputError, add_lines, create_job
from loadmaster.jobs.lines import LINE_LIMIT_BYTES, read_lines
from loadmaster.jobs.lock import JobLock
from loadmaster.jobs.shelf import Shelf
from loadmaster.jobs.store import JobStore
from loadmaster.jobs.types import BadLine, BatchLine, ItemResult, NewJob
from loadmaster.tasks.batch.items import order_of
from tests.batch_parts import completion, new_check, new_store, write


def result(number: int, *, failed: bool = False) -> ItemResult:
    return ItemResult(number=number, failed=failed, line={"custom_id": f"n{number}"})


def bad_lines(tmp_path: Path, *lines: object) -> list[str]:
    """What is wrong with each bad line of a file."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path = write(tmp_path / "in.jsonl", texts)
    return [str(line) for line in read_lines(path, new_check()) if isinstance(line, BadLine)]


def test_a_job_has_its_log_before_it_has_a_name(tmp_path: Path) -> None:
    """A first process that is killed while it turns that on leaves what no reader can roll back."""
    lines = read_lines(write(tmp_path / "in.jsonl", [completion("a")]), new_check())
    job = NewJob(job_id="job", model="m", settings="{}")
    db = database.connect(create_job(tmp_path, job, lines, order_of), read_only=True)
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    db.close()


def test_every_bad_line_is_named_by_its_number(tmp_path: Path) -> None:
    good = completion("a")
    found = bad_lines(
        tmp_path,
        good,
        "{not json",
        "",
        [1],
        {**good, "custom_id": ""},
        {**good, "custom_id": "x" * 600},
        {**good, "method": "GET"},
        {**good, "url": "/v1/images"},
        {**good, "body": "text"},
        {**good, "extra": 1},
        completion("b", temperature=9),
        completion("c", model="other"),
        completion("d", stream=True),
        completion("e", "\ud800"),
        '{"custom_id": "f", "body": NaN}',
        {"custom_id": "g", "url": "/v1/embeddings", "body": {"model": "m", "input": "x"}},
    )
    starts = [line.split(": ")[0] for line in found]
    assert starts == [f"line {number}" for number in (2, *range(4, 17))]
    assert "not JSON" in found[0]
    assert "`/v1/images` is not an endpoint" in found[5]
    assert "`temperature`" in found[8]
    assert "`other` is not `m`" in found[9]
    assert "surrogate" in found[11]
    assert "either generates or embeds" in found[13]


def test_a_line_that_is_not_utf8_or_too_deep_or_too_long_is_named(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    deep = b'{"custom_id": "d", "body": ' + b"[" * 100_000 + b"\n"
    long = b'{"custom_id": "' + b"x" * LINE_LIMIT_BYTES + b'"}\n'
    good = json.dumps(completion("ok")).encode() + b"\n"
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\xff\n" + deep + long + good)
    lines = list(read_lines(path, new_check()))
    assert [isinstance(line, BatchLine) for line in lines] == [True, False, False, False, True]
    assert [line.number for line in lines] == [1, 2, 3, 4, 5]
    assert "not UTF-8" in str(lines[1])
    assert f"the limit is {LINE_LIMIT_BYTES}" in str(lines[3])


def test_a_file_with_bad_lines_makes_no_job(tmp_path: Path) -> None:
    lines: list[Any] = [completion("a"), *("{" for _ in range(30)), completion("a")]
    with pytest.raises(BadInputError) as caught:
        new_store(tmp_path, lines)
    assert caught.value.count == 31
    assert len(caught.value.lines) == MOST_LISTED
    assert "… and 11 more" in caught.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_disk_that_is_full_at_the_intake_makes_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(intake, "_seal", full)
    with pytest.raises(JobStoreError, match=r"no job was made.*No space left") as refused:
        new_store(tmp_path, [completion("a")])
    assert refused.value.hint is not None
    assert "resume" not in refused.value.hint
    assert Shelf(tmp_path).ids() == []


def test_a_custom_id_that_stands_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="line 3: custom_id `a` is that of line 1"):
        new_store(tmp_path, [completion("a"), completion("b"), completion("a")])


def test_a_file_without_lines_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no lines"):
        new_store(tmp_path, ["", "  "])


def grown(folder: Path, lines: list[Any]) -> tuple[int, int]:
    path = write(folder.parent / "grown.jsonl", lines)
    added = add_lines(folder, read_lines(path, new_check()), order_of, path)
    return added.new, added.known


def test_a_file_that_grew_adds_items_and_keeps_results(tmp_path: Path) -> None:
    with new_store(tmp_path, [completion("a"), completion("b")]) as store:
        store.commit([result(1)])
        folder = store.folder
    rewritten = json.dumps(completion("b"), indent=None, sort_keys=True)
    assert grown(folder, [completion("new"), rewritten, completion("a")]) == (1, 2)
    with JobStore(folder) as store:
        assert {item.custom_id for item in store.pending()} == {"b", "new"}
        assert store.job().state == "queued"


def test_a_changed_line_under_a_known_custom_id_is_refused(tmp_path: Path) -> None:
    with new_store(tmp_path, [completion("a"), completion("b")]) as store:
        folder = store.folder
    with pytest.raises(BadInputError, match="line 2: custom_id `b` stood for another request"):
        grown(folder, [completion("a"), completion("b", "other"), completion("c")])
    with JobStore(folder) as store:
        assert store.counts().total == 2


def test_a_file_that_lost_lines_is_refused(tmp_path: Path) -> None:
    with new_store(tmp_path, [completion("a"), completion("b")]) as store:
        folder = store.folder
    with pytest.raises(UsageError, match="has 1 item that"):
        grown(folder, [completion("a")])


def test_a_second_result_of_an_item_cannot_exist(tmp_path: Path) -> None:
    with new_store(tmp_path, [completion("a"), completion("b")]) as store:
        store.commit([result(1)])
        with pytest.raises(database.JobStoreError):
            store.commit([result(2), result(1)])
        counts = store.counts()
        assert (counts.done, counts.left) == (1, 1)  # all of a commit or nothing of it


def test_failed_items_can_be_made_pending_again(tmp_path: Path) -> None:
    with new_store(tmp_path, [completion("a"), completion("b")]) as store:
        store.commit([result(1), result(2, failed=True)])
        assert store.retry_failed() == 1
        assert [item.custom_id for item in store.pending()] == ["b"]
        assert list(store.lines(failed=True)) == []


def test_a_sample_is_blocks_of_neighbours(tmp_path: Path) -> None:
    lines = [completion(f"c{i}", f"{i:04}") for i in range(200)]
    with new_store(tmp_path, lines) as store:
        ranks = [item.rank for item in store.sample(32, 1 << 20)]
        assert 32 <= len(ranks) <= 33
        assert sum(b == a + 1 for a, b in itertools.pairwise(sorted(ranks))) >= 16
        assert len(store.sample(32, 10)) < 10
        assert len(store.spread(7)) == 7


def test_a_sample_has_the_item_that_may_take_most(tmp_path: Path) -> None:
    lines = [completion(f"c{i}", "long " * 500 if i == 77 else f"{i:04}") for i in range(200)]
    with new_store(tmp_path, lines) as store:
        assert "c77" in {item.custom_id for item in store.sample(32, 1 << 20)}


def test_one_process_works_on_a_job(tmp_path: Path) -> None:
    tmp_path.joinpath("job").mkdir()
    with JobLock(tmp_path / "job"):
        assert lock.owner(tmp_path / "job") == os.getpid()
        with pytest.raises(BusyError, match=f"process {os.getpid()} works on job `job`"):
            JobLock(tmp_path / "job")
    assert lock.owner(tmp_path / "job") is None
    JobLock(tmp_path / "job").release()


def test_the_lock_of_a_deleted_job_is_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = lock._take

    def deleted_meanwhile(fd: int) -> bool:
        (tmp_path / lock.FILE_NAME).unlink()
        return take(fd)

    with monkeypatch.context() as patch:
        patch.setattr(lock, "_take", deleted_meanwhile)
        with pytest.raises(BusyError):
            JobLock(tmp_path)
    JobLock(tmp_path).release()


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from loadmaster.jobs.lock import JobLock;"
        "held = JobLock(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(BusyError, match=str(process.pid)):
            JobLock(tmp_path)
        process.kill()
        process.wait()
        JobLock(tmp_path).release()


def test_a_folder_of_jobs(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "jobs")
    assert shelf.ids() == []
    path = write(tmp_path / "in.jsonl", [completion("a")])
    for job_id in ("batch_one", "batch_two"):
        job = NewJob(job_id=job_id, model="m", settings="{}")
        shelf.create(job, read_lines(path, new_check()), order_of)
    assert shelf.find("batch_o") == shelf.find("one") == "batch_one"
    for missing in ("batch_", "three"):
        with pytest.raises(NotFoundError):
            shelf.find(missing)
    with pytest.raises(UsageError):
        shelf.find("../etc")
    with pytest.raises(BusyError):
        shelf.create(job, read_lines(path, new_check()), order_of)
    assert {found.job_id for found in shelf.jobs()} == {"batch_one", "batch_two"}
    shelf.delete("batch_one")
    assert shelf.ids() == ["batch_two"]


def test_what_a_dead_process_left_is_removed(tmp_path: Path) -> None:
    left, half = tmp_path / ".batch_old.999999999.part", tmp_path / "batch_one"
    alive = tmp_path / f".batch_new.{os.getpid()}.part"
    for folder in (left, half, alive):
        folder.mkdir()
        (folder / "rubbish").touch()
    path = write(tmp_path / "in.jsonl", [completion("a")])
    job = NewJob(job_id="batch_one", model="m", settings="{}")
    Shelf(tmp_path).create(job, read_lines(path, new_check()), order_of)
    assert [left.exists(), alive.exists()] == [False, True]
    assert Shelf(tmp_path).ids() == ["batch_one"]


def test_of_two_processes_that_make_one_job_the_first_one_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "in.jsonl", [completion("a")])
    job = NewJob(job_id="batch_one", model="m", settings="{}")
    shelf = Shelf(tmp_path / "jobs")

    def lines_while_another_makes_it() -> Iterator[BatchLine | BadLine]:
        yield from read_lines(path, new_check())
        with monkeypatch.context() as other:
            other.setattr(os, "getpid", lambda: 999999999)
            create_job(shelf.folder, job, read_lines(path, new_check()), order_of)
        with JobStore(shelf.path("batch_one")) as store:
            store.commit([result(1)])

    with pytest.raises(BusyError, match="another process has made job"):
        shelf.create(job, lines_while_another_makes_it(), order_of)
    with JobStore(shelf.path("batch_one")) as store:
        assert store.counts().done == 1
    assert os.listdir(shelf.folder) == ["batch_one"]


def test_a_cancellation_counts_from_the_moment_a_process_has_the_job(tmp_path: Path) -> None:
    with new_store(tmp_path, [completion("a")]) as store:
        store.ask_to_cancel(os.getpid())  # while it still reads the file
        store.begin_run()
        assert store.cancel_asked()
        store.end_run("cancelled", None, 1.0)
        store.begin_run()
        assert not store.cancel_asked()
        store.ask_to_cancel(os.getpid() + 1)  # of one that died before it saw it
        store.begin_run()
        assert not store.cancel_asked()


def test_a_store_that_is_damaged_or_from_later_is_named(tmp_path: Path) -> None:
    with new_store(tmp_path, [completion("a")]) as store:
        folder = store.folder
    with sqlite3.connect(folder / database.FILE_NAME) as raw:
        raw.execute("PRAGMA user_version=99")
    raw.close()
    with pytest.raises(DamagedFileError, match="version 99"):
        JobStore(folder)
    (folder / database.FILE_NAME).write_bytes(b"rubbish" * 1000)
    with pytest.raises(DamagedFileError):
        JobStore(folder)


def test_a_store_can_be_read_while_it_is_written(tmp_path: Path) -> None:
    with new_store(tmp_path, [completion("a"), completion("b")]) as store:
        store.commit([result(1)])
        with JobStore(store.folder, read_only=True) as reader:
            assert reader.counts().done == 1
            store.commit([result(2)])
            assert reader.counts().done == 2
            with pytest.raises(database.JobStoreError):
                reader.ask_to_cancel(os.getpid())
    with JobStore(store.folder, read_only=True) as reader:
        assert reader.counts().done == 2


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    assert write_lines(path, [b"one", b"two"]) == 2
    with pytest.raises(TypeError), atomic_file(path) as file:
        file.writelines([b"half", "no bytes"])  # type: ignore[list-item]
    assert path.read_bytes() == b"one\ntwo\n"
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


def test_an_output_that_cannot_be_written_is_known_before(tmp_path: Path) -> None:
    check_writable(tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OutputError, match="folder"):
        check_writable(tmp_path)
    with pytest.raises(OutputError, match="No such file"):
        check_writable(tmp_path / "no" / "out.jsonl")
    with pytest.raises(OutputError, match="No such file"):
        write_lines(tmp_path / "no" / "out.jsonl", [])


def test_a_job_is_not_seen_before_it_is_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", [completion(f"c{i}") for i in range(3)])
    job = NewJob(job_id="job", model="m", settings="{}")

    def lines() -> Iterator[BatchLine | BadLine]:
        for line in read_lines(path, new_check()):
            assert not (tmp_path / "job").exists()
            yield line

    create_job(tmp_path, job, lines(), order_of)
    assert (tmp_path / "job").is_dir()
    assert (tmp_path / "job").stat().st_mode & 0o077 == 0
