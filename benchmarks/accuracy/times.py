"""Part 4 of the plan benchmark: how long a plan takes, as a user waits for it.

plan_command_*_s   `loadmaster plan FILE --machine rtx4090-24g --json` of a 126-layer header (the
                   405B shape, q4_K_M), the whole process from start to end; not its first run
cli_import_ms      importing `loadmaster.interfaces.cli.main` in a fresh interpreter, less a
                   fresh interpreter that imports nothing; medians
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gguf_writer import write_sparse
from benchmarks.shapes import ARCHITECTURES

N_PLANS = 9
N_IMPORTS = 25
PROFILE = "rtx4090-24g"
# (budgets, what it is): nothing fits on a card of 24 GiB alone, the rest streams from RAM or disk.
CASES = (
    ("plan_command", ("--ctx", "8192")),
    ("plan_command_tight", ("--ctx", "8192", "--vram", "12GiB")),
)


def run() -> dict[str, object]:
    """The figures of this part."""
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = write_sparse(
            Path(folder) / "llama-405b.gguf", *ARCHITECTURES["llama-405b"]("q4_K_M")
        )
        for name, flags in CASES:
            seconds = [_plan_s(path, flags) for _ in range(N_PLANS + 1)][1:]
            figures[f"{name}_p50_s"] = round(statistics.median(seconds), 3)
            figures[f"{name}_max_s"] = round(max(seconds), 3)
    figures["cli_import_ms"] = round(_import_ms(), 1)
    return figures


def _plan_s(path: Path, flags: Sequence[str]) -> float:
    loadmaster = str(Path(sys.executable).with_name("loadmaster"))
    command = [loadmaster, "plan", str(path), "--machine", PROFILE, *flags, "--json"]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode not in (0, 3):  # 3: it does not fit, which takes as long to find out
        raise RuntimeError(done.stderr)
    return seconds


def _import_ms() -> float:
    """Alternating, so that both see the same machine."""
    bare, full = [], []
    for _ in range(N_IMPORTS):
        bare.append(_python_s("pass"))
        full.append(_python_s("import loadmaster.interfaces.cli.main"))
    return 1000 * (statistics.median(full) - statistics.median(bare))


def _python_s(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start
