"""A server that is used, broken and ended: no packet leaves, and no prompt is left anywhere.

    python -m benchmarks.serving.egress [--quick]

The server runs in a network namespace whose only way out is an interface that counts. It is asked
by every API, with addresses of the net wherever a client could put one, on the real engine and on
the fake one, with core dumps allowed; then its workers are killed by SIGABRT and SIGSEGV, and the
server itself. Every prompt and every key has a text of its own, which is looked for in files, logs,
core dumps, arguments and environments; so have files and batches, whose text may be in the state
folder and nowhere else. A planted packet and planted texts show that they are seen.

    packets_out        packets off loopback; packets_aside: on loopback, to other ports
    canary_hits        places that have a prompt, a key or an answer that may not
    kept_files         files of the state folder that have a batch's text, as they should
    controls_missed    planted packets and texts that were not found
"""

import argparse
import json
import os
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from benchmarks.serving import keeping, packets
from benchmarks.serving.canary import in_files, in_processes
from loadmaster.engine import builds
from loadmaster.errors import LoadmasterError

OUTSIDE = "http://192.0.2.7:8000"  # an address that leads to the sink
_SETTLE_S = 1.0
_SHOWN = 12


@dataclass(slots=True)
class Found:
    """What was seen."""

    requests: int = 0
    packets_out: int = 0
    packets_aside: int = 0
    hits: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    cores: int = 0
    kept: int = 0


def run(*, seed: int = 0, quick: bool = False) -> dict[str, object]:
    """In a process of its own, which has the namespace; the figures."""
    command = [sys.executable, "-m", "benchmarks.serving.egress", "--inside"]
    command += ["--quick"] if quick else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    *lines, last = done.stdout.splitlines()
    print("\n".join(lines))
    figures: dict[str, object] = json.loads(last)
    return figures


def _inside(*, quick: bool) -> dict[str, object]:
    """In a namespace where one can be made; elsewhere packets are not counted, and that is said."""
    found = Found()
    unseen = _entered()
    backends = ["fake"] if quick or not _has_engine() else ["fake", "llamacpp"]
    for backend in backends:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            tap = stack.enter_context(packets.Tap()) if unseen is None else None
            _watch_one(Path(folder), backend, tap, found)
    for title, lines in (("canary", found.hits), ("missed", found.missed)):
        for line in lines[:_SHOWN]:
            print(f"{title}: {line}")
    return {
        "egress_requests": found.requests,
        "egress_backends": backends,
        "packets_out": found.packets_out if unseen is None else None,
        "packets_aside": found.packets_aside if unseen is None else None,
        **({} if unseen is None else {"packets_unseen": unseen}),
        "canary_hits": len(found.hits),
        "core_dumps": found.cores,
        "kept_files": found.kept,
        "controls_missed": len(found.missed),
    }


def _entered() -> str | None:
    """Enter the namespace, or say why there is none."""
    try:
        packets.enter()
    except OSError as error:
        print(f"packets cannot be counted here: {error}")
        return str(error)
    return None


def _has_engine() -> bool:
    try:
        builds.find_build()
    except LoadmasterError:
        return False
    return True


class _Server:
    """A server with a folder for each thing that it could write to."""

    def __init__(self, folder: Path, backend: str) -> None:
        self.folders = [folder / name for name in ("home", "tmp", "cwd", "cache", "log")]
        for each in self.folders:
            each.mkdir()
        home, temporary, cwd, cache, log = self.folders
        self.state = home / "loadmaster" / "state"
        self.key = f"key{secrets.token_hex(12)}"
        self.key_file = folder / "key"
        self.key_file.write_text(self.key)
        self.key_file.chmod(0o600)
        fake = ["--backend-options", '{"tok_s": 200.0}'] if backend == "fake" else []
        self._log = (log / "said").open("wb")
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "loadmaster", "serve", "demo", "--port", "0", "--json",
                "--debug", "--api-key-file", str(self.key_file), "--backend", backend, *fake,
            ],
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=cwd,
            env={**os.environ, **_places(home, temporary, cache, backend)},
            preexec_fn=_allow_cores,
        )  # fmt: skip
        assert self.process.stdout
        first = self.process.stdout.readline()
        (log / "first").write_bytes(first)
        self.port = int(json.loads(first)["url"].rpartition(":")[2])

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """Status and body; 0 where the connection broke."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"Authorization": f"Bearer {self.key}"}
        try:
            payload = None if body is None else json.dumps(body)
            connection.request(method, path, payload, headers)
            response = connection.getresponse()
            return response.status, response.read()
        except (HTTPException, OSError):
            return 0, b""
        finally:
            connection.close()

    def workers(self) -> list[int]:
        """Its worker processes."""
        import psutil

        children = psutil.Process(self.process.pid).children(recursive=True)
        return [c.pid for c in children if "loadmaster.engine.worker" in c.cmdline()]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        assert self.process.stdout
        (self.folders[-1] / "rest").write_bytes(self.process.stdout.read())
        self.process.wait()
        self._log.close()


def _places(home: Path, temporary: Path, cache: Path, backend: str) -> dict[str, str]:
    """Every folder that a program finds by its environment."""
    own = {
        "TMPDIR": str(temporary), "HOME": str(home), "XDG_CACHE_HOME": str(cache),
        "XDG_DATA_HOME": str(home / "data"), "XDG_CONFIG_HOME": str(home / "config"),
        "XDG_STATE_HOME": str(home / "state"),
    }  # fmt: skip
    if backend == "fake":
        return {**own, "LOADMASTER_HOME": str(home / "loadmaster")}
    # The engine is where it is: its build is found before the folders are moved.
    target = home / "loadmaster" / "engines"
    target.parent.mkdir(parents=True)
    target.symlink_to(builds.find_build().root.parent)
    return {**own, "LOADMASTER_HOME": str(home / "loadmaster")}


def _allow_cores() -> None:
    """What a careless shell allows; the server has to refuse it itself."""
    resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _watch_one(folder: Path, backend: str, tap: packets.Tap | None, found: Found) -> None:
    canary, kept = f"canary{secrets.token_hex(12)}", f"kept{secrets.token_hex(12)}"
    server = _Server(folder, backend)
    if tap is not None:
        tap.expect(server.port)
    try:
        _wait_ready(server)
        for method, path, body in _requests(canary):
            server.ask(method, path, body)
            found.requests += 1
        found.requests += keeping.use(server, kept)
        for text in (canary, kept, server.key):
            found.hits += in_processes(text, server.process.pid)
        _kill_everyone(server, canary, found)
    finally:
        server.close()
    time.sleep(_SETTLE_S)
    if tap is not None:
        _count(tap.taken(), found)
        found.missed += [f"{backend}: {what}" for what in _packet_controls(tap)]
    for text in (canary, server.key):
        found.hits += in_files(text, [*server.folders, Path("/dev/shm")])
    found.hits += keeping.astray(kept, [*server.folders, Path("/dev/shm")], server.state)
    n_kept = keeping.count_kept(kept, server.state)
    found.kept += n_kept
    if not n_kept:
        found.missed.append(f"{backend}: the lines of a batch in {server.state.name}")
    found.cores += sum(1 for path in folder.rglob("core*") if path.is_file())
    found.missed += [f"{backend}: {what}" for what in _controls(folder)]


def _wait_ready(server: _Server) -> None:
    deadline = time.monotonic() + 60
    while b'"ready"' not in server.ask("GET", "/loadmaster/v1/models")[1]:
        assert time.monotonic() < deadline, "the server did not come up"
        time.sleep(0.05)


def _kill_everyone(server: _Server, canary: str, found: Found) -> None:
    """Workers and the server die while they answer; each could leave a core dump."""
    slow = {"model": "demo", "messages": [_said(canary)], "max_tokens": 1500, "stream": True}
    for number in (signal.SIGABRT, signal.SIGSEGV, None):
        connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
        headers = {"x-api-key": server.key}
        with suppress(HTTPException, OSError):
            connection.request("POST", "/v1/chat/completions", json.dumps(slow), headers)
            connection.getresponse().read(2000)
        if number is None:
            server.process.send_signal(signal.SIGABRT)
            server.process.wait(30)
        else:
            for pid in server.workers():
                os.kill(pid, number)
            _wait_ready(server)
        connection.close()
        found.requests += 1


def _count(count: packets.Count, found: Found) -> None:
    for title, counter in (("out", count.out), ("aside", count.aside)):
        for place, number in counter.items():
            print(f"{title}: {number} packets to {place}")
    found.packets_out += count.out.total()
    found.packets_aside += count.aside.total()


def _said(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _requests(canary: str) -> Iterator[tuple[str, str, Any]]:
    """By every API, right and wrong, with addresses of the net wherever one could be."""
    chat = {"model": "demo", "messages": [_said(canary)], "max_tokens": 8}
    completion = {"model": "demo", "prompt": canary, "max_tokens": 8}
    image = {"type": "image_url", "image_url": {"url": f"{OUTSIDE}/{canary}.png"}}
    schema = {"$ref": f"{OUTSIDE}/{canary}.json"}
    tool = {"type": "function", "function": {"name": "f", "description": canary}}
    for stream in (False, True):
        yield "POST", "/v1/chat/completions", {**chat, "stream": stream, "user": canary}
        yield "POST", "/v1/completions", {**completion, "stream": stream, "stop": [canary]}
        yield "POST", "/v1/responses", {"model": "demo", "input": canary, "stream": stream}
        yield "POST", "/v1/messages", {**chat, "stream": stream, "system": canary}
        yield "POST", "/api/chat", {**chat, "stream": stream}
        yield "POST", "/api/generate", {**completion, "stream": stream}
    yield "POST", "/completion", completion
    yield "POST", "/infill", {"model": "demo", "input_prefix": canary, "input_suffix": canary}
    yield "POST", "/tokenize", {"model": "demo", "content": canary}
    yield "POST", "/apply-template", chat
    yield "POST", "/v1/messages/count_tokens", chat
    yield "POST", "/v1/embeddings", {"model": "demo", "input": canary}
    yield "POST", "/v1/rerank", {"model": "demo", "query": canary, "documents": [canary]}
    yield "POST", "/v1/chat/completions", {**chat, "tools": [tool]}
    yield "POST", "/v1/chat/completions", {**chat, "messages": [{**_said(""), "content": [image]}]}
    yield "POST", "/v1/chat/completions", {**chat, "max_tokens": canary, "logit_bias": {canary: 1}}
    yield "POST", "/v1/chat/completions", {**chat, "messages": [{"role": canary, "content": 1}]}
    yield "POST", "/v1/chat/completions", {**chat, "messages": [_said(canary * 50_000)]}
    held = {"type": "json_schema", "json_schema": {"schema": schema}}
    yield "POST", "/v1/chat/completions", {**chat, "response_format": held}
    constant = {"type": "json_schema", "json_schema": {"schema": {"const": canary}}}
    yield "POST", "/v1/chat/completions", {**chat, "response_format": constant}
    yield "POST", "/api/pull", {"model": f"{OUTSIDE}/{canary}"}
    yield "POST", "/api/show", {"model": f"{OUTSIDE}/{canary}.gguf"}
    yield "POST", "/models/load", {"model": f"hf:{canary}/{canary}:Q4_K_M"}
    yield "POST", "/loadmaster/v1/plan", {"model": f"{OUTSIDE}/{canary}.gguf"}
    yield "GET", f"/{canary}?{canary}", None
    yield "GET", f"/v1/models/{canary}", None
    for path in ("/metrics", "/v1/models", "/loadmaster/v1/memory", "/loadmaster/v1/doctor"):
        yield "GET", path, None


# -- controls: what is planted must be found


def _packet_controls(tap: packets.Tap) -> Iterator[str]:
    packets.plant()
    time.sleep(_SETTLE_S)
    count = tap.taken()
    if count.out.total() < 1:
        yield "a packet to 192.0.2.99"
    if count.aside.total() < 1:
        yield "a packet to port 53 of loopback"


def _controls(folder: Path) -> Iterator[str]:
    text = f"planted{secrets.token_hex(8)}"
    aside = folder / "planted"
    for name, content in {
        "log": f"x {text} y".encode(), "utf16": text.encode("utf-16"),
        "hex": text.encode().hex().encode(),
        "split": b"\x00" * ((1 << 20) - 5) + text.encode(), f"name-{text}": b"",
    }.items():  # fmt: skip
        aside.mkdir(exist_ok=True)
        (aside / name).write_bytes(content)
        if not list(in_files(text, [aside])):
            yield f"a text in a file: {name}"
        (aside / name).unlink()
    yield from _process_controls(text)
    yield from _core_control(folder, text)


def _core_control(folder: Path, text: str) -> Iterator[str]:
    """A process that has the text in its memory and dumps it."""
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    if pattern.startswith(("|", "/")):
        print(f"core dumps go to `{pattern}` here, which is not looked at")
        return
    place = folder / "dumped"
    place.mkdir(exist_ok=True)
    code = f"import os; held = {text[:8]!r} + {text[8:]!r}; os.abort()"
    subprocess.run(
        [sys.executable, "-c", code], cwd=place, preexec_fn=_allow_cores, stderr=subprocess.DEVNULL
    )
    if not list(in_files(text, [place])):
        yield "a text in a core dump"


def _process_controls(text: str) -> Iterator[str]:
    for what, words, environment in (
        ("argument", [text], {}),
        ("environment", [], {"PLANTED": text}),
    ):
        child = subprocess.Popen(
            [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()", *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **environment},
        )  # fmt: skip
        assert child.stdout
        assert child.stdin
        child.stdout.readline()
        if not list(in_processes(text, child.pid)):
            yield f"a text in an {what}"
        child.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.egress")
    parser.add_argument("--quick", action="store_true", help="on the fake backend alone")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.inside:
        print(json.dumps(run(quick=options.quick)))
        return
    print(json.dumps(_inside(quick=options.quick)))


if __name__ == "__main__":
    main()
