"""What does a plan cost before the download? A 70B and a 405B on a local server with ranges.

    python -m benchmarks.remote_plan

Each model is a file of its full size without weights, with a vocabulary of 128,256 tokens and its
merges. It is planned twice for the same machine, in a process of its own like a user's: over HTTP,
and from the disk. The last line is one JSON object; `ledger_differences` counts the lines of the
ledger and the settings that are not the same.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import gguf_writer as gw
from benchmarks.hostile_server import HostileServer, hub_path, hub_routes
from benchmarks.shapes import build
from loadmaster.units import MIB

REPO = "bench/Model-GGUF"
LIMITS = {"mib_read": 16.0, "seconds": 3.0, "ledger_differences": 0}
# Shape, file, machine: cards that a person would ask about.
MODELS = (
    ("llama-70b", "Llama-70B-Q4_K_M.gguf", "rtx4090-24g"),
    ("llama-405b", "Llama-405B-Q4_K_M.gguf", "a100-80g-x4"),
)


def main() -> int:
    """Measure both; 1 when a figure is over its limit."""
    with tempfile.TemporaryDirectory(prefix="remote-plan-") as folder:
        rows = [_measure(Path(folder), *model) for model in MODELS]
    for row in rows:
        print(
            f"{row['model']}: {row['mib_read']:.2f} MiB in {row['requests']} requests, "
            f"{row['seconds']:.2f} s, from the disk {row['local_seconds']:.2f} s, "
            f"{row['ledger_differences']} differences"
        )
    worst = {name: max(row[name] for row in rows) for name in LIMITS}
    failed = [name for name, limit in LIMITS.items() if worst[name] > limit]
    print(json.dumps({"benchmark": "remote_plan", **worst, "models": rows, "failed": failed}))
    return 1 if failed else 0


def _measure(folder: Path, shape: str, name: str, machine: str) -> dict[str, Any]:
    local = gw.write_sparse(folder / name, *build(shape, "q4_K_M", tokenizer="bpe"))
    files = {name: local}
    with HostileServer({hub_path(REPO, name): local}, routes=hub_routes(REPO, files)) as server:
        environment = {
            **os.environ,
            "LOADMASTER_HOME": str(folder / shape),
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(folder / "hub"),
        }
        _link_engines(folder / shape)
        remote, seconds = _plan(f"hf:{REPO}", machine, environment)
        traffic = server.traffic
    here, local_seconds = _plan(str(local), machine, environment)
    for line in _different(remote, here):
        print(f"differs: {line}")
    return {
        "model": shape,
        "machine": machine,
        "file_bytes": local.stat().st_size,
        "mib_read": round(traffic.body_bytes / MIB, 3),
        "requests": len(traffic.requests),
        "seconds": round(seconds, 3),
        "local_seconds": round(local_seconds, 3),
        "added_seconds": round(seconds - local_seconds, 3),  # by the network
        "ledger_differences": len(_different(remote, here)),
    }


def _link_engines(home: Path) -> None:
    """The engines of the user, in a home of its own: its caches are empty."""
    from loadmaster.settings import data_folder

    home.mkdir()
    engines = data_folder() / "engines"
    if engines.is_dir():
        (home / "engines").symlink_to(engines)


def _plan(model: str, machine: str, environment: Mapping[str, str]) -> tuple[dict[str, Any], float]:
    start = time.monotonic()
    words = ["plan", model, "--machine", machine, "--json"]
    ended = subprocess.run(
        [sys.executable, "-m", "loadmaster", *words],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    seconds = time.monotonic() - start
    document: dict[str, Any] = json.loads(ended.stdout)
    if "devices" not in document:
        raise SystemExit(f"no plan for {model}: {ended.stderr}")
    return document, seconds


def _different(remote: Mapping[str, Any], local: Mapping[str, Any]) -> list[str]:
    """Lines of the ledger, settings and predictions that are in one alone."""
    ours, theirs = _lines(remote), _lines(local)
    return [f"remote {line}" for line in ours if line not in theirs] + [
        f"local {line}" for line in theirs if line not in ours
    ]


def _lines(document: Mapping[str, Any]) -> list[str]:
    items = [json.dumps(item) for device in document["devices"] for item in device["items"]]
    figures = [f"{key}={document['engine'][key]}" for key in document["engine"]]
    return items + figures + [json.dumps(document["predicted"], sort_keys=True)]


if __name__ == "__main__":
    sys.exit(main())
