"""Processor time that processes have used (Linux)."""

import os
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def own_cpu_s() -> float:
    """Of this process, all of its threads."""
    times = os.times()
    return times.user + times.system


def cpu_s(pid: int | None) -> float:
    """Of another process; 0 where there is none."""
    if pid is None:
        return 0.0
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S
