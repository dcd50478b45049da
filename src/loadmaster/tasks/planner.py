"""One model on one machine, planned as often as needed, under fewer bytes each time."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from loadmaster.engine import builds
from loadmaster.engine.meter import process_memory
from loadmaster.engine.python_build import TRANSFORMERS, find_python_build
from loadmaster.engine.sizing import Sizer
from loadmaster.engine.types import EngineBuild, VirtualDevice
from loadmaster.errors import EngineMissingError, UsageError
from loadmaster.machine.detect import detect_machine
from loadmaster.machine.profiles import load_profile
from loadmaster.machine.target import for_target
from loadmaster.machine.types import Machine
from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.plan.batch import JobOutline
from loadmaster.plan.budget import make_budget
from loadmaster.plan.job_planning import JobPlan
from loadmaster.plan.types import Budget, DoesNotFit, Plan, Quantize, Workload
from loadmaster.tasks import calibration, checkpoints, vectors
from loadmaster.tasks.drafting import plan_with_draft
from loadmaster.tasks.locating import Located, locate_header, locate_model
from loadmaster.tasks.measured import with_measurements
from loadmaster.tasks.planning import (
    PlanOptions,
    PlanRequest,
    Sizes,
    plan_job,
    plan_model,
    read_adapter,
)
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
        self._elsewhere = header_only  # a command that takes `--machine` too
        find = locate_header if header_only else locate_model
        if located is None:
            located = find(model, options.knobs.quantize)
        spec = located.model
        self._notes = located.notes
        self._undriven: str | None = None
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
            budget=self._budget(machine),
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
        machine = machine_beside(process_memory().own_bytes)
        if self.build is None:
            return for_target(machine, "cuda") if self._is_checkpoint else machine
        if self._is_checkpoint:
            self._undriven = checkpoints.undriven(machine, self.build)
            if self._undriven is not None and self.options.vram is None:
                self._notes = (*self._notes, self._undriven)
        return with_measurements(for_target(machine, self.build.target), self.build.id)

    def _budget(self, machine: Machine) -> Budget:
        try:
            return make_budget(machine, self.options.vram, self.options.ram)
        except UsageError as error:
            if self._undriven is None or machine.gpus:
                raise
            raise UsageError(error.message, hint=self._undriven) from None

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
        return self._refused(outcome, request)

    def _refused(self, outcome: DoesNotFit, request: PlanRequest) -> DoesNotFit:
        if self._is_checkpoint and self._elsewhere:
            return checkpoints.with_machine(outcome, request)
        return outcome

    def _noted(self, plan: Plan, request: PlanRequest) -> Plan:
        """The plan with what is to be said of the model's files, and of a server beside it."""
        plan = checkpoints.with_server(plan, request, self.name)
        return replace(plan, notes=(*self._notes, *plan.notes))

    def of_its_kind(self) -> "Planner":
        """From now on plans are for vectors, where the model makes nothing else; returns itself."""
        self.request = vectors.of_its_kind(self.request)
        return self

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
        return self._refused(outcome, self.request)

    def _sized(self, request: PlanRequest) -> Plan | DoesNotFit:
        if self._is_checkpoint:
            return self._made(request, None)
        return self._with_sizer(self._made, request)

    def _made(self, request: PlanRequest, sizer: Sizes | None) -> Plan | DoesNotFit:
        if self._draft is None or request.knobs.pooling is not None:  # vectors need no drafts
            return plan_model(request, sizer)
        outcome = plan_with_draft(request, self._draft, sizer)
        if not isinstance(outcome, Plan) or outcome.draft is None:
            return outcome
        draft = replace(outcome.draft, reference=self.options.draft or "")
        return replace(outcome, draft=draft)

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


def machine_beside(ours_bytes: Bytes) -> Machine:
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
