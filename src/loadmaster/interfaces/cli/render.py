"""Plans and measurements as text. The printed table is the ledger: its totals are sums of its rows.

Plain aligned columns, legible without colour and when piped; every function returns a string.
"""

from collections.abc import Iterable, Sequence

from loadmaster.engine.types import DoneEvent
from loadmaster.interfaces.cli import render_hf
from loadmaster.interfaces.cli.render_hf import cells_flags
from loadmaster.plan.types import (
    Alternative,
    DevicePlan,
    DoesNotFit,
    EngineSettings,
    Plan,
    Prediction,
    TransformersSettings,
    Workload,
)
from loadmaster.tasks.measurement import MemoryRow
from loadmaster.units import format_size

_INDENT = "  "
_GAP = "  "


def table(rows: Sequence[Sequence[str]], *, right: Iterable[int] = ()) -> str:
    """Align columns; the columns in `right` are numbers. Rows may be shorter than the widest."""
    right = set(right)
    n_columns = max((len(row) for row in rows), default=0)
    padded = [[*row, *[""] * (n_columns - len(row))] for row in rows]
    widths = [max(len(row[column]) for row in padded) for column in range(n_columns)]
    lines = []
    for row in padded:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((_INDENT + _GAP.join(cells)).rstrip())
    return "\n".join(lines)


def plan_text(plan: Plan) -> str:
    """Everything `plan` prints: the ledger, the settings, the speed and the neighbours."""
    blocks = [
        headline(plan),
        ledger(plan.devices),
        settings_text(plan),
        prediction_text(plan.predicted),
        stages_text(plan),
        notes_text(plan.notes),
        alternatives_text(plan.alternatives),
    ]
    return "\n\n".join(block for block in blocks if block)


def headline(plan: Plan) -> str:
    """The model, and the one sentence that answers whether it fits."""
    return (
        f"{plan.model_name}: {plan.architecture}, {plan.n_layer} layers, {plan.quantization}, "
        f"{format_size(plan.file_bytes)} on disk\n"
        f"fits on {plan.machine_name}: n_ctx {plan.engine.n_ctx}, {layers_text(plan)}"
    )


def layers_text(plan: Plan) -> str:
    """Where the layers are, in words."""
    if isinstance(plan.engine, TransformersSettings):
        return render_hf.layers_text(plan.engine, plan.n_layer)
    gpus = [device.id for device in plan.devices if device.id != "cpu"]
    total = plan.n_layer + 1  # llama.cpp counts the output layer as one
    on_gpu = plan.engine.n_gpu_layers
    if not on_gpu:
        return "all layers on cpu"
    shares = [
        f"{count} of {total} layers on {gpu}"
        for gpu, count in zip(gpus, plan.engine.layers_per_device, strict=False)
        if count
    ] or [f"{on_gpu} of {total} layers on GPU"]
    parts = f", {len(plan.engine.overrides)} tensor overrides" if plan.engine.overrides else ""
    return ", ".join(shares) + parts


def ledger(devices: Sequence[DevicePlan]) -> str:
    """The planned bytes, item by item, with each device's total, cap and room left."""
    rows: list[tuple[str, ...]] = [("device", "kind", "planned", "source", "why")]
    for device in devices:
        rows += [
            (device.id, item.kind, format_size(item.bytes), item.source, item.why)
            for item in device.items
        ]
        rows.append((device.id, "total", format_size(device.planned_bytes), "", _of_cap(device)))
        if device.mapped_bytes:
            apart = "file pages, which the kernel can drop; outside the cap"
            rows.append((device.id, "mapped", format_size(device.mapped_bytes), "", apart))
    return table(rows, right={2})


def _of_cap(device: DevicePlan) -> str:
    left = device.left_bytes
    room = f"{format_size(left)} left" if left >= 0 else f"{format_size(-left)} too much"
    return f"of {format_size(device.budget_bytes)} ({device.budget_origin}), {room}"


def settings_text(plan: Plan) -> str:
    """The engine's settings as the flags that fix them."""
    if isinstance(plan.engine, TransformersSettings):
        flags = render_hf.settings_flags(plan.engine, plan.workload)
    else:
        flags = settings_flags(plan.engine, plan.workload)
    if plan.draft is not None:
        draft = plan.draft
        typed = draft.reference or next(iter(draft.model_files), draft.model_name)
        flags.append(f"--draft {typed}")
    elif plan.engine.n_draft:
        flags.append("--draft lookup")
    return "settings as flags\n" + _INDENT + " ".join(flags)


def settings_flags(engine: EngineSettings, workload: Workload | None = None) -> list[str]:
    """Flags of `run` that lead to these settings on the same machine."""
    flags = [
        *cells_flags(engine, workload),
        f"-ngl {engine.n_gpu_layers}",
        f"-ctk {engine.type_k}",
        f"-ctv {engine.type_v}",
        f"-b {engine.n_batch}",
        f"-ub {engine.n_ubatch}",
        f"-fa {'on' if engine.flash_attn else 'off'}",
        f"--load-mode {engine.load_mode}",
        f"-t {engine.n_threads}",
    ]
    if len(engine.layers_per_device) > 1:
        flags.insert(
            flags.index(f"-ngl {engine.n_gpu_layers}") + 1,
            "-ts " + ",".join(map(str, engine.layers_per_device)),
        )
    flags += [f"-ot '{o.pattern}={o.device}'" for o in engine.overrides]
    if not engine.offload_kqv:
        flags.append("-nkvo")
    if engine.swa_full:
        flags.append("--swa-full")
    return flags


UNMEASURED = (
    "unknown, the machine was not measured: `loadmaster doctor --measure` does it in a minute"
)


def prediction_text(predicted: Prediction) -> str:
    """Predicted speed by phase, what bounds it, and what the figures rest on."""
    speeds = _speeds(predicted)
    if not speeds:
        return f"predicted speed: {UNMEASURED}"
    basis = {
        "measured": "from measured bandwidths",
        "table": "from a table of bandwidths, not measured here",
        "unknown": "from unknown bandwidths",
    }[predicted.basis]
    phase = "prefill" if predicted.decode_tok_s is None else "decode"
    first = f"predicted: {speeds}; {phase} is bound by {predicted.bound_by}; {basis}"
    return "\n".join([first, *_levers(predicted)])


def _levers(predicted: Prediction) -> list[str]:
    """What would make decode faster."""
    if not predicted.levers:
        return []
    rows = [(lever.what, f"{_figure(lever.decode_tok_s)} tok/s") for lever in predicted.levers]
    return ["what would change decode", table(rows, right={1})]


def _speeds(predicted: Prediction) -> str:
    figures = (
        ("decode", predicted.decode_tok_s, "tok/s"),
        ("prefill", predicted.prefill_tok_s, "tok/s"),
        ("TTFT", predicted.ttft_s, "s"),
        ("load", predicted.load_s, "s"),
        ("jobs", predicted.jobs_per_hour, "per hour"),
    )
    return " · ".join(
        f"{name} {_figure(value)} {unit}" for name, value, unit in figures if value is not None
    )


def stages_text(plan: Plan) -> str:
    """Whose turn takes how long, where layers run one GPU after another."""
    engine = plan.engine
    if not isinstance(engine, TransformersSettings):
        return ""
    rows = [
        (stage.device, render_hf.stage_text(engine, stage), _filled(plan.device(stage.device)),
         f"{1000 * stage.decode_s:.1f} ms of a token")
        for stage in plan.predicted.stages
    ]  # fmt: skip
    return "one GPU after another\n" + table(rows, right={2, 3}) if rows else ""


def _filled(device: DevicePlan) -> str:
    return f"{100 * device.planned_bytes / max(1, device.budget_bytes):.0f} % of its budget"


def _figure(value: float) -> str:
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def notes_text(notes: Sequence[str]) -> str:
    """What a person needs to know, one line each."""
    return "\n".join(f"note: {note}" for note in notes)


def alternatives_text(alternatives: Sequence[Alternative]) -> str:
    """Neighbouring plans, each with the flag to type and what it gives."""
    if not alternatives:
        return ""
    rows = [(f"`{' '.join(a.flags)}`", _gives(a)) for a in alternatives]
    return "other plans\n" + table(rows)


def _gives(alternative: Alternative) -> str:
    speed = alternative.decode_tok_s
    freed = [
        f"frees {format_size(size)} on {device}"
        for device, size in alternative.frees_bytes.items()
        if size > 0
    ]
    tail = [*freed, *([f"decode {_figure(speed)} tok/s"] if speed is not None else [])]
    return ", ".join([alternative.what, *tail] if alternative.what else tail)


def refusal_table(outcome: DoesNotFit) -> str:
    """The ledger of the smallest placement, and what is missing on each device."""
    rows = [
        (f"short by {format_size(s.bytes)} on {s.device}",
         f"needs {format_size(s.need_bytes)}, the budget is {format_size(s.budget_bytes)}")
        for s in outcome.shortfalls
    ]  # fmt: skip
    nearest = ""
    if outcome.nearest:
        nearest = "\n\n  would fit\n" + table([(f"`{' '.join(a.flags)}`", _gives(a))
                                              for a in outcome.nearest])  # fmt: skip
    return f"{ledger(outcome.devices)}\n\n{table(rows)}{nearest}"


def memory_table(rows: Sequence[MemoryRow]) -> str:
    """Planned beside measured, by the kinds of the ledger; the cap beside the totals."""
    lines: list[tuple[str, ...]] = [("device", "kind", "planned", "measured", "")]
    for row in rows:
        measured = "–" if row.measured_bytes is None else format_size(row.measured_bytes)
        lines.append((row.device, row.kind, format_size(row.planned_bytes), measured, _remark(row)))
    return table(lines, right={2, 3})


def _remark(row: MemoryRow) -> str:
    if row.cap_bytes is not None:
        return f"cap {format_size(row.cap_bytes)}"
    if row.measured_bytes is None or not row.exact:
        return row.note
    difference = row.measured_bytes - row.planned_bytes
    if difference == 0:
        return "equal"
    word = "above the plan" if difference > 0 else "below the plan"
    return f"{format_size(abs(difference))} {word}"


def done_line(done: DoneEvent, predicted: Prediction) -> str:
    """`prefill 123.4 tok/s · decode 45.6 tok/s · 64 tokens · predicted …` after an answer."""
    parts = []
    fed = done.n_prompt - done.n_cached
    if fed > 0 and done.prefill_s > 0:
        parts.append(f"prefill {fed / done.prefill_s:.1f} tok/s")
    if done.n_generated > 1 and done.decode_s > 0:
        parts.append(f"decode {done.n_generated / done.decode_s:.1f} tok/s")
    parts.append(f"{done.n_generated} tokens")
    if done.n_drafted:
        parts.append(f"{done.n_accepted} of {done.n_drafted} drafted accepted")
    if predicted.decode_tok_s is not None:
        speeds = [f"decode {_figure(predicted.decode_tok_s)}"]
        if predicted.prefill_tok_s is not None:
            speeds.insert(0, f"prefill {_figure(predicted.prefill_tok_s)}")
        parts.append(f"predicted {', '.join(speeds)} tok/s ({predicted.basis})")
    return " · ".join(parts)
