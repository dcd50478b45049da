"""The front door: lazy commands, one error format, one exit code for each kind of end."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import click
import pytest

from loadmaster.errors import DamagedFileError, LoadmasterError, NotFoundError, UsageError
from loadmaster.interfaces.cli import main
from loadmaster.interfaces.cli.failure import describe
from loadmaster.plan.types import Shortfall
from loadmaster.tasks.planning import PlanRefusedError, require_plan
from loadmaster.units import GIB, Bytes
from tests import cli_parts as parts


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Puts a body in the place of every command."""

    def place(body: Callable[[], object]) -> None:
        @click.command()
        @click.option("--json", "as_json", is_flag=True)
        @click.option("--debug", is_flag=True)
        def stand_in(as_json: bool, debug: bool) -> None:
            body()

        monkeypatch.setattr(
            main.LazyGroup,
            "get_command",
            lambda _self, _ctx, name: stand_in if name == "x" else None,
        )

    return place


def raiser(error: BaseException) -> Callable[[], object]:
    def body() -> None:
        raise error

    return body


Place = Callable[[Callable[[], object]], None]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (LoadmasterError("a"), 1),
        (UsageError("a"), 2),
        (PlanRefusedError("a", outcome=parts.refusal(), hint=None), 3),
        (NotFoundError("a"), 4),
        (DamagedFileError("a", code="not_gguf"), 65),
        (KeyboardInterrupt(), 130),
        (FileNotFoundError(2, "No such file", "x"), 4),
        (RuntimeError("a"), 1),
    ],
)
def test_every_error_has_its_exit_code(
    command: Place, error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    command(raiser(error))
    assert main.run(["x"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err


def test_message_blank_line_hint(command: Place, capsys: pytest.CaptureFixture[str]) -> None:
    command(raiser(NotFoundError("`a.gguf` is not there", hint="`ls`")))
    main.run(["x"])
    assert capsys.readouterr().err == "error: `a.gguf` is not there\n\nhint: `ls`\n"


def test_json_errors_go_to_stdout(command: Place, capsys: pytest.CaptureFixture[str]) -> None:
    command(raiser(UsageError("no", hint="yes", numbers={"n": 1})))
    assert main.run(["x", "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error == {
        "message": "no", "code": "invalid_request", "hint": "yes", "numbers": {"n": 1},
    }  # fmt: skip


def test_a_refused_plan_shows_its_ledger(
    command: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    command(lambda: require_plan(parts.refusal()))
    assert main.run(["x", "--json"]) == 3
    captured = capsys.readouterr()
    assert "`toy` does not fit at n_ctx 512: needs 140.00 MiB of the VRAM of gpu:0" in captured.err
    assert "short by 40.00 MiB on gpu:0" in captured.err
    assert captured.err.endswith("\n\nhint: `--kv q8_0` would fit\n")
    value = json.loads(captured.out)
    assert value["fits"] is False
    assert value["error"]["code"] == "insufficient_memory"
    assert value["error"]["numbers"] == {"shortfall_bytes.gpu:0": 40 << 20}


def test_both_numbers_are_shown_where_they_differ_by_a_byte() -> None:
    short = Shortfall(device="cpu", budget_bytes=Bytes(7 << 30), need_bytes=Bytes((7 << 30) + 1))
    with pytest.raises(PlanRefusedError) as caught:
        require_plan(replace(parts.refusal(), shortfalls=(short,)))
    said = "needs 7,516,192,769 bytes of the RAM, the budget is 7,516,192,768"
    assert caught.value.message.endswith(said)


def test_many_devices_that_are_short_are_one_line() -> None:
    shortfalls = tuple(
        Shortfall(device=f"gpu:{n}", budget_bytes=Bytes(GIB), need_bytes=Bytes((2 + n % 3) * GIB))
        for n in range(8)
    )
    with pytest.raises(PlanRefusedError) as caught:
        require_plan(replace(parts.refusal(), shortfalls=shortfalls))
    worst = "needs 4.00 GiB of the VRAM of gpu:2, the budget is 1.00 GiB"
    assert caught.value.message.endswith(f"{worst}, and 7 more devices have too little")
    assert len(caught.value.numbers) == 8


def test_debug_shows_the_traceback(command: Place, capsys: pytest.CaptureFixture[str]) -> None:
    command(raiser(RuntimeError("our fault")))
    assert main.run(["x", "--debug"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "error: unexpected RuntimeError: our fault" in error


def test_a_reader_that_left_is_no_error(command: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "_silence_stdout", lambda: None)
    command(raiser(BrokenPipeError()))
    assert main.run(["x"]) == 0


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["plna"], "`plna`", "`plan`"),
        (["plan"], "argument", "--help"),
        (["plan", "--vrma", "1GiB"], "--vrma", "--vram"),
        (["plan", "--cpu-share", "1"], "no such option '--cpu-share'", "--cpu-moe"),
        (["run", "demo", "-c", "x"], "x", "--help"),
    ],
)
def test_usage_errors_have_the_same_form(
    words: list[str], message: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(words) == 2
    first, blank, last = capsys.readouterr().err.splitlines()
    assert first.startswith("error: ")
    assert message.strip("`") in first
    assert first.count("(") == first.count(")")
    assert blank == ""
    assert last.startswith("hint: ")
    assert hint.strip("`") in last


def test_unknown_errors_name_their_kind() -> None:
    failure = describe(ValueError("x"))
    assert failure.code == "internal"
    assert failure.hint is not None
    assert "--debug" in failure.hint


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["run", "-h"], ["chat", "--help"]])
def test_help_and_version(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(words) == 0
    assert "loadmaster" in capsys.readouterr().out


def test_the_front_door_imports_nothing_heavy() -> None:
    code = (
        "import sys, loadmaster.interfaces.cli.main; "
        "heavy = {'numpy','torch','transformers','llama_cpp','rich','prompt_toolkit','jinja2'}; "
        "found = sorted(heavy & sys.modules.keys()); "
        "ours = sorted(m for m in sys.modules if m.startswith('loadmaster.')); "
        "print(found, len(ours))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found, n_ours = done.stdout.rsplit(" ", 1)
    assert found == "[]"
    assert int(n_ours) < 12
