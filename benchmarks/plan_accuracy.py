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

from benchmarks.accuracy import headers
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


PARTS: Mapping[str, Part] = {"headers": _headers}


def main(argv: list[str] | None = None) -> int:
    """Run the parts; 1 when a figure that must be 0 is not."""
    arguments = _parser().parse_args(argv)
    figures: dict[str, object] = {}
    for name in arguments.part or PARTS:
        start = time.monotonic()
        figures |= PARTS[name](arguments)
        figures[f"{name}_s"] = round(time.monotonic() - start, 1)
    failed = [name for name in MUST_BE_ZERO if figures.get(name)]
    print(json.dumps({"benchmark": "plan_accuracy", **_where(), **figures, "failed": failed}))
    return 1 if failed else 0


MUST_BE_ZERO = ("model_error_bytes", "kv_error_bytes", "bound_below")


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
