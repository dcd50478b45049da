"""Every confinement of every process of a server: which are in force here, and what to do if not.

The worker's are asked of a worker, those of the template's child of such a child. Both were applied
by the process to itself, so what is told here is what the kernel granted.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import loadmaster
from loadmaster.engine.confine import confine_server
from loadmaster.errors import UsageError
from loadmaster.machine.types import Confinement
from loadmaster.schema import from_json

_PROBE_TIMEOUT_S = 20.0
TEMPLATES, SERVER = "templates", "server"
# What a worker must have told of itself; one that told less is not confined by what is missing.
OF_WORKERS = (
    "dies with its parent",
    "no core dumps",
    "first to be killed when memory runs out",
    "no new privileges",
    "no network",
    "no file writes",
    "memory cap",
)


def with_helpers(of_worker: Sequence[Confinement]) -> tuple[Confinement, ...]:
    """The worker's, then those of the template's child and of the server, named by whose they are.

    Confines the process that calls it as a server is confined: it will not dump its memory.
    """
    return (
        *of_worker,
        *(_named(TEMPLATES, each) for each in probe_renderer()),
        *(_named(SERVER, each) for each in confine_server()),
    )


def probe_renderer() -> tuple[Confinement, ...]:
    """What the child that renders chat templates is granted; asked of one."""
    command = [sys.executable, "-P", "-m", "loadmaster.tasks.template_worker", "--confinements"]
    environment = {"PYTHONPATH": str(Path(loadmaster.__file__).parents[1])}
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=_PROBE_TIMEOUT_S, check=True, env=environment
        )
        granted: tuple[Confinement, ...] = from_json(
            tuple[Confinement, ...], json.loads(done.stdout)
        )
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return (Confinement(name="its process", active=False, detail=type(error).__name__),)
    return granted


def require_workers(of_worker: Sequence[Confinement]) -> None:
    """Hold a worker to all that it can be confined by.

    Raises:
        UsageError: not all of it is in force.
    """
    told = {each.name for each in of_worker}
    untold = [
        Confinement(name=name, active=False, detail="the worker tells nothing of it")
        for name in OF_WORKERS
        if name not in told
    ]
    require((*of_worker, *untold))


def require(found: Sequence[Confinement]) -> None:
    """Hold to a list of confinements.

    Raises:
        UsageError: not all of them are in force; it names each, and why.
    """
    lacking = [each for each in found if not each.active]
    if not lacking:
        return
    reasons = "; ".join(f"{each.name}: {each.detail}" for each in lacking)
    refusal = UsageError(
        f"`--strict`: {len(lacking)} of {len(found)} confinements are not in force: {reasons}",
        hint="`loadmaster doctor` lists all of them; without `--strict` the server starts anyway",
        numbers={"n_confinements": len(found), "n_lacking": len(lacking)},
    )
    refusal.code, refusal.http_status = "not_confined", 503
    raise refusal


def _named(whose: str, confinement: Confinement) -> Confinement:
    return replace(confinement, name=f"{whose}: {confinement.name}")
