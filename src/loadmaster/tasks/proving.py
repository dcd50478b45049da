"""From a plan to an open session: loaded, and proved against the plan.

It ends in one of two ways: the engine's buffers equal the plan and the process totals are inside
the caps, or nothing is left running.
"""

from dataclasses import fields
from pathlib import Path

from loadmaster.engine.types import DraftLoad, LoadRequest
from loadmaster.errors import EngineError, EngineRefusedError, OverBudgetError
from loadmaster.plan.types import CPU, DraftModel, MemoryItem, Plan
from loadmaster.tasks.measurement import excess_by_device
from loadmaster.tasks.progress import Progress
from loadmaster.tasks.session import Opening, Session, add_log
from loadmaster.units import MIB, Bytes, format_size

MAX_ATTEMPTS = 3
# What a plan gives up on every device when the engine refused an allocation and named no figure.
REFUSED_STEP_BYTES = Bytes(256 * MIB)


def open_session(plan: Plan, opening: Opening, progress: Progress) -> Session:
    """Load and prove `plan`; where the machine disagrees with it, take a smaller one.

    Raises:
        ModelChangedError: the file is another than the one planned.
        OverBudgetError, EngineRefusedError: no smaller plan was left to try.
        EngineError: the worker died.
    """
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            _check_free(plan, opening)
            return _load(plan, opening, progress)
        except (OverBudgetError, EngineRefusedError) as error:
            progress.finish()
            smaller = None if attempt == MAX_ATTEMPTS else _smaller(plan, opening, error)
            if smaller is None:
                raise
            progress.say(f"{error.message}; taking a smaller plan: {_difference(plan, smaller)}")
            plan = smaller
    raise AssertionError("unreachable")


def _load(plan: Plan, opening: Opening, progress: Progress) -> Session:
    engine = opening.start_engine(plan)
    try:
        files = tuple(map(Path, plan.model_files))
        loaded = engine.load(_request(plan, opening), progress.loading, files=files)
        engine.commit_peak()
        progress.finish()
        session = Session(plan=plan, engine=engine, loaded=loaded, opening=opening)
        _prove(session)
    except BaseException as error:
        progress.finish()
        add_log(error, engine)
        engine.close()
        raise
    return session


def _request(plan: Plan, opening: Opening) -> LoadRequest:
    host = plan.device(CPU)
    cap = host.budget_bytes - opening.parent_bytes()
    return LoadRequest(
        model_path=Path(plan.model_files[0]),
        model_stamp=plan.model_stamp,
        settings=plan.engine,
        ram_cap_bytes=Bytes(max(0, cap)),
        state_bytes=host.of("cache"),
        device_caps=allocator_caps(plan),
        draft=None if plan.draft is None else _draft_load(plan.draft),
    )


def _draft_load(draft: DraftModel) -> DraftLoad:
    files = tuple(map(Path, draft.model_files))
    return DraftLoad(
        model_path=files[0], model_stamp=draft.model_stamp, files=files, settings=draft.engine
    )


def allocator_caps(plan: Plan) -> dict[str, Bytes]:
    """Of each GPU, its cap less the driver's context: what is left is the engine's to allocate."""
    return {
        device.id: Bytes(
            max(0, device.budget_bytes - sum(i.bytes for i in device.items if _is_context(i)))
        )
        for device in plan.devices
        if device.id != CPU
    }


def _is_context(item: MemoryItem) -> bool:
    return item.kind == "overhead" and item.why.endswith(" context")


def _prove(session: Session) -> None:
    excess = excess_by_device(session.memory())
    if not excess:
        return
    amounts = " and ".join(
        f"{format_size(size)} above the plan on {device}" for device, size in excess.items()
    )
    raise OverBudgetError(
        f"measured memory is {amounts}",
        hint="give it more with `--vram` or `--ram`, or take less with a smaller `--ctx`",
        numbers={f"excess_bytes.{device}": size for device, size in excess.items()},
    )


def _check_free(plan: Plan, opening: Opening) -> None:
    for device in plan.devices:
        free = opening.free_bytes(device.id)
        if free is not None and free < device.needed_bytes:
            raise OverBudgetError(
                f"{device.id} has {format_size(free)} free, the plan takes "
                f"{format_size(device.needed_bytes)}",
                hint="close what uses it, or lower `--vram` or `--ram`",
                numbers={f"excess_bytes.{device.id}": device.needed_bytes - free},
            )


def _smaller(plan: Plan, opening: Opening, error: EngineError) -> Plan | None:
    """A plan under caps lowered by what was too much; None when there is none."""
    if opening.replan is None:
        return None
    caps: dict[str, Bytes] = {}
    for device in plan.devices:
        excess = error.numbers.get(f"excess_bytes.{device.id}")
        if isinstance(excess, int):
            # The room that was left does not help again: what was planned was already too much.
            caps[device.id] = Bytes(max(0, device.needed_bytes - excess))
        elif isinstance(error, EngineRefusedError) and device.id != CPU:
            caps[device.id] = Bytes(max(0, device.needed_bytes - REFUSED_STEP_BYTES))
    if not caps:
        return None
    outcome = opening.replan(caps, "less what the last load took above its plan")
    return outcome if isinstance(outcome, Plan) else None


def _difference(before: Plan, after: Plan) -> str:
    changed = []
    for name in (field.name for field in fields(before.engine)):
        old, new = getattr(before.engine, name), getattr(after.engine, name)
        if old != new and name == "overrides":
            changed.append(f"{len(old)} → {len(new)} tensor overrides")
        elif old != new:
            changed.append(f"{name} {old} → {new}")
    return ", ".join(changed) or "the same settings under smaller caps"
