"""Asks the command line, so that a page shows what a reader would see.

No engine is asked: compute buffers are bounds, and the pages are the same on every machine.
"""

import json
import shlex
from dataclasses import dataclass
from functools import cache
from typing import Any

from click.testing import CliRunner

from loadmaster.interfaces.cli import render
from loadmaster.interfaces.cli.failure import describe
from loadmaster.interfaces.cli.main import cli
from loadmaster.machine.profiles import load_profile
from loadmaster.plan.codec import plan_from_json
from loadmaster.plan.types import CPU, Plan
from loadmaster.units import GIB

END = """
---

Written by `python -m scripts.guides` from the tool's own answers; change those, not this page. No engine was
asked, so compute buffers are bounds: with an engine built the same commands leave up to some hundred MiB more for
weights. Speeds are predictions from nominal bandwidths; `docs/published.md` says how far such predictions are from
published measurements.
"""
GB = 1e9

# What a page leaves out of the output: the same on each of them, and said once at the end.
_LEFT_OUT = ("note: a shape:", "note: compute buffers are bounds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One command and what came of it."""

    command: str
    plan: Plan | None
    refusal: str  # the error's text; empty for a plan

    @property
    def text(self) -> str:
        """Command and output as a code block."""
        output = self.refusal if self.plan is None else _shown(self.plan)
        return f"```\n$ {self.command}\n{output.rstrip()}\n```"

    @property
    def made(self) -> Plan:
        """The plan of a command that must have one."""
        assert self.plan is not None, f"{self.command}: {self.refusal}"
        return self.plan

    @property
    def decode_tok_s(self) -> float:
        speed = self.made.predicted.decode_tok_s
        assert speed is not None
        return speed

    def gib(self, device: str, *kinds: str) -> float:
        """GiB of some kinds on a device, mapped pages with the weights."""
        found = self.made.device(device)
        items = sum(item.bytes for item in found.items if item.kind in kinds)
        return (items + (found.mapped_bytes if "model" in kinds else 0)) / GIB

    @property
    def ram_gib(self) -> float:
        """Weights in RAM, which every token waits for."""
        return self.gib(CPU, "model")


def _shown(plan: Plan) -> str:
    text = render.plan_text(plan)
    kept = [line for line in text.splitlines() if not line.startswith(_LEFT_OUT)]
    return "\n".join(kept)


def ram_gb_s(machine: str) -> float:
    """The RAM of a profile in 10⁹ bytes per second."""
    bandwidth = load_profile(machine).ram.bandwidth_bytes_s
    assert bandwidth is not None
    return bandwidth / GB


@cache
def ask(command: str) -> Answer:
    """Run `loadmaster …` in this process."""
    words = shlex.split(command)[1:]
    done = CliRunner().invoke(cli, [*words, "--json"])
    if done.exit_code == 0 and done.exception is None:
        return Answer(command=command, plan=plan_from_json(json.loads(done.stdout)), refusal="")
    assert isinstance(done.exception, Exception)
    return Answer(command=command, plan=None, refusal=describe(done.exception).to_text())


@cache
def compare(command: str) -> dict[str, Any]:
    """Run `loadmaster plan --compare …` for its JSON."""
    done = CliRunner().invoke(cli, [*shlex.split(command)[1:], "--json"])
    assert done.exit_code == 0, done.exception
    content: dict[str, Any] = json.loads(done.stdout)
    return content


def printed(command: str) -> str:
    """Command and output as a code block, as the terminal shows it."""
    done = CliRunner().invoke(cli, shlex.split(command)[1:])
    text = done.stdout
    if done.exception is not None:
        assert isinstance(done.exception, Exception)
        text += "\n" + describe(done.exception).to_text()
    return f"```\n$ {command}\n{text.rstrip()}\n```"
