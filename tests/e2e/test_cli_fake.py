"""The commands from the first word to the last, on the fake backend and the packaged model."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli_parts import Run
from tests.serve_parts import PATIENCE_S

FAKE = ("--backend", "fake")
SAID = "This is the fake engine: it has no model. "


def test_run_streams_the_answer_and_shows_planned_beside_measured(run: Run) -> None:
    code, out, err = run("run", "demo", "Hello", "-n", "21", "--temp", "0", *FAKE)
    assert code == 0
    assert out == SAID[:21] + "\n"
    assert "planned" in err
    assert "measured" in err
    assert "21 tokens" in err
    assert err.count("fake backend: no model was run") == 2


def test_quiet_says_nothing_but_the_answer(run: Run) -> None:
    assert run("run", "demo", "Hello", "-n", "4", "--temp", "0", "-q", *FAKE) == (0, "This\n", "")


def test_json_is_one_object(run: Run) -> None:
    code, out, err = run("run", "demo", "Hello", "-n", "4", "--temp", "0", "--json", *FAKE)
    value = json.loads(out)
    assert (code, err) == (0, "")
    assert (value["text"], value["finish_reason"], value["backend"]) == ("This", "length", "fake")
    assert value["usage"]["completion_tokens"] == 4
    assert value["plan"]["fits"] is True
    assert {"planned_bytes", "measured_bytes"} < value["memory"][0].keys()


def test_argument_file_and_pipe_make_one_prompt(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("from a file\n")
    words = ("run", "demo", "argument", "-f", str(file), "--raw", "-n", "1", "--json", *FAKE)
    _, out, _ = run(*words, stdin="from a pipe\n")
    prompt = "argument\n\nfrom a file\n\nfrom a pipe"
    assert json.loads(out)["usage"]["prompt_tokens"] == len(prompt)


def test_a_plan_file_is_run_as_it_is(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    code, out, _ = run("plan", "demo", "-c", "512", "-ub", "64", "--json", *FAKE)
    assert code == 0
    file.write_text(out)
    code, out, _ = run("run", "--plan", str(file), "Hello", "-n", "4", "--json", *FAKE)
    assert code == 0
    assert json.loads(out)["plan"] == json.loads(file.read_text())


def test_a_plan_file_with_an_unknown_key_is_refused(run: Run, tmp_path: Path) -> None:
    _, out, _ = run("plan", "demo", "--json", *FAKE)
    value = json.loads(out)
    value["engine"]["n_ctxx"] = 1
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(value))
    code, _, err = run("run", "--plan", str(file), "Hello", *FAKE)
    assert code == 2
    assert "n_ctxx" in err


def test_a_changed_model_is_not_run(run: Run, tmp_path: Path) -> None:
    from loadmaster.tasks.planning import demo_model

    model, file = tmp_path / "model.gguf", tmp_path / "plan.json"
    model.write_bytes(demo_model().read_bytes())
    _, out, _ = run("plan", str(model), "--json", *FAKE)
    file.write_text(out)
    os.utime(model, (1, 1))
    code, _, err = run("run", "--plan", str(file), "Hello", *FAKE)
    assert code == 7
    assert err.startswith("error: ")
    assert "changed" in err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["run", "demo"], 2, "there is no prompt"),
        (["run"], 2, "give a MODEL or a plan"),
        (["run", "/no/model.gguf", "x"], 4, "`/no/model.gguf`"),
        (["plan", "demo", "-c", "1000000"], 2, "n_ctx 1000000 is beyond the 2048 tokens"),
        (["plan", "demo", "--ram", "6G"], 2, "6G"),
        (["plan", "demo", "--ram", "0"], 2, "--ram 0"),
        (["plan", "demo", "--ram", "9999GiB"], 2, "9999GiB"),
        (["plan", "demo", "--ram", "-1"], 2, "-1"),
        (["plan", "demo", "--ram", "40MiB"], 3, "does not fit"),
        (["plan", "demo", "--machine", "nonsense"], 4, "nonsense"),
        (["plan", "demo", "--lora", "/no/lora.gguf"], 4, "lora.gguf"),
        (["run", "--plan", "/no/plan.json", "x"], 4, "plan.json"),
        (["run", "demo", "x " * 3000, "--raw"], 2, "n_ctx is 2048"),
    ],
)
def test_what_cannot_be_done_is_one_clear_error(
    run: Run, words: list[str], code: int, message: str
) -> None:
    found, out, err = run(*words, *FAKE)
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert found == code
    assert message in line
    assert out == ""
    assert "Traceback" not in err


def test_a_damaged_file_is_named(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "page.gguf"
    file.write_text("<!DOCTYPE html><html></html>")
    code, out, err = run("plan", str(file), "--json")
    assert code == 65
    assert "HTML" in err
    assert json.loads(out)["error"]["code"] == "not_gguf"


def test_chat_answers_every_piped_line_and_ends(run: Run) -> None:
    lines = "hello\n/set max_tokens 4\nhello\n/drop 1\n/stats\n/nonsense\n"
    words = ("chat", "demo", "-n", "7", "--temp", "0", *FAKE)
    code, out, err = run(*words, stdin=lines)
    assert code == 0
    assert out.splitlines()[:2] == ["This is", "This"]
    assert "forgot 2 messages" in err
    assert "`/nonsense` is not a command" in err


def test_chat_opens_the_model_again_with_more_room(run: Run) -> None:
    lines = f"{'x' * 600}\n/set ctx 2048\n{'x' * 600}\n/mem\n/set ctx 99999\nstill here\n"
    code, out, err = run("chat", "demo", "-c", "512", "-n", "4", "--temp", "0", *FAKE, stdin=lines)
    assert code == 0
    assert "n_ctx is 512; nothing was sent or dropped" in err
    assert "n_ctx is 2048; the conversation goes on" in err
    assert "n_ctx 99999 is beyond" in err
    assert out.count("This\n") == 2
    assert "measured" in out


def test_a_closed_pipe_ends_quietly() -> None:
    loadmaster = [sys.executable, "-m", "loadmaster"]
    words = [*loadmaster, "run", "demo", "x", "-n", "400", "-q", *FAKE]
    with subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read().decode() == ""
    assert process.returncode == 0


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, *words: str, home: Path) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "loadmaster", *words],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={
                **os.environ,
                "TERM": "xterm",
                "PROMPT_TOOLKIT_NO_CPR": "1",
                "LOADMASTER_HOME": str(home),
            },
        )
        os.close(slave)
        self.seen = ""
        self._matched = 0

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, text: str, timeout_s: float = PATIENCE_S) -> None:
        """Read on from the last match until `text` has come."""
        deadline = time.monotonic() + timeout_s
        while text not in self.seen[self._matched :]:
            ready, _, _ = select.select([self._master], [], [], deadline - time.monotonic())
            assert ready, f"no {text!r} in {self.seen!r}"
            self.seen += os.read(self._master, 65536).decode(errors="replace")
        self._matched = self.seen.index(text, self._matched) + len(text)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


def test_the_chat_on_a_terminal(tmp_path: Path) -> None:
    with Terminal("chat", "demo", "--temp", "0", "-n", "4", *FAKE, home=tmp_path) as terminal:
        terminal.wait_for(">>>")
        terminal.type("hello\r")
        terminal.wait_for("This")
        terminal.wait_for(">>>")
        terminal.type("\x04")
        assert terminal.process.wait(PATIENCE_S) == 0
    [history] = tmp_path.rglob("chat_history")
    assert "hello" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


def _heed_ctrl_c() -> None:
    """A shell starts background jobs with SIGINT ignored, and a test runner may be one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_before_the_answer_ends_the_run_with_130(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "loadmaster", "run", "demo", *FAKE],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=_heed_ctrl_c,
    )
    with process:
        assert process.stdin
        assert process.stderr
        while not _reads_stdin(process.pid):
            os.sched_yield()
        process.send_signal(signal.SIGINT)
        process.wait(PATIENCE_S)
        assert b"Traceback" not in process.stderr.read()
    assert process.returncode == 130


def _reads_stdin(pid: int) -> bool:
    """Whether the process is in read(2) of descriptor 0."""
    try:
        call = Path(f"/proc/{pid}/syscall").read_text().split()
    except OSError:
        return True
    return call[:2] == ["0", "0x0"]
