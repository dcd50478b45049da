"""Is the plan true? Every part of the proof, and one JSON object with all figures at the end.

    python -m benchmarks.plan_accuracy [--part headers …]

Parts are modules of `benchmarks.accuracy`; each adds its figures to the object. The last line of
the output is the object.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping

from benchmarks.accuracy import budgets, headers, loads, ram, times
from loadmaster.engine.builds import find_build
from loadmaster.machine.detect import detect_machine

Part = Callable[[argparse.Namespace], dict[str, object]]


def _headers(arguments: argparse.Namespace) -> dict[str, object]:
    outcomes, refusals = headers.run(
        find_build(), detect_machine().cpu.isa, per_set=arguments.per_set, seed=arguments.seed
    )
    for line in headers.table(outcomes):
        print(line)
    for refusal in refusals:
        print(f"refused: {refusal.name} on {refusal.devices}: {refusal.reason}")
    return headers.figures(outcomes, refusals)


PARTS: Mapping[str, Part] = {
    "headers": _headers,
    "times": lambda _: times.run(),  # before the others warm the machine
    "loads": lambda _: loads.run(find_build()),
    "budgets": lambda _: budgets.run(find_build()),
    "ram": lambda _: ram.run(),
}


def main(argv: list[str] | None = None) -> int:
    """Run the parts; 1 when a figure is beyond its limit."""
    arguments = _parser().parse_args(argv)
    figures: dict[str, object] = {}
    for name in arguments.part or PARTS:
        start = time.monotonic()
        figures |= PARTS[name](arguments)
        figures[f"{name}_s"] = round(time.monotonic() - start, 1)
    failed = [name for name, value in figures.items() if _beyond_limit(name, value)]
    print(json.dumps({"benchmark": "plan_accuracy", **_where(), **figures, "failed": failed}))
    return 1 if failed else 0


# What a figure may be at the most, and at the least.
AT_MOST: Mapping[str, float] = {
    "model_error_bytes": 0,
    "kv_error_bytes": 0,
    "bound_below": 0,
    "final_error_bytes": 0,
    "counter_error_bytes": 0,
    "load_failures": 0,
    "over_budget": 0,
    "denied_allocations": 0,
    "ram_failures": 0,
    "oom_kills": 0,
    "ram_over_budget": 0,
    "ram_over_prediction_max_pct": 10,
    "plan_command_p50_s": 2,
    "cli_import_ms": 150,
}
AT_LEAST: Mapping[str, float] = {
    "budget_plans": 500,
    "optimum_share_p50_pct": 99,
    "optimum_share_min_pct": 97,
}


def _beyond_limit(name: str, value: object) -> bool:
    if not isinstance(value, int | float):
        return False
    return value > AT_MOST.get(name, value) or value < AT_LEAST.get(name, value)


def _where() -> dict[str, object]:
    build = find_build()
    return {"engine": build.id, "python": platform.python_version(), "machine": platform.machine()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_accuracy")
    parser.add_argument("--part", action="append", choices=list(PARTS))
    parser.add_argument("--per-set", type=int, default=headers.PER_SET)
    parser.add_argument("--seed", type=int, default=headers.SEED)
    return parser


if __name__ == "__main__":
    sys.exit(main())
