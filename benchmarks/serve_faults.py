"""A server while workers die, clients leave, input is hostile and every packet is counted.

    python -m benchmarks.serve_faults [--part faults|fuzz|egress]... [--seed 0] [--quick]

`faults` kills and stops workers, disconnects clients in five phases, reads slowly and asks 1,000
times at once; `fuzz` sends what the OpenAPI document does and does not allow, bombs and raw
headers; `egress` looks for packets off loopback and for prompts where none may be. The last line
is one JSON object with the figures of all parts that ran.
"""

import argparse
import json
import time
from collections.abc import Callable
from importlib import import_module

PARTS = ("faults", "fuzz", "egress")

# A part is a module with this function: `run(seed=…, quick=…)` prints what it does and returns its
# figures.
Run = Callable[..., dict[str, object]]


def main() -> None:
    options = _options()
    started = time.monotonic()
    summary: dict[str, object] = {"benchmark": "serve_faults"}
    for name in options.part or PARTS:
        print(f"-- {name}", flush=True)
        began = time.monotonic()
        summary |= _part(name)(seed=options.seed, quick=options.quick)
        summary[f"{name}_s"] = round(time.monotonic() - began, 1)
    summary |= {"elapsed_s": round(time.monotonic() - started, 1), "seed": options.seed}
    print(json.dumps(summary))


def _part(name: str) -> Run:
    run: Run = import_module(f"benchmarks.serving.{name}").run
    return run


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve_faults")
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tenth of the runs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
