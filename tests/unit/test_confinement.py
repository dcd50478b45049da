"""What `doctor` lists of confinements, and what `serve --strict` makes of it."""

import pytest
from click.testing import CliRunner

from loadmaster.errors import EngineError, UsageError
from loadmaster.interfaces.cli import serve
from loadmaster.machine.types import Confinement
from loadmaster.tasks import confinement as task
from loadmaster.tasks.doctor import Answer
from loadmaster.tasks.serving import strict

ALL = tuple(Confinement(name=name, active=True, detail="yes") for name in task.OF_WORKERS)
NO_LANDLOCK = Confinement(name="no file writes", active=False, detail="the kernel has no Landlock")


def test_a_worker_with_all_of_it_passes() -> None:
    task.require_workers(ALL)


def test_what_is_not_in_force_is_named_with_its_reason() -> None:
    lacking = tuple(NO_LANDLOCK if each.name == NO_LANDLOCK.name else each for each in ALL)
    with pytest.raises(
        UsageError, match=r"1 of 7 .*no file writes: the kernel has no Landlock"
    ) as no:
        task.require_workers(lacking)
    assert no.value.code == "not_confined"
    assert "doctor" in str(no.value.hint)


def test_what_a_worker_does_not_tell_is_not_in_force() -> None:
    with pytest.raises(UsageError, match="memory cap: the worker tells nothing"):
        task.require_workers(ALL[:-1])


def test_the_template_child_is_confined_here() -> None:
    found = {each.name for each in task.with_helpers(ALL)}
    assert found >= {
        "templates: no network", "templates: no file writes", "templates: memory cap",
        "templates: no core dumps", "templates: no new privileges", "server: no core dumps",
    }  # fmt: skip


def test_strict_refuses_where_doctor_lists_something_that_is_not_in_force(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(strict, "ask_worker", lambda b, m: Answer(confinements=(*ALL, NO_LANDLOCK)))
    with pytest.raises(UsageError, match="no Landlock"):
        strict.require_confined("fake")


def test_strict_refuses_where_no_worker_can_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict, "ask_worker", lambda b, m: Answer(fault="no memory"))
    with pytest.raises(EngineError, match="no memory"):
        strict.require_confined("fake")


def test_the_command_does_not_listen_then(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(backend: str) -> None:
        asked.append(backend)
        task.require((NO_LANDLOCK,))

    monkeypatch.setattr(serve, "require_confined", refuse)
    words = ["demo", "--strict", "--port", "0", "--backend", "fake"]
    result = CliRunner().invoke(serve.command, words)
    assert asked == ["fake"]
    assert isinstance(result.exception, UsageError)
    assert "listening" not in result.output
