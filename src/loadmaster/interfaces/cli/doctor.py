"""`loadmaster doctor`: this machine, its engines, and what limits them."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import click

from loadmaster.interfaces.cli.measured import measured_text
from loadmaster.interfaces.cli.options import common_options
from loadmaster.interfaces.cli.progress import TerminalProgress
from loadmaster.interfaces.cli.render import table
from loadmaster.machine.profiles import save_profile
from loadmaster.machine.types import Gpu, Machine, Ram
from loadmaster.tasks.doctor import (
    Diagnosis,
    EngineState,
    PythonEngine,
    diagnosis_json,
    examine,
    measure,
)
from loadmaster.units import format_size

Rows = list[tuple[str, ...]]


@click.command()
@click.option(
    "--save-machine",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write this machine as a profile for `plan --machine FILE`.",
)
@click.option(
    "--measure",
    "measured",
    is_flag=True,
    help="Time memory, link, disk and each engine's kernels (20 to 60 s); later plans use them.",
)
@common_options
def doctor(
    save_machine: Path | None, measured: bool, as_json: bool, quiet: bool, debug: bool
) -> None:
    """Show this machine, its engines, and what limits them.

    Findings are no failures: the exit code is 0 whatever is found.
    """
    if measured:
        progress = TerminalProgress(quiet=quiet or as_json)
        measure(lambda what: progress.say(f"measuring {what}"))
    diagnosis = examine()
    if save_machine is not None:
        save_profile(
            portable(diagnosis.machine),
            save_machine,
            sources=(f"detected by loadmaster {diagnosis.loadmaster_version}",),
        )
    if as_json:
        click.echo(json.dumps(diagnosis_json(diagnosis), ensure_ascii=False))
    else:
        click.echo(diagnosis_text(diagnosis))


command = doctor


def portable(machine: Machine) -> Machine:
    """The machine without what is true only here and now: its programs, folders and warnings."""
    return replace(
        machine,
        gpus=tuple(replace(gpu, processes=()) for gpu in machine.gpus),
        disk_free_bytes=None,
        disk_path=None,
        warnings=(),
    )


def diagnosis_text(diagnosis: Diagnosis) -> str:
    """All sections; those without a row are left out."""
    machine = diagnosis.machine
    sections = [
        (f"loadmaster {diagnosis.loadmaster_version} on {machine.name}", _host_rows(machine)),
        ("GPUs", _gpu_rows(machine.gpus)),
        ("programs on the GPUs", _process_rows(machine.gpus)),
        ("engines", _engine_rows(diagnosis.engines)),
        ("engine of safetensors models", _python_rows(diagnosis.safetensors)),
        ("confinement of workers and of the server", _confinement_rows(machine)),
    ]
    blocks = [_block(title, table(rows)) for title, rows in sections if rows]
    if machine.measured:
        blocks.append(_block("measured", measured_text(machine.measured)))
    if diagnosis.safetensors and diagnosis.safetensors.measured:
        text = measured_text(diagnosis.safetensors.measured)
        blocks.append(_block("measured, for safetensors models", text))
    if machine.warnings:
        blocks.append(_block("not found out", _list(machine.warnings)))
    lines = [
        f"{advice.what}\n      {advice.command}" if advice.command else advice.what
        for advice in diagnosis.advice
    ]
    blocks.append(_block("advice", _list(lines) if lines else "  nothing to mend"))
    return "\n\n".join(blocks)


def _block(title: str, body: str) -> str:
    return f"{click.style(title, bold=True)}\n{body}"


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"  - {line}" for line in lines)


def _host_rows(machine: Machine) -> Rows:
    ram, cpu = machine.ram, machine.cpu
    rows: Rows = [
        ("system", machine.os + _inside(machine)),
        ("CPU", f"{_known(cpu.name)}, {cpu.architecture}"),
        ("cores", f"{_known(cpu.physical_cores)} physical, {cpu.logical_cores} logical"),
        ("ISA", " ".join(cpu.isa) or "unknown"),
        ("RAM", f"{format_size(ram.free_bytes)} free of {format_size(ram.total_bytes)}"),
        ("RAM speed", _ram_speed(ram)),
        ("cgroup", _cgroup(machine)),
        ("swap", f"{format_size(ram.swap_free_bytes)} free of {format_size(ram.swap_total_bytes)}"),
        ("mlock limit", _size_or(ram.mlock_limit_bytes, "none")),
    ]
    if machine.disk_free_bytes is not None:
        rows.append(("disk", f"{format_size(machine.disk_free_bytes)} free at {machine.disk_path}"))
    return rows


def _ram_speed(ram: Ram) -> str:
    if ram.bandwidth_bytes_s is None:
        return "unknown (the memory modules are listed in a table that only root may read)"
    return _bandwidth(ram.bandwidth_bytes_s)


def _inside(machine: Machine) -> str:
    inside = [f"WSL{machine.wsl}"] if machine.wsl else []
    inside += [machine.container] if machine.container else []
    return f", in {' and '.join(inside)}" if inside else ""


def _cgroup(machine: Machine) -> str:
    ram = machine.ram
    if ram.cgroup_limit_bytes is None:
        return "no limit below the machine's RAM"
    used = format_size(ram.cgroup_used_bytes or 0)
    return f"v{ram.cgroup_version}, {used} used of {format_size(ram.cgroup_limit_bytes)}"


def _gpu_rows(gpus: Iterable[Gpu]) -> Rows:
    return [
        (
            gpu.id,
            gpu.name,
            f"{_size_or(gpu.free_bytes, 'unknown')} free of {format_size(gpu.total_bytes)}"
            + (f" ({gpu.free_source})" if gpu.free_source else ""),
            _bandwidth(gpu.bandwidth_bytes_s),
            _link(gpu),
            _driver(gpu),
        )
        for gpu in gpus
    ]


def _link(gpu: Gpu) -> str:
    if gpu.unified_memory:
        return "shares the host's RAM"
    if gpu.pcie_gen is None or gpu.pcie_width is None:
        return "link unknown"
    now = f", gen {gpu.pcie_gen_now} now" if gpu.pcie_gen_now not in (None, gpu.pcie_gen) else ""
    return f"PCIe {gpu.pcie_gen}.0 x{gpu.pcie_width}{now}"


def _driver(gpu: Gpu) -> str:
    parts: list[str] = [gpu.backend]
    if gpu.driver:
        parts.append(f"driver {gpu.driver}")
    if gpu.compute_capability:
        parts.append("compute capability {}.{}".format(*gpu.compute_capability))
    return ", ".join(parts)


def _process_rows(gpus: Iterable[Gpu]) -> Rows:
    return [
        (gpu.id, str(process.pid), _known(process.name), _size_or(process.used_bytes, "unknown"))
        for gpu in gpus
        for process in gpu.processes
    ]


def _engine_rows(engines: Iterable[EngineState]) -> Rows:
    rows: Rows = []
    for engine in engines:
        use = "in use" if engine.in_use else ""
        rows.append((engine.id, engine.target, use, engine.fault or engine.root))
        rows += [
            ("", "", device.id, f"{device.engine_name}: {device.description}, "
             f"{format_size(device.free_bytes)} free of {format_size(device.total_bytes)}")
            for device in engine.devices or ()
        ]  # fmt: skip
    return rows


def _python_rows(engine: PythonEngine | None) -> Rows:
    if engine is None:
        return []
    return [("packages", engine.version), ("built for", engine.target),
            ("attention", engine.attention)]  # fmt: skip


def _confinement_rows(machine: Machine) -> Rows:
    return [(c.name, "active" if c.active else "no", c.detail) for c in machine.confinements]


def _bandwidth(bytes_s: int | None) -> str:
    return "bandwidth unknown" if bytes_s is None else f"{bytes_s / 1e9:.0f} GB/s (table)"


def _size_or(size_bytes: int | None, otherwise: str) -> str:
    return otherwise if size_bytes is None else format_size(size_bytes)


def _known(value: object) -> str:
    return "unknown" if value is None else str(value)
