"""`serve --strict`: no server where a confinement is not in force."""

from loadmaster.engine import builds
from loadmaster.errors import EngineError
from loadmaster.machine.detect import detect_machine
from loadmaster.machine.types import Confinement
from loadmaster.tasks.confinement import require, require_workers, with_helpers
from loadmaster.tasks.doctor import NO_BUILD, ask_worker


def require_confined(backend: str) -> tuple[Confinement, ...]:
    """Ask a worker of the engine in use, and hold it, its helpers and this process to everything.

    Raises:
        UsageError: a confinement is not in force; it names each, and why.
        EngineError: no worker came up that could be asked.
    """
    build = NO_BUILD if backend == "fake" else builds.find_build()
    answer = ask_worker(build, detect_machine())
    if answer.fault is not None and not answer.confinements:
        raise EngineError(f"`--strict`: no worker could be asked: {answer.fault}")
    require_workers(answer.confinements)
    found = with_helpers(answer.confinements)
    require(found)
    return found
