"""A server on a socket under hostile input: a sample of what `benchmarks.serve_faults` sends."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.serving import corpus
from benchmarks.serving.blasts import blast
from benchmarks.serving.bombs import all_bombs
from benchmarks.serving.canary import in_files, in_processes
from benchmarks.serving.guard_walk import host_styles, key_styles, walk
from benchmarks.serving.openapi_fuzz import fuzz
from benchmarks.serving.raw import exchange
from tests.serve_parts import Running, serving

BODIES = {name: raw for name, raw in corpus.bodies().items() if len(raw) < 3 << 20}
BOMBS = (
    "schema: patterns at once", "schema: longest chain", "schema: 10^9 items",
    "template: 10^9 letters", "chat: 10,000 messages", "prompt: one letter",
)  # fmt: skip
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("home")
    with serving("demo", "--embeddings", "embed=demo", home=home, fake={"eog_after": 4}) as one:
        one.wait_until_idle("demo")
        yield one
        assert one.process.poll() is None


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, str]]:
    home = tmp_path_factory.mktemp("keyed")
    key = home / "key"
    with serving("--api-key-file", str(key), "demo", home=home, fake={}) as one:
        yield one, key.read_text().strip()


def test_requests_of_the_document_get_what_it_says(server: Running) -> None:
    verdict = fuzz(server.port, seed=1, n_wrong=2, n_soup=2, n_odd=4)
    assert verdict.server_errors == []
    assert verdict.undocumented == []
    assert verdict.nonconforming == []
    assert verdict.hung == []
    assert verdict.answered_200 > 20


@pytest.mark.parametrize("case", [*corpus.http_cases()], ids=lambda case: case.name)
def test_bytes_that_are_no_request_harm_nobody(server: Running, case: corpus.Case) -> None:
    reply = exchange(
        server.port, *case.pieces, pause_s=case.pause_s / 10, leave=case.leave, head_only=True
    )
    assert not reply.hung
    assert reply.status is not None or not case.answered
    assert (reply.status or 400) < 500
    assert not case.statuses or reply.status in case.statuses
    assert exchange(server.port, HEALTH).status == 200


@pytest.mark.parametrize("name", BODIES)
def test_odd_bodies_are_the_clients_fault(server: Running, name: str) -> None:
    reply = exchange(server.port, corpus.posted(corpus.CHAT, BODIES[name]))
    assert reply.status is not None
    assert reply.status < 500, reply.shown


def test_no_route_is_unguarded_under_any_host(server: Running) -> None:
    found = walk(server.port, host_styles(), every=29)
    assert found.asked > 200
    assert (found.unguarded, found.wrongly_refused, found.failed) == ([], [], [])


def test_no_route_is_unguarded_without_the_key(keyed: tuple[Running, str]) -> None:
    running, key = keyed
    found = walk(running.port, key_styles(key), every=29)
    assert found.asked > 200
    assert (found.unguarded, found.wrongly_refused, found.failed) == ([], [], [])


def test_bombs_end_and_streams_beside_them_go_on(tmp_path: Path) -> None:
    deaths: list[str] = []
    bombs = [bomb for bomb in all_bombs() if bomb.name in BOMBS]
    assert len(bombs) == len(BOMBS)
    found = blast(tmp_path, deaths, bombs, fake={"tok_s": 200.0})
    assert (found.failed, found.hung, deaths) == ([], [], [])
    assert (found.worker_deaths, found.broken_streams) == (0, 0)
    assert set(found.statuses) <= {200, 400, 413}


# -- the detectors see what is planted


def test_a_planted_text_is_found_in_files_and_names(tmp_path: Path) -> None:
    text = "canary-of-this-test"
    (tmp_path / "a").write_bytes(b"\x00" * ((1 << 20) - 3) + text.encode())
    (tmp_path / "b").write_text(text.encode().hex())
    (tmp_path / "c").write_bytes(text.encode("utf-16-le"))
    (tmp_path / f"d-{text}").touch()
    (tmp_path / "e").write_text("nothing")
    assert len(list(in_files(text, [tmp_path]))) == 4


def test_a_planted_text_is_found_in_processes() -> None:
    text = "canary-of-that-test"
    code = "import sys; print(flush=True); sys.stdin.read()"
    for words, extra in ((["x" + text], {}), ([], {"PLANTED": text})):
        child = subprocess.Popen(
            [sys.executable, "-c", code, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, **extra},
        )  # fmt: skip
        assert child.stdout is not None
        child.stdout.readline()
        hits = list(in_processes(text, child.pid))
        child.communicate()
        assert len(hits) == 1


_TAP = """
import json, time
from benchmarks.serving import packets
try:
    packets.enter()
except OSError as error:
    print(json.dumps(str(error)))
else:
    with packets.Tap() as tap:
        time.sleep(0.1)
        before = tap.taken()
        packets.plant()
        deadline = time.monotonic() + 5
        out = aside = 0
        while not (out and aside) and time.monotonic() < deadline:
            time.sleep(0.01)
            seen = tap.taken()
            out, aside = out + seen.out.total(), aside + seen.aside.total()
    print(json.dumps([before.out.total(), out, aside]))
"""


def test_a_planted_packet_is_seen() -> None:
    """Where a namespace can be made; elsewhere `enter` says why not."""
    done = subprocess.run([sys.executable, "-c", _TAP], capture_output=True, text=True, timeout=30)
    told = done.stdout.strip()
    if told.startswith("["):
        assert told == "[0, 1, 1]"
    else:
        assert shutil.which("ip") is None or told, done.stderr


def test_prompts_of_one_key_share_no_cells_with_those_of_another(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("first\nsecond\n")
    keys.chmod(0o600)
    with serving("demo", "--api-key-file", str(keys), home=tmp_path, fake={}) as one:

        def n_cached(key: str) -> int:
            messages = [
                {"role": "user", "content": "a prompt that is long enough to be shared " * 9}
            ]
            body = {"model": "demo", "messages": messages, "max_tokens": 2}
            answer = one.ask("POST", "/v1/chat/completions", body, {"x-api-key": key})[1]
            cached: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            return cached

        assert n_cached("first") == 0
        assert n_cached("first") > 100
        assert n_cached("second") == 0
        assert n_cached("second") > 100
