"""A child process that answers lines: work on untrusted input, ended when it takes too long.

A child, because neither a thread nor an alarm can stop one long call into C. It limits its own CPU
time and memory; how long is waited for it is up to the one who asks.
"""

import os
import select
import subprocess
import sys
import time
from pathlib import Path

import loadmaster


class LineChild:
    """One process, started at the first question or before; a new one after each that ended."""

    def __init__(self, module: str) -> None:
        """`module` is run with `python -m`; it confines itself before it reads a line."""
        self._module = module
        self._child: subprocess.Popen[bytes] | None = None
        self.status = 0  # of the last one that ended: what `Popen.returncode` says

    @property
    def pid(self) -> int | None:
        """The process that runs."""
        return self._child.pid if self._child else None

    def start(self) -> None:
        """Start it now, so that the first question need not wait for it."""
        self._child = self._child or start_module(self._module)

    def ask(self, line: bytes, wall_limit_s: float) -> bytes | None:
        """Write a line, read one. None: it ended, or was ended, without an answer; see `status`."""
        child = self._child = self._child or start_module(self._module)
        reply = _exchange(child, line, time.monotonic() + wall_limit_s)
        if reply is None:
            self.close()
        return reply

    def close(self) -> None:
        """End it; a later question starts a new one."""
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        self.status = child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe:
                pipe.close()


def start_module(module: str) -> "subprocess.Popen[bytes]":
    """A module of ours as a process with two pipes and no secrets in its environment."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module],  # `-P`: the current folder shadows nothing
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={
            "PYTHONPATH": str(Path(loadmaster.__file__).parents[1]),
            "PYTHONIOENCODING": "utf-8",
        },
        start_new_session=True,  # Ctrl-C at the terminal is for the parent alone
        close_fds=True,
        bufsize=0,
    )


def _exchange(child: subprocess.Popen[bytes], line: bytes, deadline: float) -> bytes | None:
    """Write the line, read one; None when the child died or the deadline passed."""
    assert child.stdin
    assert child.stdout
    source, sink = child.stdout.fileno(), child.stdin.fileno()
    os.set_blocking(sink, False)
    unsent, received = memoryview(line), bytearray()
    while not received.endswith(b"\n"):
        readable, writable, _ = select.select(
            [source], [sink] if unsent else [], [], max(0.0, deadline - time.monotonic())
        )
        if not readable and not writable:
            return None
        try:
            if writable:
                unsent = unsent[os.write(sink, unsent[:65536]) :]
            if readable:
                chunk = os.read(source, 65536)
                if not chunk:
                    return None
                received += chunk
        except BrokenPipeError:
            return None
    return bytes(received)
