"""The child process that renders chat templates: `python -m loadmaster.tasks.template_worker`.

A template comes with the model, so it is untrusted code. Jinja's sandbox keeps it away from
Python's internals; the limits of this process keep its memory and time away from ours. A render
that uses up its CPU time is killed by SIGPROF's default action, even inside one long C call.

One JSON request per line on stdin, one JSON reply per line on stdout, until end of file.
`--confinements` prints which protections this machine grants it, and ends.
"""

import json
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from loadmaster.engine.confine import confine_renderer
from loadmaster.machine.types import Confinement
from loadmaster.schema import to_json
from loadmaster.units import MIB, Bytes

MESSAGE_LIMIT_CHARS = 1000
MEMORY_LIMIT_BYTES = Bytes(256 * MIB)  # measured: 12 MiB before the first render
_UNUSED_GLOBALS = ("lipsum", "cycler", "joiner")  # no chat template needs them


class _Refused(Exception):
    """The template called `raise_exception`: it refuses this conversation."""


class _GenerationTag(jinja2.ext.Extension):
    """Hugging Face's `{% generation %}` marks training text; for us its body is plain."""

    tags = {"generation"}  # noqa: RUF012 (jinja declares it as a plain set)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Hugging Face's `tojson`: jinja's own escapes HTML characters, which no model was taught."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> str:
    raise _Refused(message)


def _environment() -> ImmutableSandboxedEnvironment:
    """The settings that Hugging Face's tokenizers render chat templates with."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    for name in _UNUSED_GLOBALS:
        del environment.globals[name]
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda fmt: datetime.now().strftime(fmt)
    return environment


@lru_cache(maxsize=4)
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)


def _render(line: str) -> str:
    request = json.loads(line)
    output_limit = int(request["output_limit"])
    signal.setitimer(signal.ITIMER_PROF, float(request["cpu_s"]))
    parts: list[str] = []
    length = 0
    variables = request["variables"]
    assert isinstance(variables, dict)
    for part in _compiled(str(request["template"])).generate(**variables):
        length += len(part)
        if length > output_limit:
            raise OverflowError(f"its output is longer than {output_limit} characters")
        parts.append(part)
    return "".join(parts)


def _reply(line: str) -> str:
    """One line of JSON, whatever the template does."""
    try:
        return json.dumps({"text": _render(line)})
    except _Refused as refusal:
        return json.dumps({"refused": str(refusal)[:MESSAGE_LIMIT_CHARS]})
    except MemoryError:
        return json.dumps(
            {"failed": f"it needs more than {MEMORY_LIMIT_BYTES // MIB} MiB of memory"}
        )
    except Exception as problem:  # anything a template does wrong is a reply, never a crash
        reason = f"{type(problem).__name__}: {problem}"
        return json.dumps({"failed": reason[:MESSAGE_LIMIT_CHARS]})


def _confine() -> tuple[Confinement, ...]:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C belongs to the parent
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    return confine_renderer(MEMORY_LIMIT_BYTES)


def main() -> None:
    """Answer requests until stdin ends."""
    granted = _confine()
    if "--confinements" in sys.argv[1:]:
        print(json.dumps(to_json(granted)))
        return
    for line in sys.stdin:
        reply = _reply(line)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(reply + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
