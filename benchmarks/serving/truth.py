"""Whether streams of the real engine say what they say alone, whatever happened beside them.

Greedy tokens may differ where two are equally likely and the composition of a step changed. So
each stream is fed again, alone and token by token: every token has to be the likeliest there, or
as near to it as the rounding of F16 allows.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gguf

from benchmarks.batching.solo import token_gaps
from benchmarks.serving.client import Seen
from benchmarks.serving.server import Server
from loadmaster.engine import builds

# The demo model in F16, where the kernels for one row and for many agree.
EXACT_DEMO = Path(__file__).parents[2] / "tests" / "data" / "demo" / "demo-f16.gguf"
WRONG_LOGITS = 0.05
N_CTX = 2048


async def prompt_of(server: Server, body: Mapping[str, Any]) -> list[int]:
    """The tokens that the server makes of a request's messages."""
    prompt = (await server.ask("POST", "/apply-template", {"messages": body["messages"]}))[1]
    asked = {"content": prompt["prompt"], "add_special": False, "parse_special": True}
    tokens: list[int] = (await server.ask("POST", "/tokenize", asked))[1]["tokens"]
    return tokens


def wrong_streams(streams: Sequence[tuple[list[int], Seen]]) -> tuple[int, int, float]:
    """How many streams have a token that is not the likeliest; tokens checked; the largest gap."""
    requests = [
        {"prompt": prompt, "output": output}
        for prompt, seen in streams
        if (output := list(_known(seen.tokens)))
    ]
    gaps = token_gaps(builds.find_build(), EXACT_DEMO, N_CTX, requests)
    wrong = sum(max(row) > WRONG_LOGITS for row in gaps)
    return wrong, sum(map(len, gaps)), max((max(row) for row in gaps), default=0.0)


def _known(tokens: Sequence[bytes]) -> Iterator[int]:
    """Up to the first token that has no text: which one it was cannot be told."""
    for raw in tokens:
        token = _token_ids().get(raw)
        if token is None:
            return
        yield token


@cache
def _token_ids() -> dict[bytes, int]:
    """Tokens by their bytes; in a vocabulary of bytes that were merged, each is there once."""
    fields = gguf.GGUFReader(EXACT_DEMO).fields
    texts: list[str] = fields["tokenizer.ggml.tokens"].contents()
    byte_of = _byte_of()
    return {
        bytes(byte_of[char] for char in text): token
        for token, text in enumerate(texts)
        if all(char in byte_of for char in text)
    }


def _byte_of() -> dict[str, int]:
    """GPT-2's printable stand-ins of bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    stand_ins = {chr(256 + index): byte for index, byte in enumerate(rest)}
    return {**{chr(byte): byte for byte in plain}, **stand_ins}
