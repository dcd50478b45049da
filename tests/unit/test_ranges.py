"""Reading a remote file's beginning: how much is read, what is checked, when it ends."""

import pytest

from benchmarks.hostile_server import HostileServer
from loadmaster.errors import DamagedFileError, LoadmasterError, NetworkError
from loadmaster.model.http import Http
from loadmaster.model.ranges import RemoteFile, Span, Version, parse_content_range
from tests import remote_parts as parts

CONTENT = parts.content(size=700_000)
LIMIT = 1 << 20


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("bytes 0-9/10", Span(first=0, last=9, total=10)),
        ("bytes 0-10/10", None),
        ("bytes 5-4/10", None),
        ("bytes 0-9/*", None),
        ("bytes */10", None),
        ("0-9/10", None),
        (None, None),
        ("bytes 0-9/" + "9" * 40, None),
    ],
)
def test_content_range(text: str | None, span: Span | None) -> None:
    assert parse_content_range(text) == span


def test_versions_differ_only_in_what_both_say() -> None:
    one = Version(size_bytes=1, etag='"a"', last_modified=None)
    assert one.differs_from(Version(size_bytes=1, etag='"b"', last_modified=None))
    assert one.differs_from(Version(size_bytes=2, etag='"a"', last_modified=None))
    assert not one.differs_from(Version(size_bytes=None, etag=None, last_modified="x"))
    assert Version(size_bytes=1, etag='W/"a"', last_modified=None).validator is None


def read(server: HostileServer, at: int, length: int, limit: int = LIMIT) -> tuple[bytes, int]:
    with Http(patience=parts.patience(server.behaviour)) as http:
        file = RemoteFile(http, server.url + "/m.gguf", "m.gguf", limit_bytes=limit)
        try:
            return file.read_at(at, length), file.bytes_read
        finally:
            file.close()


@pytest.mark.parametrize(
    "behaviour", ["honest", "ranges_ignored", "busy", "fails_once", "weak_etag", "head_lies"]
)
def test_reads_what_is_asked_for(behaviour: str) -> None:
    with HostileServer({"/m.gguf": CONTENT}, behaviour=behaviour) as server:
        found, n_bytes = read(server, 100_000, 100_000)
    assert found == CONTENT[100_000:200_000]
    assert n_bytes < 300_000


def test_at_the_end_it_gives_what_there_is() -> None:
    with HostileServer({"/m.gguf": CONTENT}) as server:
        found, _ = read(server, len(CONTENT) - 10, 100)
    assert found == CONTENT[-10:]


def test_windows_grow() -> None:
    with HostileServer({"/m.gguf": CONTENT}) as server:
        read(server, 0, 600_000)
        assert len(server.traffic.requests) == 3


def test_the_limit_holds() -> None:
    with (
        HostileServer({"/m.gguf": CONTENT}) as server,
        pytest.raises(DamagedFileError) as caught,
    ):
        read(server, 0, 300_000, limit=200_000)
    assert caught.value.code == "header_too_large"
    assert server.traffic.body_bytes <= 200_000


@pytest.mark.parametrize(
    "behaviour",
    ["wrong_range", "extra_body", "short_body", "redirect_loop", "slow_body", "slow_header", "gzip",
     "reset", "no_length", "chunked", "size_changes", "login_page", "gated", "silent"],
)  # fmt: skip
def test_a_server_that_misbehaves_is_refused_in_time(behaviour: str) -> None:
    with (
        HostileServer({"/m.gguf": CONTENT}, behaviour=behaviour) as server,
        pytest.raises(LoadmasterError) as caught,
    ):
        read(server, 0, 300_000)
    assert caught.value.exit_code in (5, 6)
    assert caught.value.hint


def test_a_file_that_changes_between_two_reads_is_noticed() -> None:
    other = parts.content(seed=2, size=700_000)
    with HostileServer({"/m.gguf": CONTENT}) as server, Http(patience=parts.PATIENT) as http:
        file = RemoteFile(http, server.url + "/m.gguf", "m.gguf", limit_bytes=LIMIT)
        server.behaviour, server.replacement = "etag_changes", type(server.files["/m.gguf"])(other)
        server.traffic.body_bytes = len(CONTENT)
        with pytest.raises(NetworkError, match="changed"):
            file.read_at(0, 300_000)
