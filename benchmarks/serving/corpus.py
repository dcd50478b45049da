"""Hand-made input: bodies that are no JSON or odd JSON, and bytes that are no HTTP or odd HTTP."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MIB = 1 << 20
CHAT = b"/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "go on"}]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Bytes to send, and how."""

    name: str
    pieces: tuple[bytes, ...]
    pause_s: float = 0.0
    leave: bool = False
    answered: bool = True  # whether the server owes an answer
    statuses: tuple[int, ...] = ()  # of the answer; empty: any but 5xx


def posted(path: bytes, body: bytes, *lines: bytes) -> bytes:
    """A whole request."""
    head = [
        b"POST " + path + b" HTTP/1.1",
        b"Host: localhost",
        b"Connection: close",
        b"Content-Length: " + str(len(body)).encode(),
        *lines,
        b"",
        b"",
    ]
    return b"\r\n".join(head) + body


def _nested(depth: int, opening: str = "[", closing: str = "]") -> bytes:
    return f'{{"model":"demo","messages":{opening * depth}1{closing * depth}}}'.encode()


def bodies() -> dict[str, bytes]:
    """Bodies for every route that takes JSON. Each is refused, or means something harmless."""
    chat = json.dumps({"model": "demo", "messages": MESSAGES, "max_tokens": 4})[:-1]
    return {
        "empty": b"",
        "null": b"null",
        "list": b"[]",
        "text": b'"x"',
        "number": b"1",
        "cut": b"{",
        "two values": b"{}{}",
        "single quotes": b"{'a':1}",
        "comment": b"{}//",
        "trailing": b'{"a":1,}',
        "invalid UTF-8": b'{"model":"\xff\xfe"}',
        "overlong": b'{"model":"\xc0\xaf"}',
        "surrogate in UTF-8": b'{"model":"\xed\xa0\x80"}',
        "UTF-8 mark": b"\xef\xbb\xbf{}",
        "UTF-16": chat.encode("utf-16"),
        "UTF-32": chat.encode("utf-32"),
        "NUL": b"\x00" * 1000,
        "NaN": b'{"model":"demo","temperature":NaN}',
        "Infinity": b'{"a":-Infinity}',
        "1e999": f'{chat},"temperature":1e999,"seed":1e999}}'.encode(),
        "4,300 digits": f'{chat},"seed":{"9" * 4300}}}'.encode(),
        "4,301 digits": f'{chat},"seed":{"9" * 4301}}}'.encode(),
        "1,000,000 digits": f'{chat},"seed":{"9" * MIB}}}'.encode(),
        "long fraction": f'{chat},"temperature":0.{"1" * 100_000}}}'.encode(),
        "minus zero": f'{chat},"temperature":-0.0,"seed":-0}}'.encode(),
        "64 deep": _nested(63),
        "65 deep": _nested(65),
        "10,000 deep": _nested(10_000),
        "1,000,000 deep": _nested(MIB),
        "objects deep": _nested(10_000, '{"a":', "}"),
        "half a pair": f'{chat},"user":"\\ud800"}}'.encode(),
        "half a pair, asked": b'{"model":"demo","prompt":"\\udc00","input":"\\udc00",'
        b'"content":"\\ud83d","messages":[{"role":"user","content":"\\ud83d"}],"max_tokens":4}',
        "escaped NUL": b'{"model":"demo","prompt":"\\u0000",'
        b'"messages":[{"role":"user","content":"\\u0000"}]}',
        "same name twice": b'{"model":"x","model":"demo","messages":[],"messages":{},'
        b'"prompt":1,"prompt":2}',
        "many names": json.dumps({f"k{i}": i for i in range(100_000)}).encode(),
        "long name": json.dumps({"k" * MIB: 1, "model": "demo"}).encode(),
        "odd names": b'{"":1,"__proto__":{},"__class__":1,"\\u0000":2,"model ":3,"constructor":{}}',
        "long model": json.dumps({"model": "m" * MIB, "messages": MESSAGES}).encode(),
        "path as model": json.dumps({"model": "../../etc/passwd", "messages": MESSAGES}).encode(),
        "address as model": json.dumps(
            {"model": "http://127.0.0.1:1/x.gguf", "input": "x"}
        ).encode(),
        "1,000,000 zeros": json.dumps({"model": "demo", "prompt": [0] * MIB}).encode(),
        "3,000,000 zeros": json.dumps({"model": "demo", "prompt": [0] * 2_500_000}).encode(),
        "100,000 prompts": json.dumps({"model": "demo", "prompt": ["x"] * 100_000}).encode(),
        "2,048 prompts of 8": json.dumps(
            {"model": "demo", "prompt": ["x"] * 2048, "n": 8}
        ).encode(),
        "200,000 messages": json.dumps({"model": "demo", "messages": MESSAGES * 200_000}).encode(),
        "200,000 parts": json.dumps(
            {
                "model": "demo",
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "x"}] * 200_000}
                ],
            }
        ).encode(),
        "7 MiB of text": json.dumps(
            {
                "model": "demo",
                "prompt": "x" * (7 * MIB),
                "content": "x" * 9,
                "messages": [{"role": "user", "content": "y" * 1000}],
            }
        ).encode(),
        "9 MiB": b" " * (9 * MIB),
        **_far_out(chat),
    }


def _far_out(chat: str) -> dict[str, bytes]:
    """Values that are in range nowhere."""
    changes: dict[str, Any] = {
        "logit_bias digits": {"logit_bias": {"9" * 5000: 1}},
        "logit_bias arabic": {"logit_bias": {"\u0663": 1, "\u00b2": 1, "-1": 1}},
        "logit_bias many": {"logit_bias": {str(i): 1 for i in range(50_000)}},
        "stops": {"stop": ["x"] * 100_000},
        "long stop": {"stop": "s" * MIB},
        "n": {"n": 10**9},
        "n of zero": {"n": 0},
        "n as float": {"n": 1e300},
        "max_tokens": {"max_tokens": 10**30},
        "top_logprobs": {"logprobs": True, "top_logprobs": 99},
        "keep_alive": {"keep_alive": 1e300},
        "keep_alive text": {"keep_alive": "9e999h"},
        "keep_alive NaN": {"keep_alive": "nan"},
        "keep_alive list": {"keep_alive": [1]},
        "images": {"images": ["http://127.0.0.1:1/x.png"]},
        "image part": {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}
                    ],
                }
            ]
        },
        "image of a file": {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}],
                }
            ]
        },
        "schema from the net": {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"schema": {"$ref": "http://127.0.0.1:1/x.json"}},
            }
        },
        "schema of Infinity": {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"schema": {"type": "number", "minimum": 1e308 * 10}},
            }
        },
        "999 tools": {"tools": [{"type": "function", "function": {"name": "f"}}] * 999},
    }
    return {
        name: f"{chat},{json.dumps(change)[1:]}".replace("Infinity", "1e999").encode()
        for name, change in changes.items()
    }


def http_cases() -> Iterator[Case]:
    """Bytes on one connection each."""
    body = json.dumps({"model": "demo", "messages": MESSAGES, "max_tokens": 4}).encode()
    whole = posted(CHAT, body)
    head, _, _ = whole.partition(b"\r\n\r\n")
    plain = b"POST " + CHAT + b" HTTP/1.1\r\nHost: localhost\r\n"
    chunked = plain + b"Transfer-Encoding: chunked\r\n\r\n"
    get = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"

    def case(name: str, *pieces: bytes, **changes: Any) -> Case:
        return Case(name=name, pieces=pieces, **changes)

    yield case("nothing", leave=True, answered=False)
    yield case("a byte", b"G", leave=True, answered=False)
    yield case("half a head", get, leave=True, answered=False)
    yield case(
        "TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 500, leave=True
    )
    yield case("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", leave=True)
    yield case("HTTP/0.9", b"GET /\r\n\r\n", statuses=(400,))
    yield case("HTTP/9.9", get.replace(b"1.1", b"9.9") + b"\r\n")
    yield case("line feeds alone", get.replace(b"\r\n", b"\n") + b"\n", leave=True)
    yield case("no colon", get + b"nonsense\r\n\r\n", statuses=(400,))
    yield case("NUL in a header", get + b"x: \x00\r\n\r\n", statuses=(400,))
    yield case("bytes in a header", get + b"x: \xff\xfe\x80\r\n\r\n")
    yield case("10,000 headers", get + b"x: y\r\n" * 10_000 + b"\r\n")
    yield case("1 MiB of header", get + b"x: " + b"y" * MIB + b"\r\n\r\n", statuses=(400, 431))
    yield case("1 MiB of target", b"GET /" + b"a" * MIB + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
    yield case(
        "60 KB of target", b"GET /" + b"a" * 60_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
    )
    yield case("odd target", b"GET /%00%ff%ed%a0%80/..%2f HTTP/1.1\r\nHost: localhost\r\n\r\n")
    yield case("query of bytes", b"GET /props?model=%ff%00 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    yield case(
        "since", b"GET /loadmaster/v1/events?since=%c2%b2 HTTP/1.1\r\nHost: localhost\r\n\r\n"
    )
    yield case(
        "last-event-id",
        b"GET /loadmaster/v1/events HTTP/1.1\r\nHost: localhost\r\nLast-Event-ID: \xb2\r\n\r\n",
        statuses=(400,),
    )
    yield case(
        "long event id",
        b"GET /loadmaster/v1/events HTTP/1.1\r\nHost: localhost\r\n"
        b"Last-Event-ID: " + b"9" * 5000 + b"\r\n\r\n",
        statuses=(400,),
    )
    yield case("model of bytes", b"GET /v1/models/%ff%00%0a HTTP/1.1\r\nHost: localhost\r\n\r\n")
    yield case(
        "websocket",
        get + b"Upgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
    )
    yield case("h2c", get + b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n")
    yield case(
        "length too long, and gone",
        head.replace(b": " + str(len(body)).encode(), b": 999"),
        b"\r\n\r\n" + body,
        leave=True,
        answered=False,
    )
    yield case("length too short", plain + b"Content-Length: 5\r\n\r\n" + body, statuses=(400,))
    for value in (
        b"-1",
        b"+2",
        b"0x10",
        b"1e3",
        b"1,1",
        b"\xb2",
        b"9" * 30,
        b"9" * 6000,
        b" ",
        b"2 2",
    ):
        shown = value.decode("latin-1")[:10]
        yield case(
            f"length {shown!r}", plain + b"Content-Length: " + value + b"\r\n\r\n{}", leave=True
        )
    yield case(
        "a length of 1 TiB", plain + b"Content-Length: 1099511627776\r\n\r\n", statuses=(413,)
    )
    yield case("two lengths", plain + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{} ")
    yield case(
        "length and chunks",
        plain + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        leave=True,
    )
    yield case(
        "two encodings", plain + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", leave=True
    )
    yield case("gzip", posted(CHAT, b"\x1f\x8b\x08" + b"\x00" * 30, b"Content-Encoding: gzip"))
    yield case("chunk of no size", chunked + b"zz\r\n{}\r\n0\r\n\r\n", statuses=(400,))
    yield case("chunk of 2^70", chunked + b"4000000000000000000\r\n{}", leave=True, answered=False)
    yield case(
        "chunk extension", chunked + b"2;" + b"x" * 60_000 + b"\r\n{}\r\n0\r\n\r\n", leave=True
    )
    yield case("trailers", chunked + b"2\r\n{}\r\n0\r\n" + b"a: b\r\n" * 3000 + b"\r\n", leave=True)
    yield case("20,000 chunks", chunked + b"1\r\n \r\n" * 20_000 + b"0\r\n\r\n", statuses=(400,))
    yield case(
        "9 MiB of chunks", chunked, *[b"10000\r\n" + b" " * 65536 + b"\r\n"] * 144, statuses=(413,)
    )
    yield case(
        "chunks without end",
        chunked,
        *[b"2\r\n  \r\n"] * 20,
        pause_s=0.02,
        answered=False,
        leave=True,
    )
    yield case("a head in pieces", *[bytes([byte]) for byte in whole], pause_s=0.001)
    yield case(
        "expects 100",
        plain + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n",
        b"{}",
        pause_s=0.05,
    )
    yield from _uploads()
    yield case("50 at once", b"".join([get + b"\r\n"] * 50), statuses=(200,))
    yield case(
        "200 posts at once",
        b"".join([posted(CHAT, b"{}").replace(b"Connection: close\r\n", b"")] * 200),
        statuses=(400,),
    )
    yield case("a request in a body", posted(CHAT, b"{}") + get + b"\r\n", statuses=(400,))


def _uploads() -> Iterator[Case]:
    """Forms that are none, or that lie."""
    kind = b"Content-Type: multipart/form-data; boundary=b"
    part = b'--b\r\nContent-Disposition: form-data; name="'
    purpose = part + b'purpose"\r\n\r\nbatch\r\n'
    file = part + b'file"; filename="x.jsonl"\r\n\r\n'
    forms = {
        "empty": b"",
        "no end": purpose + file + b"{}",
        "no file": purpose + b"--b--\r\n",
        "no purpose": file + b"{}\r\n--b--\r\n",
        "two files": file + b"{}\r\n" + file + b"{}\r\n--b--\r\n",
        "other boundary": (purpose + file).replace(b"--b", b"--c"),
        "no name": b"--b\r\n\r\nx\r\n--b--\r\n",
        "path as a name": purpose
        + file.replace(b"x.jsonl", b"../../../tmp/x")
        + b"{}\r\n--b--\r\n",
        "bytes as a name": purpose + file.replace(b"x.jsonl", b"\xff\x00\xfe") + b"{}\r\n--b--\r\n",
        "long field": part + b'purpose"\r\n\r\n' + b"b" * MIB + b"\r\n--b--\r\n",
        "10,000 fields": (part + b'x"\r\n\r\ny\r\n') * 10_000 + b"--b--\r\n",
        "long head": b"--b\r\n" + b"x: " + b"y" * MIB + b"\r\n\r\n\r\n--b--\r\n",
        "bytes": purpose + file + bytes(range(256)) * 100 + b"\r\n--b--\r\n",
    }
    for name, body in forms.items():
        yield Case(name=f"upload: {name}", pieces=(posted(b"/v1/files", body, kind),))
    for line in (
        b"Content-Type: multipart/form-data",
        b"Content-Type: multipart/form-data; boundary=" + b"b" * 5000,
        b"Content-Type: multipart/form-data; boundary=\xff",
        b"Content-Type: text/plain",
    ):
        yield Case(name=f"upload as {line[14:60]!r}", pieces=(posted(b"/v1/files", purpose, line),))
