"""What goes wrong in a worker, and what its parent makes of it: one clear line, nothing left."""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loadmaster.engine import confine, watch
from loadmaster.engine.process import Engine
from loadmaster.engine.types import DoneEvent, EngineBuild, GenerateEvent, VirtualDevice
from loadmaster.errors import (
    EngineCrashedError,
    EngineError,
    EngineMissingError,
    EngineRefusedError,
    EngineStalledError,
    LoadmasterError,
    ModelChangedError,
    UsageError,
)
from loadmaster.plan.types import SizingFailure
from loadmaster.units import MIB, Bytes
from tests.engine_parts import load_request, request, settings

pytestmark = pytest.mark.engine

Start = Callable[..., Engine]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"x" * 1000)
    return path


@pytest.fixture
def fake(engine_build: EngineBuild, model: Path) -> Any:
    """Start fake engines with an open model; all are closed at the end."""
    engines: list[Engine] = []

    def start(**options: object) -> Engine:
        engines.append(Engine.start(engine_build, backend="fake", options=options))
        engines[-1].load(load_request(model))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


def last(engine: Engine, **changes: Any) -> GenerateEvent:
    *_, end = engine.generate(request("r", [1, 2, 3], None, **changes))
    return end


def is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(
    ("kind", "said"),
    [("abort", "SIGABRT"), ("segv", "SIGSEGV"), ("kill", "SIGKILL"), ("exit", "status 3")],
)
def test_a_death_is_told_by_signal_or_status(
    fake: Start, monkeypatch: pytest.MonkeyPatch, kind: str, said: str
) -> None:
    # The kernel counts the kills for want of memory of the whole machine: of other tests, too.
    monkeypatch.setattr(watch, "machine_oom_kills", lambda: 0)
    engine = fake(fault={"kind": kind, "at_step": 4})
    end = last(engine)
    assert isinstance(end, DoneEvent)
    assert end.finish_reason == "failed"
    assert end.error is not None
    assert said in end.error
    assert "while generating" in end.error
    assert isinstance(engine.failure, EngineCrashedError)
    assert is_gone(engine.pid)


def test_an_engine_error_ends_the_worker(fake: Start) -> None:
    engine = fake(fault={"kind": "raise", "at_step": 2})
    end = last(engine)
    assert isinstance(end, DoneEvent)
    assert end.error == "the fake engine failed a step"
    assert is_gone(engine.pid)
    with pytest.raises(EngineError, match="failed a step"):
        engine.tokenize("x")


def test_an_engine_error_of_an_embedding_ends_the_worker(
    engine_build: EngineBuild, model: Path
) -> None:
    fault = {"fault": {"kind": "raise", "at_step": 1}}
    with Engine.start(engine_build, backend="fake", options=fault) as engine:
        engine.load(load_request(model, settings(pooling="mean")))
        with pytest.raises(UsageError):  # of the request, not of the engine
            engine.embed([[10**6]])
        assert engine.failure is None
        with pytest.raises(EngineError, match="failed a step"):
            engine.embed([[1, 2]])
        assert engine.failure is not None
        assert is_gone(engine.pid)


def test_a_worker_that_is_given_up_is_killed_and_everyone_told(fake: Start) -> None:
    engine = fake(step_s={"at_step": 1, "seconds": 60.0})
    events = engine.generate(request("r", [1], None))
    engine.give_up(EngineStalledError("it has not decoded one token"))
    *_, end = events
    assert isinstance(end, DoneEvent)
    assert end.error == "it has not decoded one token"
    assert is_gone(engine.pid)


def test_a_deadline_for_steps_can_be_set_later(fake: Start) -> None:
    engine = fake(step_s={"at_step": 1, "seconds": 60.0})
    engine.limit_steps(0.6)
    last(engine)
    assert isinstance(engine.failure, EngineStalledError)
    assert "its deadline is 1 s" in engine.failure.message


def test_garbage_from_a_worker_ends_it(fake: Start) -> None:
    engine = fake(fault={"kind": "garbage", "at_step": 2})
    end = last(engine)
    assert isinstance(end, DoneEvent)
    assert end.error is not None
    assert "no message" in end.error
    assert is_gone(engine.pid)


def test_a_stopped_worker_is_found_and_killed(fake: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SILENCE_S", 0.9)
    engine = fake(fault={"kind": "stop", "at_step": 2})
    end = last(engine)
    assert isinstance(end, DoneEvent)
    assert end.finish_reason == "failed"
    assert isinstance(engine.failure, EngineStalledError)
    assert "is stopped" in engine.failure.message
    assert is_gone(engine.pid)


def test_a_long_step_is_no_fault(fake: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SILENCE_S", 0.9)
    engine = fake(step_s={"at_step": 2, "seconds": 2.0})
    end = last(engine)
    assert isinstance(end, DoneEvent)
    assert end.finish_reason == "length"


def test_a_step_beyond_its_deadline_is(engine_build: EngineBuild, model: Path) -> None:
    options = {"step_s": {"at_step": 1, "seconds": 60.0}}
    with Engine.start(engine_build, backend="fake", options=options, step_deadline_s=0.6) as engine:
        engine.load(load_request(model))
        last(engine)
        assert isinstance(engine.failure, EngineStalledError)
        assert "deadline" in engine.failure.message


def test_cancel_cuts_a_long_step(fake: Start) -> None:
    engine = fake(step_s={"at_step": 2, "seconds": 60.0})
    events = engine.generate(request("long", [1, 2, 3], None))
    next(events)  # the first step is over
    started = time.monotonic()
    engine.cancel("long")
    *_, end = events
    assert isinstance(end, DoneEvent)
    assert end.finish_reason == "cancelled"
    assert time.monotonic() - started < 30


def test_close_ends_open_requests_and_the_worker(fake: Start) -> None:
    engine = fake(step_s={"at_step": 1, "seconds": 60.0})
    events = engine.generate(request("open", [1], None))
    engine.close()
    *_, end = events
    assert isinstance(end, DoneEvent)
    assert (end.finish_reason, end.error) == ("failed", "the engine was closed")
    assert engine.failure is None
    assert is_gone(engine.pid)
    engine.close()


def test_a_load_can_be_stopped(engine_build: EngineBuild, model: Path) -> None:
    with Engine.start(engine_build, backend="fake", options={"load_s": 60.0}) as engine:
        with pytest.raises(EngineRefusedError, match="stopped"):
            engine.load(load_request(model), lambda value: False)
        assert engine.failure is None


def test_a_refused_load_leaves_the_worker_usable(engine_build: EngineBuild, model: Path) -> None:
    with Engine.start(engine_build, backend="fake", options={"fail_load": "why"}) as engine:
        with pytest.raises(EngineRefusedError, match="why"):
            engine.load(load_request(model))
        assert engine.size(model, settings()) == SizingFailure(reason="why")
        with pytest.raises(UsageError):
            engine.generate(request("r", [1]))


def test_a_model_changed_before_the_load_is_refused(engine_build: EngineBuild, model: Path) -> None:
    planned = load_request(model)
    model.write_bytes(b"another")
    with Engine.start(engine_build, backend="fake") as engine, pytest.raises(ModelChangedError):
        engine.load(planned)


def test_a_missing_build_says_what_to_type(tmp_path: Path) -> None:
    build = EngineBuild(id="none", target="cpu", version="0", root=tmp_path)
    with pytest.raises(EngineMissingError) as missing:
        Engine.start(build)
    assert missing.value.hint is not None
    assert "loadmaster engine build" in missing.value.hint


def test_a_file_that_is_no_model_is_refused_in_the_engines_words(
    engine_build: EngineBuild, model: Path
) -> None:
    with Engine.start(engine_build) as engine:
        with pytest.raises(EngineRefusedError, match=r"cannot load `model\.gguf`"):
            engine.load(load_request(model))
        assert engine.log_tail()


def test_an_allocation_over_the_device_is_refused(
    engine_build: EngineBuild, demo_model: Path, stand_in_gpu: Callable[..., VirtualDevice]
) -> None:
    on_gpu = settings(n_gpu_layers=2, layers_per_device=(2,))
    with Engine.start(engine_build, devices=[stand_in_gpu(64 * 1024)]) as engine:
        with pytest.raises(EngineRefusedError):
            engine.load(load_request(demo_model, on_gpu))
        assert engine.memory().device_denied["gpu:0"] > 0
        assert engine.memory().device_used_bytes["gpu:0"] == 0


def test_a_ram_cap_holds(engine_build: EngineBuild, demo_model: Path) -> None:
    """By a cgroup the kernel kills it, by RLIMIT_DATA the allocation fails: both are told."""
    large = settings(n_ctx=1 << 19, type_k="f32", type_v="f32", flash_attn=True)
    with Engine.start(engine_build) as engine:
        with pytest.raises(EngineError) as failure:
            engine.load(load_request(demo_model, large, Bytes(128 * MIB)))
        assert isinstance(failure.value, EngineCrashedError | EngineRefusedError)
        caps = [each for each in engine.confinements if each.name == "memory cap"]
        assert [each.active for each in caps] == [True]
        if "cgroup" in caps[0].detail:
            assert "out of memory" in failure.value.message
            assert is_gone(engine.pid)


def test_a_worker_knows_no_secrets_and_is_confined(
    engine_build: EngineBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    with Engine.start(engine_build, backend="fake") as engine:
        process = Path(f"/proc/{engine.pid}")
        assert b"hf_canary" not in (process / "environ").read_bytes()
        assert (process / "oom_score_adj").read_text().strip() == str(confine.OOM_SCORE_ADJ)
        limits = (process / "limits").read_text()
        core = next(line for line in limits.splitlines() if line.startswith("Max core file size"))
        assert core.split()[4:6] == ["0", "0"]
        assert os.getpgid(engine.pid) == engine.pid
        assert len(engine.confinements) == 6


def test_what_is_granted_can_be_asked_without_an_engine() -> None:
    assert {each.name for each in confine.probe()} >= {"no network", "no core dumps"}


_NETWORK = """
import os, socket
from loadmaster.engine.confine import confine_worker
granted = {each.name: each.active for each in confine_worker(target="cpu", parent_pid=os.getppid())}
try:
    socket.socket(socket.AF_INET)
    print("open", granted["no network"])
except OSError:
    print("closed", granted["no network"])
try:
    open("written", "w")
    print("open", granted["no file writes"])
except OSError:
    print("closed", granted["no file writes"])
"""


def test_a_granted_protection_protects(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _NETWORK], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    for line in done.stdout.splitlines():
        assert line in ("closed True", "open False")


_ORPHAN = """
import os, signal, sys
from pathlib import Path
from loadmaster.engine.process import Engine
from loadmaster.engine.types import EngineBuild
build = EngineBuild(id="x", target="cpu", version="0", root=Path(sys.argv[1]))
engine = Engine.start(build, backend="fake", options={})
print(engine.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_parent_leaves_no_worker(engine_build: EngineBuild) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", _ORPHAN, str(engine_build.root)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.stdout.close()
    parent.wait()
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    assert poller.poll(60_000), "the worker outlived its parent by a minute"
    os.close(descriptor)


def test_a_signal_between_requests_is_found_at_the_next_one(fake: Start) -> None:
    engine = fake()
    os.kill(engine.pid, signal.SIGTERM)
    with pytest.raises(LoadmasterError, match="SIGTERM while"):
        _call_until_it_fails(engine)


def _call_until_it_fails(engine: Engine) -> None:
    while True:
        engine.tokenize("x")
