"""Settings of the transformers engine as text, beside those of llama.cpp in `render`."""

from itertools import groupby

from loadmaster.plan.types import CPU, AnySettings, TransformersSettings, Workload


def layers_text(engine: TransformersSettings, n_layer: int) -> str:
    """Where the layers are, in words: `layers 0-15 on gpu:0, 16-31 on gpu:1`."""
    rows = [(name, device) for name, device in engine.device_map if ".layers." in name]
    if not rows:
        return f"all {n_layer} layers on {engine.device_map[0][1]}"
    numbered = [(int(name.rpartition(".")[2]), device) for name, device in rows]
    parts = []
    for device, group in groupby(sorted(numbered), key=lambda row: row[1]):
        numbers = [number for number, _ in group]
        parts.append(f"{numbers[0]}-{numbers[-1]} on {device}")
    return "layers " + ", ".join(parts)


def settings_flags(engine: TransformersSettings, workload: Workload | None = None) -> list[str]:
    """Flags of `plan` that lead to these settings on the same machine."""
    flags = [*cells_flags(engine, workload), f"--quantize {engine.quantize}"]
    if engine.quantize in ("nf4", "fp4") and not engine.double_quant:
        flags.append("--no-double-quant")
    devices = [device for name, device in engine.device_map if ".layers." in name]
    if CPU in devices:
        flags.append(f"-ngl {len(devices) - devices.count(CPU)}")
    flags += [f"-ctk {engine.type_k}", f"-ctv {engine.type_v}", f"-ub {engine.n_ubatch}"]
    if engine.attention == "eager":
        flags.append("-fa off")
    return [*flags, f"-t {engine.n_threads}"]


def cells_flags(engine: AnySettings, workload: Workload | None) -> list[str]:
    """Tokens of one sequence, the number of sequences, and the cells of all where they differ."""
    n_ctx, n = engine.n_ctx // engine.n_seq_max, engine.n_seq_max
    if n == 1:
        return [f"--ctx {n_ctx}"]
    if workload is None or workload.n_cells is None:
        return [f"--ctx {n_ctx}", f"--sequences {n}"]
    return [f"--ctx {workload.n_ctx}", f"--sequences {n}", f"--cells {engine.n_ctx}"]
