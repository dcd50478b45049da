"""Settings of the transformers engine as text, beside those of llama.cpp in `render`."""

from collections import Counter
from itertools import groupby

from loadmaster.plan.types import (
    CPU,
    AnySettings,
    StageShare,
    TransformersSettings,
    Workload,
)


def layers_text(engine: TransformersSettings, n_layer: int) -> str:
    """Where the layers are, in words: `layers 0-15 on gpu:0, 16-31 on gpu:1`."""
    rows = [(name, device) for name, device in engine.device_map if ".layers." in name]
    if not rows:
        return f"all {n_layer} layers on {engine.device_map[0][1]}"
    numbered = [(int(name.rpartition(".")[2]), device) for name, device in rows]
    parts = []
    for device, group in groupby(sorted(numbered), key=lambda row: row[1]):
        first, *others = [number for number, _ in group]
        parts.append(f"{first}-{others[-1]} on {device}" if others else f"{first} on {device}")
    return "layers " + ", ".join(parts)


def settings_flags(engine: TransformersSettings, workload: Workload | None = None) -> list[str]:
    """Flags of `plan` that lead to these settings on the same machine."""
    flags = [*cells_flags(engine, workload), f"--quantize {engine.quantize}"]
    if engine.quantize in ("nf4", "fp4") and not engine.double_quant:
        flags.append("--no-double-quant")
    flags += _placement_flags(engine)
    flags += [f"-ctk {engine.type_k}", f"-ctv {engine.type_v}", f"-ub {engine.n_ubatch}"]
    if engine.attention == "eager":
        flags.append("-fa off")
    return [*flags, f"-t {engine.n_threads}"]


def _placement_flags(engine: TransformersSettings) -> list[str]:
    """None where one GPU has every layer: a planner does that by itself. So it does where a faster
    GPU comes before one of a lower number, an order that `-ts` cannot say."""
    if engine.device_map == (("", CPU),):
        return ["-ngl 0"]
    counts = layer_counts(engine)
    gpus = [int(device.removeprefix("gpu:")) for device in counts if device != CPU]
    flags = [f"-ngl {counts.total() - counts[CPU]}"] if CPU in counts else []
    if len(gpus) > 1 and gpus == sorted(gpus):
        shares = [str(counts[f"gpu:{index}"]) for index in range(gpus[-1] + 1)]
        flags.append("-ts " + ",".join(shares))
    return flags


def stage_text(engine: TransformersSettings, stage: StageShare) -> str:
    """Whose layers a GPU runs: those of the CPU are sent to it."""
    sent = stage.n_layers - layer_counts(engine)[stage.device]
    own = f"{stage.n_layers - sent} layers"
    return f"{own} and {sent} of the CPU" if sent else own


def layer_counts(engine: TransformersSettings) -> Counter[str]:
    """Layers by device in their order, where they are on several."""
    return Counter(device for name, device in engine.device_map if ".layers." in name)


def cells_flags(engine: AnySettings, workload: Workload | None) -> list[str]:
    """Tokens of one sequence, the number of sequences, and the cells of all where they differ."""
    n_ctx, n = engine.n_ctx // engine.n_seq_max, engine.n_seq_max
    if n == 1:
        return [f"--ctx {n_ctx}"]
    if workload is None or workload.n_cells is None:
        return [f"--ctx {n_ctx}", f"--sequences {n}"]
    return [f"--ctx {workload.n_ctx}", f"--sequences {n}", f"--cells {engine.n_ctx}"]
