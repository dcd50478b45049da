"""From a plan to an open session with its template, the first time and again."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from loadmaster.engine import builds
from loadmaster.engine.meter import process_memory
from loadmaster.engine.process import Engine
from loadmaster.engine.python_build import TRANSFORMERS
from loadmaster.engine.types import EngineBuild, VirtualDevice
from loadmaster.errors import NotFoundError, UsageError
from loadmaster.model.stamp import check_unchanged
from loadmaster.plan.codec import plan_from_json
from loadmaster.plan.types import CPU, EngineSettings, Plan
from loadmaster.tasks import calibration
from loadmaster.tasks.chat import Chat
from loadmaster.tasks.locating import (
    check_has_weights,
    read_local,
)
from loadmaster.tasks.planner import (
    FAKE,
    LLAMACPP,
    Planner,
    machine_beside,
    require_engine,
    virtual_devices,
)
from loadmaster.tasks.planning import (
    PlanOptions,
    require_plan,
)
from loadmaster.tasks.progress import Progress
from loadmaster.tasks.proving import open_session
from loadmaster.tasks.session import Opening, Session
from loadmaster.tasks.template import ChatTemplate
from loadmaster.units import Bytes


class Opened:
    """An open session with its template, and the way to open its model again. Close it, or use it
    as a context manager."""

    def __init__(self, parts: "_Parts", session: Session) -> None:
        self._parts = parts
        self.session = session
        self.template = parts.template

    @property
    def backend(self) -> str:
        """`llamacpp`, `transformers` or `fake`."""
        return self._parts.backend

    @property
    def label(self) -> str:
        """What is to be said beside every figure of a backend that computes nothing."""
        return " (fake backend: no model was run)" if self.backend == FAKE else ""

    def notes(self, *, raw: bool) -> tuple[str, ...]:
        """What a person needs to know once, before the first answer."""
        notes = []
        if self.template.is_fallback and not raw:
            notes.append("note: the model brings no chat template, ChatML is used (`--raw`: none)")
        ours = self.backend == LLAMACPP  # torch is not built here
        command = builds.gpu_hint(self._parts.build) if ours else None
        if command:
            notes.append(f"note: this engine was built without GPU support; `{command}` mends it")
        return tuple(notes)

    def reopen(self, chat: Chat, n_ctx: int, progress: Progress) -> None:
        """Open the model again with another n_ctx; the conversation goes on.

        Raises:
            PlanRefusedError: it does not fit; the open session stays as it is.
            UsageError: the model takes fewer tokens, or the plan came from a file.
        """
        planner = self._parts.planner
        if planner is None:
            raise UsageError(
                "this plan came from a file, its n_ctx is fixed", hint="plan again with `--ctx`"
            )
        plan = require_plan(planner.at_n_ctx(n_ctx))
        self.session.close()
        chat.session = self.session = open_session(plan, self._parts.opening(), progress)

    def restart(self, progress: Progress) -> None:
        """Open the same plan again: the worker died, or the session was closed for a while.

        Raises:
            LoadmasterError: it cannot be opened any more.
        """
        self.session.close()
        self.session = open_session(self.session.plan, self._parts.opening(), progress)

    def close(self) -> None:
        """Stop the worker and the template's child."""
        self.session.close()
        self.template.close()

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """What a session of one model is made from, the first time and again."""

    backend: str
    build: EngineBuild
    devices: tuple[VirtualDevice, ...]  # of the fake backend; real ones are the engine's to find
    template: ChatTemplate
    planner: Planner | None  # None: the plan came from a file
    backend_options: Mapping[str, object] = field(default_factory=dict)

    def opening(self) -> Opening:
        return Opening(
            start_engine=self._start_engine,
            parent_bytes=self._parent_bytes,
            free_bytes=_free_beside(self._parent_bytes()),
            replan=self.planner.smaller if self.planner else None,
        )

    def _start_engine(self, plan: Plan) -> Engine:
        settings = plan.engine
        min_batch = None
        if isinstance(settings, EngineSettings):
            min_batch = settings.op_offload_min_batch
        return Engine.start(
            self.build,
            devices=self.devices,
            backend=self.backend,
            min_batch=min_batch,
            options=self.backend_options,
        )

    def _parent_bytes(self) -> Bytes:
        """This process and the template's child: the RAM cap covers them beside the worker."""
        child = self.template.pid
        helpers = process_memory(child).own_bytes if child else 0
        return Bytes(process_memory().own_bytes + helpers)


def _free_beside(ours_bytes: Bytes) -> Callable[[str], Bytes | None]:
    """What devices have free at this moment beside us, by id."""
    machine = machine_beside(ours_bytes)
    free = {gpu.id: gpu.free_bytes for gpu in machine.gpus}
    return {**free, CPU: machine.ram.free_bytes}.get


def open_model(name: str, options: PlanOptions, progress: Progress) -> Opened:
    """Plan a model, load it and prove the plan.

    Raises:
        PlanRefusedError: it does not fit.
        LoadmasterError: whatever else stands in the way, with its exit code.
    """
    planner = Planner(name, options)
    planner.require_build()
    return open_planned(planner, require_plan(planner.plan()), progress)


def open_planned(planner: Planner, plan: Plan, progress: Progress) -> Opened:
    """Load a plan of `planner` and prove it; where the machine disagrees, a smaller one of it.

    Raises:
        LoadmasterError: whatever stands in the way.
    """
    options = planner.options
    parts = _Parts(
        backend=planner.backend,
        backend_options=options.backend_options,
        build=planner.require_build(),
        devices=virtual_devices(planner.request.machine) if options.backend == FAKE else (),
        template=ChatTemplate(planner.request.model.chat_template),
        planner=planner,
    )
    return _open(plan, parts, progress)


def open_plan_file(file: Path, options: PlanOptions, progress: Progress) -> Opened:
    """Load exactly the plan in a file, and prove it; there is no second plan.

    Raises:
        UsageError: the file is no plan, or options contradict it.
        ModelChangedError: the model's files are not the planned ones.
    """
    plan = read_plan(file)
    if replace(options, backend="llamacpp") != PlanOptions():
        raise UsageError(
            f"`{file}` fixes the placement: options that change it do not go with `--plan`",
            hint="make another plan with `loadmaster plan MODEL … --json`",
        )
    if plan.engine.pooling is not None:
        raise UsageError(
            f"`{file}` is a plan for vectors, which writes no text",
            hint="`loadmaster serve MODEL` opens the model for `/v1/embeddings`",
        )
    paths = [Path(path) for path in plan.model_files]
    if not paths:
        raise NotFoundError(
            f"`{file}` is a plan for a shape: dimensions without weights",
            hint="plan a model that is here: `loadmaster plan MODEL --json`",
        )
    check_has_weights(paths[0])
    backend = options.backend
    if backend == LLAMACPP and not isinstance(plan.engine, EngineSettings):
        backend = TRANSFORMERS
    check_unchanged(paths, plan.model_stamp)
    parts = _Parts(
        backend=backend,
        build=require_engine(backend),
        devices=(),
        template=ChatTemplate(read_local(paths[0]).chat_template),
        planner=None,
    )
    return _open(plan, parts, progress)


def _open(plan: Plan, parts: _Parts, progress: Progress) -> Opened:
    try:
        session = open_session(plan, parts.opening(), progress)
        # A second model's own memory is no overhead of this machine, nor are torch's activations:
        # its plans have lines for those beside the context.
        if parts.planner is not None and parts.backend == LLAMACPP and plan.draft is None:
            gpus = parts.planner.request.machine.gpus
            calibration.record(parts.build.id, gpus, session.memory())
        return Opened(parts, session)
    except BaseException:
        parts.template.close()
        raise


def read_plan(file: Path) -> Plan:
    """The plan in a file of `plan --json`.

    Raises:
        NotFoundError: there is no such file.
        UsageError: it is no plan.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise NotFoundError(f"cannot read the plan `{file}`: {error.strerror}") from None
    try:
        return plan_from_json(json.loads(text))
    except ValueError as error:
        raise UsageError(
            f"`{file}` is not a plan: {error}", hint="write one with `loadmaster plan MODEL --json`"
        ) from None
