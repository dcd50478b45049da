"""Kept files and ordered batches on the disk: whole or not there, and only by their ids."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loadmaster.errors import BusyError, LoadmasterError, NotFoundError
from loadmaster.jobs import file_shelf
from loadmaster.jobs.file_shelf import FileShelf, StorageFullError, check_room, new_file_id
from loadmaster.jobs.orders import BatchOrder, OrderBook, OrderEnd, new_batch_id
from loadmaster.jobs.types import Counts

HOSTILE = (
    "", ".", "..", "../../etc/passwd", "file-", "file-" + "0" * 23, "file-" + "0" * 25,
    "file-" + "G" * 24, "file-" + "0" * 24 + "\n", "/etc/passwd", "file-" + "٣" * 24, "\0",
)  # fmt: skip


def kept(shelf: FileShelf, text: bytes = b"{}\n", owner: str = "") -> str:
    incoming = shelf.incoming("batch", owner)
    incoming.write(text)
    card = incoming.finish("in.jsonl")
    incoming.close()
    return card.file_id


def test_a_file_is_there_with_all_its_bytes_for_its_owner_alone(tmp_path: Path) -> None:
    shelf = FileShelf(tmp_path / "files")
    file_id = kept(shelf, b"a line\n", owner="me")
    card = shelf.find(file_id, "me")
    assert (card.size_bytes, card.filename, card.purpose) == (7, "in.jsonl", "batch")
    with shelf.open(file_id, "me") as file:
        assert file.read() == b"a line\n"
    assert [one.file_id for one in shelf.all("me")] == [file_id]
    assert shelf.all("you") == []
    for call in (shelf.find, shelf.open, shelf.delete):
        with pytest.raises(NotFoundError):
            call(file_id, "you")
    assert (tmp_path / "files").stat().st_mode & 0o077 == 0
    assert shelf.content(file_id).stat().st_mode & 0o077 == 0


def test_an_upload_that_is_broken_off_leaves_nothing(tmp_path: Path) -> None:
    shelf = FileShelf(tmp_path)
    incoming = shelf.incoming("batch", "")
    incoming.write(b"half")
    incoming.close()
    assert list(tmp_path.iterdir()) == []


def test_what_a_dead_process_left_is_swept_and_what_a_living_one_writes_is_not(
    tmp_path: Path,
) -> None:
    shelf = FileShelf(tmp_path)
    living = shelf.incoming("batch", "")
    dead = tmp_path / f".{new_file_id()}.{2**22 + 1}.part"
    dead.mkdir()
    shelf.sweep()
    assert not dead.exists()
    assert living.finish("in.jsonl").size_bytes == 0


@pytest.mark.parametrize("file_id", HOSTILE)
def test_a_hostile_id_is_no_file(tmp_path: Path, file_id: str) -> None:
    shelf = FileShelf(tmp_path / "files")
    kept(shelf)
    calls: list[Callable[[], Any]] = [
        lambda: shelf.find(file_id, ""),
        lambda: shelf.open(file_id, ""),
        lambda: shelf.delete(file_id, ""),
        lambda: shelf.content(file_id),
        lambda: shelf.reserve(file_id),
    ]
    for call in calls:
        with pytest.raises(NotFoundError):
            call()


def test_a_deleted_file_is_gone_but_who_reads_it_reads_on(tmp_path: Path) -> None:
    shelf = FileShelf(tmp_path)
    file_id = kept(shelf, b"still here")
    with shelf.open(file_id, "") as file:
        shelf.delete(file_id, "")
        assert file.read() == b"still here"
    assert shelf.all("") == []
    with pytest.raises(NotFoundError):
        shelf.delete(file_id, "")


def test_a_file_that_was_to_expire_is_gone_after_that(tmp_path: Path) -> None:
    shelf = FileShelf(tmp_path)
    incoming = shelf.incoming("batch", "")
    card = incoming.finish("in.jsonl", expires_s=1.0)
    with pytest.raises(NotFoundError):
        shelf.find(card.file_id, "")
    assert list(tmp_path.iterdir()) == []


def test_a_reserved_file_is_seen_once_it_is_published(tmp_path: Path) -> None:
    shelf = FileShelf(tmp_path)
    file_id = new_file_id()
    shelf.reserve(file_id).write_bytes(b"answers")
    assert shelf.reserve(file_id).read_bytes() == b"answers"  # again changes nothing
    with pytest.raises(NotFoundError):
        shelf.find(file_id, "me")
    card = shelf.publish(file_id, filename="out.jsonl", owner="me")
    assert shelf.find(file_id, "me") == card
    assert (card.size_bytes, card.purpose) == (7, "batch_output")


def test_a_full_disk_refuses_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = file_shelf.RESERVE_BYTES + 10
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    check_room(tmp_path / "not" / "there", 10)
    with pytest.raises(StorageFullError) as refusal:
        check_room(tmp_path, 11)
    assert refusal.value.numbers == {"free_bytes": free, "needed_bytes": 11}
    assert refusal.value.http_status == 507
    incoming = FileShelf(tmp_path).incoming("batch", "")
    with pytest.raises(StorageFullError):
        incoming.write(b"x" * 11)
    incoming.close()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_is_our_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = FileShelf(tmp_path)
    incoming = shelf.incoming("batch", "")

    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(LoadmasterError, match="Input/output error"):
        incoming.finish("in.jsonl")
    incoming.close()
    assert shelf.all("") == []


def order(owner: str = "", created_s: float = 1.0) -> BatchOrder:
    return BatchOrder(
        batch_id=new_batch_id(), owner=owner, endpoint="/v1/completions",
        input_file_id=new_file_id(), completion_window="24h", created_s=created_s, expires_s=9.0,
        output_file_id=new_file_id(), error_file_id=new_file_id(), metadata={"night": "1"},
    )  # fmt: skip


def test_orders_are_read_as_they_were_written(tmp_path: Path) -> None:
    book = OrderBook(tmp_path / "batches")
    old, new = order(created_s=1.0), order("me", created_s=2.0)
    for one in (old, new):
        book.add(one)
    assert book.all() == [new, old]
    assert book.find(new.batch_id, "me") == new
    with pytest.raises(NotFoundError):
        book.find(new.batch_id, "")
    end = OrderEnd(status="completed", at_s=3.0, counts=Counts(done=1, failed=2, left=0))
    ended = BatchOrder(**{**{n: getattr(old, n) for n in old.__slots__}, "end": end})
    book.write(ended)
    assert book.read(old.batch_id) == ended


@pytest.mark.parametrize("batch_id", ["", "..", "../x", "batch_", "batch_" + "0" * 13, "job"])
def test_a_hostile_id_is_no_batch(tmp_path: Path, batch_id: str) -> None:
    book = OrderBook(tmp_path)
    (tmp_path / "card.json").write_text("{}")
    assert book.read(batch_id) is None
    with pytest.raises(NotFoundError):
        book.find(batch_id, "")


def test_one_process_attends_and_any_may_ask_to_cancel(tmp_path: Path) -> None:
    book = OrderBook(tmp_path)
    one = order()
    book.add(one)
    with book.claim(one.batch_id), pytest.raises(BusyError):
        book.claim(one.batch_id)
    assert not book.cancel_asked(one.batch_id)
    book.ask_to_cancel(one.batch_id)
    asked = book.find(one.batch_id, "").cancelling_s
    assert asked is not None
    book.ask_to_cancel(one.batch_id)  # again changes nothing
    assert book.find(one.batch_id, "").cancelling_s == asked


def test_an_order_that_cannot_be_written_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = OrderBook(tmp_path)

    def fail(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(LoadmasterError, match="No space left"):
        book.add(order())
    assert book.all() == []
    assert list(tmp_path.iterdir()) == []
