"""The child process that renders chat templates: `python -m loadmaster.tasks.template_worker`.

A template comes with the model, so it is untrusted code. Jinja's sandbox keeps it away from
Python's internals; the limits of this process keep its memory and time away from ours. A render
that uses up its CPU time is killed by SIGPROF's default action, even inside one long C call.

One JSON request per line on stdin, one JSON reply per line on stdout, until end of file.
"""

import json
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_LIMIT_BYTES = 256 << 20  # measured: 12 MiB before the first render
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


def _render(request: dict[str, object], output_limit: int) -> str:
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


def _reply(render: Callable[[], str]) -> dict[str, str]:
    try:
        return {"text": render()}
    except _Refused as refusal:
        return {"refused": str(refusal)}
    except MemoryError:
        return {"failed": f"it needs more than {MEMORY_LIMIT_BYTES >> 20} MiB of memory"}
    except Exception as problem:  # anything a template does wrong is a reply, never a crash
        return {"failed": f"{type(problem).__name__}: {problem}"}


def _limit_process() -> None:
    for limit, value in (
        (resource.RLIMIT_DATA, MEMORY_LIMIT_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C belongs to the parent


def main() -> None:
    """Answer requests until stdin ends."""
    _limit_process()
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, float(request["cpu_s"]))
        reply = _reply(lambda req=request: _render(req, int(req["output_limit"])))  # type: ignore[misc]
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
