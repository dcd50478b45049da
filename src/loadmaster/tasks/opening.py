"""From what a user typed to a plan, and from a plan to an open session with its template."""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from loadmaster.engine import builds
from loadmaster.engine.meter import process_memory
from loadmaster.engine.process import Engine
from loadmaster.engine.python_build import TRANSFORMERS, find_python_build
from loadmaster.engine.sizing import Sizer
from loadmaster.engine.types import EngineBuild, VirtualDevice
from loadmaster.errors import EngineMissingError, NotFoundError, UsageError
from loadmaster.machine.detect import detect_machine
from loadmaster.machine.profiles import load_profile
from loadmaster.machine.target import for_target
from loadmaster.machine.types import Machine
from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.model.stamp import check_unchanged
from loadmaster.plan.batch import JobOutline
from loadmaster.plan.budget import make_budget
from loadmaster.plan.codec import plan_from_json
from loadmaster.plan.job_planning import JobPlan
from loadmaster.plan.types import CPU, DoesNotFit, EngineSettings, Plan, Quantize, Workload
from loadmaster.tasks import calibration, checkpoints
from loadmaster.tasks.chat import Chat
from loadmaster.tasks.drafting import plan_with_draft
from loadmaster.tasks.locating import (
    Located,
    check_has_weights,
    locate_header,
    locate_model,
    read_local,
)
from loadmaster.tasks.measured import with_measurements
from loadmaster.tasks.planning import (
    PlanOptions,
    PlanRequest,
    Sizes,
    plan_job,
    plan_model,
    read_adapter,
    require_plan,
)
from loadmaster.tasks.progress import Progress
from loadmaster.tasks.session import Opening, Session, open_session
from loadmaster.tasks.template import ChatTemplate
from loadmaster.units import Bytes

FAKE = "fake"
LLAMACPP = "llamacpp"
Made = TypeVar("Made")
# The fake backend needs no library; the worker is started as for any other.
_NO_BUILD = EngineBuild(id=FAKE, target="cpu", version="0", root=Path("/nonexistent"))


def find_engine(backend: str) -> EngineBuild | None:
    """The build in use; None when there is none."""
    if backend == FAKE:
        return _NO_BUILD
    with suppress(EngineMissingError):
        return require_engine(backend)
    return None


def require_engine(backend: str) -> EngineBuild:
    """The build in use.

    Raises:
        EngineMissingError: there is none, and what makes one.
    """
    if backend == FAKE:
        return _NO_BUILD
    return find_python_build() if backend == TRANSFORMERS else builds.find_build()


class Planner:
    """One model on one machine; plans it as often as needed, under fewer bytes each time."""

    def __init__(
        self,
        model: str,
        options: PlanOptions,
        *,
        header_only: bool = False,
        located: Located | None = None,
    ) -> None:
        """`header_only`: a model that is elsewhere will do; such a plan cannot be opened. `located`
        is its header, where it was read before."""
        self.options = options
        self.name = model
        find = locate_header if header_only else locate_model
        if located is None:
            located = find(model, options.knobs.quantize)
        spec = located.model
        self._notes = located.notes
        self._is_checkpoint = isinstance(spec, CheckpointSpec)
        llamacpp = options.backend == LLAMACPP
        self.backend = TRANSFORMERS if self._is_checkpoint and llamacpp else options.backend
        self.build = find_engine(self.backend)
        like: Quantize | None = "none" if self._is_checkpoint else None  # the same format
        self._draft = None if options.draft is None else find(options.draft, like).model
        machine = self._machine()
        quantize = located.quantize or options.knobs.quantize
        adapters = tuple(read_adapter(path, scale) for path, scale in options.adapters)
        self.request = PlanRequest(
            model=spec,
            machine=machine,
            workload=options.workload,
            budget=make_budget(machine, options.vram, options.ram),
            knobs=replace(options.knobs, adapters=adapters, quantize=quantize),
            overheads=calibration.calibrated_overheads(
                self.build_id,
                machine.gpus,
                line_editor=options.line_editor,
                server=options.server,
                schemas=options.schemas,
            ),
        )

    @property
    def build_id(self) -> str:
        return self.build.id if self.build else "no build"

    def require_build(self) -> EngineBuild:
        """The engine's build; EngineMissingError says why there is none."""
        return self.build or require_engine(self.backend)

    def _machine(self) -> Machine:
        if self.options.machine is not None:
            return load_profile(self.options.machine)
        machine = _machine_beside(process_memory().own_bytes)
        if self.build is None:
            return for_target(machine, "cuda") if self._is_checkpoint else machine
        return with_measurements(for_target(machine, self.build.target), self.build.id)

    def plan(self) -> Plan | DoesNotFit:
        """The fastest placement inside the budget, or the closest miss."""
        return self._plan(self.request)

    def smaller(self, caps: dict[str, Bytes], reason: str) -> Plan | DoesNotFit:
        """A plan under smaller caps: the machine disagreed with the last one."""
        return self._plan(self.request.with_caps(caps, reason))

    def at_n_ctx(self, n_ctx: int) -> Plan | DoesNotFit:
        """A plan for another n_ctx; if it fits, later plans are for this n_ctx too."""
        request = replace(self.request, workload=Workload(n_ctx=n_ctx))
        outcome = self._plan(request)
        if isinstance(outcome, Plan):
            self.request = request
        return outcome

    def _plan(self, request: PlanRequest) -> Plan | DoesNotFit:
        outcome = self._sized(request)
        if isinstance(outcome, Plan):
            return self._noted(outcome, request)
        return checkpoints.with_machine(outcome, request) if self._is_checkpoint else outcome

    def _noted(self, plan: Plan, request: PlanRequest) -> Plan:
        """The plan with what is to be said of the model's files, and of a server beside it."""
        plan = checkpoints.with_server(plan, request, self.name)
        return replace(plan, notes=(*self._notes, *plan.notes))

    def for_job(self, job: JobOutline) -> "Planner":
        """From now on plans are for this job; returns itself.

        Raises:
            UsageError: a draft model is asked for.
        """
        if self._draft is not None:
            raise UsageError(
                "the many sequences of a job leave a draft model nothing to do",
                hint="`--draft lookup` helps the last few of them; or leave `--draft` out",
            )
        workload = replace(self.request.workload, kind="batch")
        self.request = replace(self.request, workload=workload, job=job)
        return self

    def job_plan(self) -> JobPlan | DoesNotFit:
        """The plan for the request's job, with what the job comes to."""
        if not self._is_checkpoint:
            return self._with_sizer(plan_job, self.request)
        outcome = plan_job(self.request, None)
        if isinstance(outcome, JobPlan):
            return replace(outcome, plan=self._noted(outcome.plan, self.request))
        return checkpoints.with_machine(outcome, self.request)

    def _sized(self, request: PlanRequest) -> Plan | DoesNotFit:
        if self._is_checkpoint:
            return self._made(request, None)
        return self._with_sizer(self._made, request)

    def _made(self, request: PlanRequest, sizer: Sizes | None) -> Plan | DoesNotFit:
        if self._draft is None or request.knobs.pooling is not None:  # vectors need no drafts
            return plan_model(request, sizer)
        return plan_with_draft(request, self._draft, sizer)

    def _with_sizer(
        self, make: Callable[[PlanRequest, Sizes | None], Made], request: PlanRequest
    ) -> Made:
        if self.build is None:
            return make(request, None)
        devices = virtual_devices(request.machine)
        with Sizer(self.build, devices, backend=self.options.backend) as sizer:
            return make(request, sizer)


def virtual_devices(machine: Machine) -> tuple[VirtualDevice, ...]:
    """The machine's GPUs as the engine imitates them."""
    return tuple(
        VirtualDevice(id=gpu.id, total_bytes=gpu.total_bytes, rules=gpu.rules)
        for gpu in machine.gpus
    )


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


def _machine_beside(ours_bytes: Bytes) -> Machine:
    """This machine as it is without us: the RAM cap is for the process total, ours included."""
    machine = detect_machine()
    ram = machine.ram
    available = min(ram.total_bytes, ram.available_bytes + ours_bytes)
    used = None if ram.cgroup_used_bytes is None else max(0, ram.cgroup_used_bytes - ours_bytes)
    beside = replace(
        ram,
        available_bytes=Bytes(available),
        cgroup_used_bytes=None if used is None else Bytes(used),
    )
    return replace(machine, ram=beside)


def _free_beside(ours_bytes: Bytes) -> Callable[[str], Bytes | None]:
    """What devices have free at this moment beside us, by id."""
    machine = _machine_beside(ours_bytes)
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
    paths = [Path(path) for path in plan.model_files]
    backend = options.backend
    if isinstance(plan.engine, EngineSettings):
        check_has_weights(paths[0])
    elif backend == LLAMACPP:
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
        # A second model's own memory is no overhead of this machine.
        if parts.planner is not None and parts.backend != FAKE and plan.draft is None:
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
