"""JSON schemas of clients, tried out in a confined child before a worker compiles them."""

import hashlib
import json
import signal
import threading
from collections import OrderedDict

from loadmaster.engine.request_checks import check_schema_text
from loadmaster.errors import UsageError
from loadmaster.tasks.api.generation import ANY_OBJECT
from loadmaster.tasks.line_child import LineChild

CPU_LIMIT_S = 1.0
WALL_LIMIT_S = 15.0  # of a stopped or starved child
_KEPT = 1024  # schemas that passed, by their digest


class SchemaTrial:
    """Tries schemas one after the other, each in a process of its own (0.2 s, once for equal ones).

    Safe from any thread. Close it: a child may be running.
    """

    def __init__(self, *, cpu_limit_s: float = CPU_LIMIT_S) -> None:
        self._cpu_limit_s = cpu_limit_s
        self._child = LineChild("loadmaster.tasks.schema_worker")
        self._turn = threading.Lock()
        self._passed = OrderedDict({_digest(ANY_OBJECT): None})

    def knows(self, schema: str) -> bool:
        """Whether it has passed before, so that `check` returns at once."""
        return _digest(schema) in self._passed

    def check(self, schema: str) -> None:
        """Try a schema out. Blocks for as long as that takes, and for those before it.

        Raises:
            UsageError: it is not valid, not supported, or beyond the limits.
        """
        check_schema_text(schema)
        digest = _digest(schema)
        with self._turn:
            if digest in self._passed:
                return
            self._try(schema)
            self._passed[digest] = None
            if len(self._passed) > _KEPT:
                self._passed.popitem(last=False)

    def _try(self, schema: str) -> None:
        request = {"schema": schema, "cpu_s": self._cpu_limit_s}
        line = self._child.ask(json.dumps(request).encode() + b"\n", WALL_LIMIT_S)
        self._child.close()  # it would hold 40 MiB that no plan knows of
        if line is None:
            raise _too_complex(self._why(self._child.status))
        reply = json.loads(line)
        if "refused" in reply:
            raise UsageError(reply["refused"], hint=reply["hint"])

    def _why(self, status: int) -> str:
        if status == -signal.SIGPROF:
            return f"more than {self._cpu_limit_s:g} s"
        return "more time or memory than it may"

    def close(self) -> None:
        """End the child, whatever it does."""
        self._child.close()


def _digest(schema: str) -> bytes:
    return hashlib.sha256(schema.encode("utf-8", "surrogatepass")).digest()


def _too_complex(what: str) -> UsageError:
    refusal = UsageError(
        f"the JSON schema takes {what} to compile",
        hint="fewer patterns, alternatives and counts that hold at once make a schema simpler",
    )
    refusal.code = "schema_too_complex"
    return refusal
