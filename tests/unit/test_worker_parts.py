"""What surrounds a worker, each part alone: log, meter, environment, cgroup files, post-mortem."""

import os
from pathlib import Path

import pytest

from loadmaster.engine import cap, postmortem, spawn
from loadmaster.engine.logtail import KEPT_LINES, LogTail
from loadmaster.engine.meter import parse_status
from loadmaster.engine.postmortem import Death
from loadmaster.engine.types import EngineBuild
from loadmaster.errors import EngineCrashedError, ModelChangedError
from loadmaster.model.stamp import current_stamp
from loadmaster.units import GIB, KIB, Bytes

STATUS = """Name:\tpython
VmRSS:\t    6000 kB
RssAnon:\t    1000 kB
RssFile:\t    5000 kB
RssShmem:\t      10 kB
VmSwap:\t     200 kB
"""


def test_own_memory_counts_swap_and_not_files() -> None:
    memory = parse_status(STATUS)
    assert memory.own_bytes == 1210 * KIB
    assert memory.mapped_bytes == 5000 * KIB


def test_the_log_keeps_its_last_lines() -> None:
    log = LogTail()
    for number in range(KEPT_LINES + 5):
        log.feed(f"line {number}\n".encode())
    assert len(log.lines()) == KEPT_LINES
    assert log.lines()[-1] == f"line {KEPT_LINES + 4}"


def test_the_log_cannot_steer_a_terminal() -> None:
    log = LogTail()
    log.feed(b"\x1b[31mred\x07 \xff\nhalf a ")
    log.feed(b"line")
    log.finish()
    assert log.lines() == ("[31mred  \N{REPLACEMENT CHARACTER}", "half a line")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("E llama_model_load: no such file", "llama_model_load: no such file"),
        ("ggml.c:3758: GGML_ASSERT(x) failed", "ggml.c:3758: GGML_ASSERT(x) failed"),
        ("  what():  std::bad_alloc", "what():  std::bad_alloc"),
        ("W a warning", None),
    ],
)
def test_the_last_error_of_the_engine(line: str, error: str | None) -> None:
    log = LogTail()
    log.feed(f"I something\n{line}\nI something else\n".encode())
    assert log.last_error() == error


def test_the_environment_is_an_allow_list(tmp_path: Path) -> None:
    build = EngineBuild(id="x", target="cpu", version="1", root=tmp_path)
    secrets = {"HF_TOKEN": "s", "LD_PRELOAD": "x.so", "LLAMA_ARG_N_GPU_LAYERS": "9", "A_KEY": "k"}
    environment = spawn.worker_environment(
        build, 64, {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "1", **secrets}
    )
    assert not secrets.keys() & environment.keys()
    assert environment["CUDA_VISIBLE_DEVICES"] == "1"
    assert environment["GGML_OP_OFFLOAD_MIN_BATCH"] == "64"
    assert environment["GGML_NO_BACKTRACE"] == "1"


def death(status: int, **changes: object) -> Death:
    fields: dict[str, object] = {
        "doing": "generating", "oom_kills": 0, "ram_cap_bytes": None, "files": (), "stamp": "",
    }  # fmt: skip
    return Death(status=status, **{**fields, **changes})  # type: ignore[arg-type]


def test_a_crash_names_signal_activity_and_last_words() -> None:
    log = LogTail()
    log.feed(b"E cannot go on\n")
    error = postmortem.explain(death(-6), log)
    assert isinstance(error, EngineCrashedError)
    assert error.message == "the engine was killed by SIGABRT while generating: cannot go on"
    assert error.numbers["signal"] == "SIGABRT"


def test_an_exit_names_its_status() -> None:
    assert "ended with status 3" in postmortem.explain(death(3), LogTail()).message


def test_a_kill_for_want_of_memory_says_so() -> None:
    error = postmortem.explain(death(-9, oom_kills=1, ram_cap_bytes=Bytes(2 * GIB)), LogTail())
    assert "out of memory" in error.message
    assert "2.00 GiB" in error.message


def test_a_plain_kill_does_not_blame_memory() -> None:
    assert "memory" not in postmortem.explain(death(-9), LogTail()).message


def test_a_bus_error_of_a_changed_model_says_so(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"x" * 100)
    stamp = current_stamp([path])
    same = postmortem.explain(death(-7, files=(path,), stamp=stamp), LogTail())
    assert isinstance(same, EngineCrashedError)
    path.write_bytes(b"x")
    changed = postmortem.explain(death(-7, files=(path,), stamp=stamp), LogTail())
    assert isinstance(changed, ModelChangedError)


def _v2_tree(root: Path, own: str, delegated: str) -> None:
    folder = root / own.lstrip("/")
    folder.mkdir(parents=True)
    for path in (folder, *folder.parents):
        control = "memory" if path == root / delegated.lstrip("/") else ""
        (path / "cgroup.subtree_control").write_text(control)
        if path == root:
            return


def test_a_v2_cgroup_is_made_where_memory_is_delegated(tmp_path: Path) -> None:
    _v2_tree(tmp_path, "/user/app/shell", "/user")
    found = list(cap._v2_candidates(tmp_path, "/user/app/shell"))
    assert [folder for folder, _ in found] == [tmp_path / "user"]


def test_no_cgroup_where_nothing_is_writable(tmp_path: Path) -> None:
    assert cap.MemoryCgroup.create(os.getpid(), Bytes(GIB), root=tmp_path / "none") is None
