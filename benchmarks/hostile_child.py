"""The other side of `hostile_download`: forks a child for each job, so that a kill costs no import.

Reads a job as one line of JSON, prints the child's pid, waits for a line, lets the child go, and
prints how it ended.
"""

import json
import os
import sys
from typing import Any

import httpx2  # noqa: F401  (imported before the fork)

from loadmaster.errors import LoadmasterError
from loadmaster.model.http import Patience
from loadmaster.tasks.connections import TransferRules
from loadmaster.tasks.pull import PullOptions, pull

RULES = TransferRules(
    chunk_bytes=16 << 10, segment_bytes=1 << 20, sync_bytes=64 << 10, max_failures=2
)
PATIENCE = Patience(
    connect_s=5, answer_s=0.5, window_s=0.5, window_bytes=4096, attempts=2, backoff_s=0
)


class Silent:
    """Nobody watches."""

    def say(self, line: str) -> None:
        """Drop it."""

    def fetching(self, label: str, done_bytes: int, total_bytes: int | None) -> None:
        """Drop it."""

    def verifying(self, label: str, done_bytes: int, total_bytes: int) -> None:
        """Drop it."""


def main() -> None:
    """Serve jobs until stdin ends."""
    while line := sys.stdin.readline():
        go_read, go_write = os.pipe()
        told_read, told_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(go_write)
            os.close(told_read)
            _child(json.loads(line), go_read, told_write)
        os.close(go_read)
        os.close(told_write)
        print(pid, flush=True)
        sys.stdin.readline()
        os.close(go_write)  # its end of the pipe lets the child go
        _, wait_status = os.waitpid(pid, 0)
        with os.fdopen(told_read, "rb") as told:
            said = json.loads(told.read() or b"{}")
        print(json.dumps({"status": os.waitstatus_to_exitcode(wait_status), **said}), flush=True)


def _child(job: dict[str, str], go: int, told: int) -> None:
    status = 1
    try:
        os.read(go, 1)
        os.environ.update(
            LOADMASTER_HOME=job["home"], HF_HOME=job["home"], HF_ENDPOINT=job["endpoint"]
        )
        os.environ.pop("HF_HUB_CACHE", None)
        options = PullOptions(sha256=job["sha256"], rules=RULES, patience=PATIENCE)
        file = pull(job["model"], options, Silent()).files[0]
        said: dict[str, Any] = {
            "resumed_bytes": file.resumed_bytes,
            "was_complete": file.fetched_bytes == 0 and file.resumed_bytes == file.size_bytes,
        }
        os.write(told, json.dumps(said).encode())
        status = 0
    except LoadmasterError as error:
        status = error.exit_code
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
