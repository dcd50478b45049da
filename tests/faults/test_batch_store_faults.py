"""The store of a job under a failing disk, and under kills: small runs of the benchmarks."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

needs_compiler = pytest.mark.usefixtures("compiler")


@pytest.fixture
def compiler() -> None:
    assert shutil.which("cc"), "these tests compile a small C library"


def benchmark(name: str, *words: str) -> dict[str, Any]:
    """What a benchmark's last line says."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *words]
    child = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return found


@needs_compiler
def test_a_failing_disk_and_power_cuts_lose_nothing_acknowledged() -> None:
    found = benchmark("batch_io_faults", "--every", "11", "--cuts", "40")
    assert found["io_faults"] > 40
    assert found["power_cuts"] == 40
    names = ("lost_acknowledged", "false_success", "not_resumed", "unclear_ends")
    assert {name: found[name] for name in names} == dict.fromkeys(names, 0)


@needs_compiler
def test_without_syncs_power_cuts_are_seen_to_lose_results() -> None:
    found = benchmark("batch_io_faults", "--every", "1000", "--cuts", "40", "--control")
    assert found["lost_acknowledged"] > 0
    assert found["false_success"] > 0


def test_kills_of_worker_and_parent_lose_nothing() -> None:
    words = ("--kills", "6", "--items", "200", "--demo-kills", "0", "--kills-only", "--seed", "1")
    found = benchmark("batch_faults", *words)
    assert found["kills"] == 6
    assert (found["lost"], found["duplicated"], found["wrong"]) == (0, 0, 0)
    assert 0 < found["acknowledged"] <= found["items"]  # a kill may come before the word is given
