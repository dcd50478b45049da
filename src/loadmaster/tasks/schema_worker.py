"""The child process that tries JSON schemas out: `python -m loadmaster.tasks.schema_worker`.

A schema comes from a client, and compiling it is native code without a limit on time: 40 patterns
that a text has to fulfil at once take for ever. Here it is compiled over a vocabulary of bytes and
followed for a while, under limits on CPU time (SIGPROF's default action, even inside one long C
call) and memory. What passes here is compiled again by the worker.

One JSON request per line on stdin, one JSON reply per line on stdout, until end of file.
"""

import json
import random
import resource
import signal
import sys

from loadmaster.engine.backends.grammar import Constraint, Grammars, byte_tokenizer
from loadmaster.engine.confine import confine_renderer
from loadmaster.errors import UsageError
from loadmaster.units import MIB, Bytes

MEMORY_LIMIT_BYTES = Bytes(256 * MIB)
STEPS = 48
_N_TOKENS = 257


def _follow(constraint: Constraint) -> None:
    """Some way into one text that the schema allows.

    Where that ends early, another text may not, and a worker that meets the end fails one request.
    """
    dice = random.Random(1)  # noqa: S311 (the same text for the same schema)
    for _ in range(STEPS):
        bits = constraint.allowed()
        open_tokens = [t for t in range(_N_TOKENS) if bits[t // 32] >> t % 32 & 1]
        if constraint.ended or not open_tokens:
            break
        constraint.accept(dice.choice(open_tokens))


def _reply(line: str) -> str:
    request = json.loads(line)
    signal.setitimer(signal.ITIMER_PROF, float(request["cpu_s"]))
    try:
        _follow(Grammars(byte_tokenizer).start(request["schema"]))
    except UsageError as refusal:
        return json.dumps({"refused": refusal.message, "hint": refusal.hint})
    except MemoryError:
        return json.dumps({"refused": "the JSON schema takes too much memory", "hint": None})
    return "{}"


def main() -> None:
    """Answer requests until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C belongs to the parent
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    confine_renderer(MEMORY_LIMIT_BYTES)
    for line in sys.stdin:
        reply = _reply(line)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(reply + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
