"""What `doctor` finds out: the machine, the engines and their devices, and what limits them."""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import loadmaster
from loadmaster.engine import builds, toolchain
from loadmaster.engine.process import Engine
from loadmaster.engine.python_build import find_python_build
from loadmaster.engine.types import DeviceFacts, EngineBuild
from loadmaster.errors import EngineMissingError, LoadmasterError
from loadmaster.machine import nvidia
from loadmaster.machine.detect import detect_machine
from loadmaster.machine.host import Host, this_host
from loadmaster.machine.measurements import Measurements
from loadmaster.machine.target import for_target
from loadmaster.machine.types import Confinement, Machine
from loadmaster.plan.hf_attention import kernels_text
from loadmaster.schema import to_json
from loadmaster.settings import HOME, data_folder
from loadmaster.tasks.advice import Advice, Obstacles, advise
from loadmaster.tasks.confinement import with_helpers
from loadmaster.tasks.measured import keep, with_measurements
from loadmaster.tasks.measuring.machine import measure_machine
from loadmaster.tasks.measuring.torch_machine import measure_torch

SCHEMA_VERSION = 1
# Without an engine, a worker of the fake backend shows which confinements are granted.
NO_BUILD = EngineBuild(id="none", target="cpu", version="", root=Path(os.devnull))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineState:
    """An installed engine, as it answered when it was started."""

    id: str
    target: str
    version: str
    root: str
    in_use: bool
    devices: tuple[DeviceFacts, ...] | None  # None: it could not be asked
    fault: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PythonEngine:
    """The engine of safetensors models, as its packages are installed; none of them is started."""

    id: str
    target: str
    version: str
    attention: str  # which kernels torch has for it on this machine
    measured: Measurements | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Everything `doctor` prints."""

    loadmaster_version: str
    machine: Machine
    engines: tuple[EngineState, ...]
    advice: tuple[Advice, ...]
    safetensors: PythonEngine | None = None  # None: its packages are not installed


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a worker said: its devices, and the protections it runs under."""

    devices: tuple[DeviceFacts, ...] | None = None
    confinements: tuple[Confinement, ...] = ()
    fault: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """The engines on disk; `fault` says why they could not be listed."""

    builds: tuple[EngineBuild, ...] = ()
    used_id: str | None = None
    fault: str | None = None
    python: EngineBuild | None = None  # of safetensors models


def examine(
    host: Host | None = None,
    installed: Installed | None = None,
    ask: Callable[[EngineBuild, Machine], Answer] | None = None,
    helpers: Callable[[Sequence[Confinement]], tuple[Confinement, ...]] = with_helpers,
) -> Diagnosis:
    """Look at everything. Nothing found is an error: what is wrong becomes advice."""
    host = host or this_host()
    installed = installed or find_installed()
    ask = ask or ask_worker
    machine = detect_machine(host)
    if installed.used_id is not None:
        machine = with_measurements(machine, installed.used_id)
    answers = [(build, ask(build, machine)) for build in installed.builds]
    confinements = next((a.confinements for _, a in answers if a.confinements), None)
    if confinements is None:
        confinements = ask(NO_BUILD, machine).confinements
    machine = replace(machine, confinements=confinements and helpers(confinements))
    engines = tuple(_state(build, answer, installed) for build, answer in answers)
    return Diagnosis(
        loadmaster_version=loadmaster.__version__,
        machine=machine,
        engines=engines,
        advice=advise(
            machine,
            obstacles(host, machine, installed.fault),
            {engine.id: (engine.target, engine.in_use, engine.devices) for engine in engines},
            toolchain.mend_command,
        ),
        safetensors=_python_engine(installed.python, machine) if installed.python else None,
    )


def _python_engine(build: EngineBuild, machine: Machine) -> PythonEngine:
    gpus = for_target(machine, build.target).gpus
    return PythonEngine(
        id=build.id,
        target=build.target,
        version=build.version,
        attention=f"SDPA: {kernels_text(gpus)}",
        measured=with_measurements(replace(machine, measured=None), build.id).measured,
    )


def measure(report: Callable[[str], None]) -> None:
    """Time this machine with the engine in use, and with that of safetensors where its packages
    are; keep the figures for every later plan.

    Raises:
        EngineMissingError: neither is there.
        LoadmasterError: the figures cannot be kept.
    """
    python = _python_build()
    if python is None or builds.list_builds():
        _keep_measured(builds.find_build(), measure_machine, report)
    if python is not None:
        measure_python(report)


def measure_python(report: Callable[[str], None]) -> None:
    """The part of it that is for safetensors.

    Raises:
        EngineMissingError: its packages are not installed.
        LoadmasterError: the figures cannot be kept.
    """
    _keep_measured(find_python_build(), measure_torch, report)


def _keep_measured(
    build: EngineBuild, timer: Callable[..., Measurements], report: Callable[[str], None]
) -> None:
    machine = for_target(detect_machine(), build.target)
    measured = timer(build, machine, data_folder(), report=report)
    try:
        keep(machine, build.id, measured)
    except OSError as error:
        raise LoadmasterError(
            f"the measurements cannot be kept in `{data_folder()}`: {error.strerror}",
            hint=f"make room there, or set {HOME.name} to another folder",
        ) from None


def diagnosis_json(diagnosis: Diagnosis) -> dict[str, object]:
    """The one object of `doctor --json`."""
    return {
        "schema_version": SCHEMA_VERSION,
        "loadmaster_version": diagnosis.loadmaster_version,
        "machine": to_json(diagnosis.machine),
        "engines": to_json(diagnosis.engines),
        "safetensors": to_json(diagnosis.safetensors),
        "advice": to_json(diagnosis.advice),
    }


def obstacles(host: Host, machine: Machine, fault: str | None = None) -> Obstacles:
    """What stands between this user and a GPU."""
    files = ("/dev/nvidiactl", "/dev/kfd", *host.glob("/dev/dri/renderD*"))
    nvidia_seen = any(gpu.vendor == "nvidia" for gpu in machine.gpus)
    return Obstacles(
        closed_files=tuple(f for f in files if host.exists(f) and not host.can_open(f)),
        silent_nvidia=() if nvidia_seen else tuple(nvidia.pci_cards(host)),
        engines_fault=fault,
    )


def ask_worker(build: EngineBuild, machine: Machine) -> Answer:
    """Start a worker with this build and ask it; a build that does not start says why."""
    backend = "fake" if build is NO_BUILD else "llamacpp"
    try:
        with Engine.start(build, backend=backend, ram_cap_bytes=machine.ram.total_bytes) as engine:
            confinements = engine.confinements
            try:
                return Answer(devices=engine.devices(), confinements=confinements)
            except LoadmasterError as error:
                return Answer(fault=error.message, confinements=confinements)
    except LoadmasterError as error:
        return Answer(fault=error.message)


def find_installed() -> Installed:
    """The engines in the user's folder, and the one that `run` would use."""
    python = _python_build()
    try:
        found = builds.list_builds()
    except LoadmasterError as error:
        return Installed(fault=error.message, python=python)
    try:
        return Installed(builds=found, used_id=builds.find_build().id, python=python)
    except LoadmasterError:
        return Installed(builds=found, python=python)


def _python_build() -> EngineBuild | None:
    with suppress(EngineMissingError):
        return find_python_build()
    return None


def _state(build: EngineBuild, answer: Answer, installed: Installed) -> EngineState:
    return EngineState(
        id=build.id,
        target=build.target,
        version=build.version,
        root=str(build.root),
        in_use=build.id == installed.used_id,
        devices=answer.devices,
        fault=answer.fault,
    )
