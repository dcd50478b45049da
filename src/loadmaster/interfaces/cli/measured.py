"""What `doctor --measure` found, as text."""

from loadmaster.interfaces.cli.render import table
from loadmaster.machine.measurements import DeviceTimes, Measurements
from loadmaster.model.quants import BY_NAME

# What bitsandbytes makes of weights, scales included.
_BITS = {"nf4": 4.5, "nf4-double": 4.127, "int8": 8.0}
Rows = list[tuple[str, ...]]


def measured_text(measured: Measurements) -> str:
    """Memory and disk, then each device's kernels by type of weights."""
    lines = [table(_memory_rows(measured))]
    for device in measured.devices:
        lines += ["", _device_title(device), table(_kernel_rows(device), right={1, 2, 3, 4})]
        rest = _rest(device)
        lines += [table(rest)] if rest else []
        if device.not_measured:
            lines.append(f"  not measured: {', '.join(device.not_measured)}")
    if measured.disturbed:
        lines += [
            "",
            f"  other programs had the processors too (runs differ by {measured.spread:.2f}): "
            "the figures are too slow, `loadmaster doctor --measure` again when it is quiet",
        ]
    return "\n".join(lines)


def _memory_rows(measured: Measurements) -> Rows:
    reads = measured.ram_read_bytes_s
    rows: Rows = [("taken", f"{measured.taken}, in {measured.seconds:.0f} s")]
    rows += [
        ("RAM read", f"{_gb_s(rate)}, {count} thread{'s' if count > 1 else ''}")
        for count, rate in enumerate(reads, start=1)
        if count in (1, len(reads)) or count & (count - 1) == 0
    ]
    disk = measured.disk_read_bytes_s
    rows.append(("disk read", "not measured" if disk is None else _gb_s(disk)))
    if measured.step_s is not None:
        rows.append(("step", f"{measured.step_s * 1e6:.0f} µs outside the graph"))
    return rows


def _device_title(device: DeviceTimes) -> str:
    threads = f", {device.n_threads} threads" if device.n_threads else ""
    return f"  {device.id}: {device.name}{threads}"


def _kernel_rows(device: DeviceTimes) -> Rows:
    """Decode as the bytes it gets through, prefill as arithmetic; repacked where that is used."""
    rows: Rows = [("weights", "decode", "4 at once", "prefill", "experts")]
    for name in dict.fromkeys(point.type for point in device.products):
        points = [p for p in device.products if p.type == name]
        layout = "repacked" if any(p.layout == "repacked" for p in points) else "plain"
        dense = {p.tokens: p.s_per_byte for p in points if p.layout == layout and not p.gathered}
        experts = {p.tokens: p.s_per_byte for p in points if p.layout == layout and p.gathered}
        label = name if layout == "plain" else f"{name} repacked"
        rows.append((
            label,
            _rate(dense.get(1)),
            _rate(dense.get(4)),
            _flops(name, max(dense, default=0), dense.get(max(dense, default=0))),
            _rate(experts.get(1)),
        ))  # fmt: skip
    return rows


def _rest(device: DeviceTimes) -> Rows:
    rows: Rows = []
    if device.node_s is not None:
        rows.append(("operation", f"{device.node_s * 1e6:.1f} µs at the least"))
    rows += [
        (f"layer, {layer.kind}", f"{layer.seconds * 1e6:.0f} µs at the least")
        for layer in device.layers
        if layer.kind != "part"
    ]
    for name, value in (
        ("memory copy", device.memory_bytes_s),
        ("link, page-locked", device.pinned_bytes_s),
        ("link, pageable", device.pageable_bytes_s),
    ):
        if value is not None:
            rows.append((name, _gb_s(value)))
    return rows


def _rate(s_per_byte: float | None) -> str:
    return "–" if s_per_byte is None else _gb_s(1 / s_per_byte)


def _flops(type_name: str, tokens: int, s_per_byte: float | None) -> str:
    if s_per_byte is None:
        return "–"
    return f"{2 * tokens * _elements_per_byte(type_name) / s_per_byte / 1e9:.0f} GFLOP/s"


def _elements_per_byte(type_name: str) -> float:
    if type_name in _BITS:
        return 8 / _BITS[type_name]
    quant = BY_NAME[type_name]
    return quant.block_size / quant.block_bytes


def _gb_s(bytes_s: float) -> str:
    return f"{bytes_s / 1e9:.1f} GB/s"
