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


def _said(content: object) -> dict[str, object]:
    return {"role": "user", "content": content}


def _image(url: str) -> dict[str, object]:
    return _said([{"type": "image_url", "image_url": {"url": url}}])


def _schema(schema: dict[str, object]) -> dict[str, object]:
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}


# -- bodies


_OPEN_CHAT = json.dumps({"model": "demo", "messages": MESSAGES, "max_tokens": 4})[:-1]
_NO_OBJECTS = {
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
    "UTF-16": _OPEN_CHAT.encode("utf-16"),
    "UTF-32": _OPEN_CHAT.encode("utf-32"),
    "NUL": b"\x00" * 1000,
    "NaN": b'{"model":"demo","temperature":NaN}',
    "Infinity": b'{"a":-Infinity}',
}
_ODD_OBJECTS = {
    "half a pair, asked": b'{"model":"demo","prompt":"\\udc00","input":"\\udc00",'
    b'"content":"\\ud83d","messages":[{"role":"user","content":"\\ud83d"}],"max_tokens":4}',
    "escaped NUL": b'{"model":"demo","prompt":"\\u0000",'
    b'"messages":[{"role":"user","content":"\\u0000"}]}',
    "same name twice": b'{"model":"x","model":"demo","messages":[],"messages":{},'
    b'"prompt":1,"prompt":2}',
    "odd names": b'{"":1,"__proto__":{},"__class__":1,"\\u0000":2,"model ":3,"constructor":{}}',
}
# Members behind those of a chat that would be answered.
_MEMBERS = {
    "1e999": '"temperature":1e999,"seed":1e999',
    "4,300 digits": f'"seed":{"9" * 4300}',
    "4,301 digits": f'"seed":{"9" * 4301}',
    "1,000,000 digits": f'"seed":{"9" * MIB}',
    "long fraction": f'"temperature":0.{"1" * 100_000}',
    "minus zero": '"temperature":-0.0,"seed":-0',
    "half a pair": '"user":"\\ud800"',
}
# The same, by their values: in range nowhere.
_FAR_OUT: dict[str, dict[str, Any]] = {
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
    "image part": {"messages": [_image("http://127.0.0.1:1/x.png")]},
    "image of a file": {"messages": [_image("file:///etc/passwd")]},
    "schema from the net": _schema({"$ref": "http://127.0.0.1:1/x.json"}),
    "schema of Infinity": _schema({"type": "number", "minimum": 1e308 * 10}),
    "999 tools": {"tools": [{"type": "function", "function": {"name": "f"}}] * 999},
}
# Arrays in arrays, as messages.
_DEPTHS = {"64 deep": 63, "65 deep": 65, "10,000 deep": 10_000, "1,000,000 deep": MIB}


def bodies() -> dict[str, bytes]:
    """Bodies for every route that takes JSON. Each is refused, or means something harmless."""
    far_out = {name: json.dumps(change)[1:-1] for name, change in _FAR_OUT.items()}
    members = _MEMBERS | {n: text.replace("Infinity", "1e999") for n, text in far_out.items()}
    return {
        **_NO_OBJECTS,
        **_ODD_OBJECTS,
        **{name: f"{_OPEN_CHAT},{text}}}".encode() for name, text in members.items()},
        **{name: _nested(depth) for name, depth in _DEPTHS.items()},
        "objects deep": _nested(10_000, '{"a":', "}"),
        **{name: json.dumps(value).encode() for name, value in _large().items()},
        "9 MiB": b" " * (9 * MIB),
    }


def _nested(depth: int, opening: str = "[", closing: str = "]") -> bytes:
    return f'{{"model":"demo","messages":{opening * depth}1{closing * depth}}}'.encode()


def _large() -> dict[str, dict[str, Any]]:
    """Objects with too many of something, or too long ones."""
    part = {"type": "text", "text": "x"}
    return {
        "many names": {f"k{i}": i for i in range(100_000)},
        "long name": {"k" * MIB: 1, "model": "demo"},
        "long model": {"model": "m" * MIB, "messages": MESSAGES},
        "path as model": {"model": "../../etc/passwd", "messages": MESSAGES},
        "address as model": {"model": "http://127.0.0.1:1/x.gguf", "input": "x"},
        "1,000,000 zeros": {"model": "demo", "prompt": [0] * MIB},
        "3,000,000 zeros": {"model": "demo", "prompt": [0] * 2_500_000},
        "100,000 prompts": {"model": "demo", "prompt": ["x"] * 100_000},
        "2,048 prompts of 8": {"model": "demo", "prompt": ["x"] * 2048, "n": 8},
        "200,000 messages": {"model": "demo", "messages": MESSAGES * 200_000},
        "200,000 parts": {"model": "demo", "messages": [_said([part] * 200_000)]},
        "7 MiB of text": {
            "model": "demo", "prompt": "x" * (7 * MIB), "content": "x" * 9,
            "messages": [_said("y" * 1000)],
        },
    }  # fmt: skip


# -- bytes on one connection


_BODY = json.dumps({"model": "demo", "messages": MESSAGES, "max_tokens": 4}).encode()
_WHOLE = posted(CHAT, _BODY)
_LENGTH = f": {len(_BODY)}".encode()
_GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
_POST = b"POST " + CHAT + b" HTTP/1.1\r\nHost: localhost\r\n"
_CHUNKED = _POST + b"Transfer-Encoding: chunked\r\n\r\n"
_HOST = b" HTTP/1.1\r\nHost: localhost\r\n"
_EVENTS = b"GET /loadmaster/v1/events"


def _case(name: str, *pieces: bytes, **changes: Any) -> Case:
    return Case(name=name, pieces=pieces, **changes)


_HEADS = (
    _case("nothing", leave=True, answered=False),
    _case("a byte", b"G", leave=True, answered=False),
    _case("half a head", _GET, leave=True, answered=False),
    _case("TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), leave=True),
    _case("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", leave=True),
    _case("HTTP/0.9", b"GET /\r\n\r\n", statuses=(400,)),
    _case("HTTP/9.9", _GET.replace(b"1.1", b"9.9") + b"\r\n"),
    _case("line feeds alone", _GET.replace(b"\r\n", b"\n") + b"\n", leave=True),
    _case("no colon", _GET + b"nonsense\r\n\r\n", statuses=(400,)),
    _case("NUL in a header", _GET + b"x: \x00\r\n\r\n", statuses=(400,)),
    _case("bytes in a header", _GET + b"x: \xff\xfe\x80\r\n\r\n"),
    _case("10,000 headers", _GET + b"x: y\r\n" * 10_000 + b"\r\n"),
    _case("1 MiB of header", _GET + b"x: " + b"y" * MIB + b"\r\n\r\n", statuses=(400, 431)),
    _case("1 MiB of target", b"GET /" + b"a" * MIB + _HOST + b"\r\n"),
    _case("60 KB of target", b"GET /" + b"a" * 60_000 + _HOST + b"\r\n"),
    _case("odd target", b"GET /%00%ff%ed%a0%80/..%2f" + _HOST + b"\r\n"),
    _case("query of bytes", b"GET /props?model=%ff%00" + _HOST + b"\r\n"),
    _case("since", _EVENTS + b"?since=%c2%b2" + _HOST + b"\r\n"),
    _case("last-event-id", _EVENTS + _HOST + b"Last-Event-ID: \xb2\r\n\r\n", statuses=(400,)),
    _case("long event id", _EVENTS + _HOST + b"Last-Event-ID: " + b"9" * 5000 + b"\r\n\r\n",
          statuses=(400,)),
    _case("model of bytes", b"GET /v1/models/%ff%00%0a" + _HOST + b"\r\n"),
    _case("websocket", _GET + b"Upgrade: websocket\r\nConnection: Upgrade\r\n"
          b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"),
    _case("h2c", _GET + b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n"),
)  # fmt: skip
# What may stand behind `Content-Length: ` and is no length, or not this body's.
_LENGTHS = (
    b"-1", b"+2", b"0x10", b"1e3", b"1,1", b"\xb2", b"9" * 30, b"9" * 6000, b" ", b"2 2",
)  # fmt: skip
_BODIES_THAT_LIE = (
    _case("length too long, and gone", _WHOLE.partition(b"\r\n\r\n")[0].replace(_LENGTH, b": 999"),
          b"\r\n\r\n" + _BODY, leave=True, answered=False),
    _case("length too short", _POST + b"Content-Length: 5\r\n\r\n" + _BODY, statuses=(400,)),
    *(
        _case(f"length {value.decode('latin-1')[:10]!r}",
              _POST + b"Content-Length: " + value + b"\r\n\r\n{}", leave=True)
        for value in _LENGTHS
    ),
    _case("a length of 1 TiB", _POST + b"Content-Length: 1099511627776\r\n\r\n", statuses=(413,)),
    _case("two lengths", _POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{} "),
    _case("length and chunks", _POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
          b"2\r\n{}\r\n0\r\n\r\n", leave=True),
    _case("two encodings", _POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
          leave=True),
    _case("gzip", posted(CHAT, b"\x1f\x8b\x08" + bytes(30), b"Content-Encoding: gzip")),
    _case("chunk of no size", _CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n", statuses=(400,)),
    _case("chunk of 2^70", _CHUNKED + b"4000000000000000000\r\n{}", leave=True, answered=False),
    _case("chunk extension", _CHUNKED + b"2;" + b"x" * 60_000 + b"\r\n{}\r\n0\r\n\r\n", leave=True),
    _case("trailers", _CHUNKED + b"2\r\n{}\r\n0\r\n" + b"a: b\r\n" * 3000 + b"\r\n", leave=True),
    _case("20,000 chunks", _CHUNKED + b"1\r\n \r\n" * 20_000 + b"0\r\n\r\n", statuses=(400,)),
    _case("9 MiB of chunks", _CHUNKED, *[b"10000\r\n" + b" " * 65536 + b"\r\n"] * 144,
          statuses=(413,)),
)  # fmt: skip
_IN_PIECES = (
    _case("chunks without end", _CHUNKED, *[b"2\r\n  \r\n"] * 20, pause_s=0.02, answered=False,
          leave=True),
    _case("a head in pieces", *[bytes([byte]) for byte in _WHOLE], pause_s=0.001),
    _case("expects 100", _POST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n", b"{}",
          pause_s=0.05),
)  # fmt: skip
_MORE_THAN_ONE = (
    _case("50 at once", b"".join([_GET + b"\r\n"] * 50), statuses=(200,)),
    _case("200 posts at once",
          b"".join([posted(CHAT, b"{}").replace(b"Connection: close\r\n", b"")] * 200),
          statuses=(400,)),
    _case("a request in a body", posted(CHAT, b"{}") + _GET + b"\r\n", statuses=(400,)),
)  # fmt: skip
_PART = b'--b\r\nContent-Disposition: form-data; name="'
_PURPOSE = _PART + b'purpose"\r\n\r\nbatch\r\n'
_FILE = _PART + b'file"; filename="x.jsonl"\r\n\r\n'
_END = b"\r\n--b--\r\n"
_FORMS = {
    "empty": b"",
    "no end": _PURPOSE + _FILE + b"{}",
    "no file": _PURPOSE + b"--b--\r\n",
    "no purpose": _FILE + b"{}" + _END,
    "two files": _FILE + b"{}\r\n" + _FILE + b"{}" + _END,
    "other boundary": (_PURPOSE + _FILE).replace(b"--b", b"--c"),
    "no name": b"--b\r\n\r\nx" + _END,
    "path as a name": _PURPOSE + _FILE.replace(b"x.jsonl", b"../../../tmp/x") + b"{}" + _END,
    "bytes as a name": _PURPOSE + _FILE.replace(b"x.jsonl", b"\xff\x00\xfe") + b"{}" + _END,
    "long field": _PART + b'purpose"\r\n\r\n' + b"b" * MIB + _END,
    "10,000 fields": (_PART + b'x"\r\n\r\ny\r\n') * 10_000 + b"--b--\r\n",
    "long head": b"--b\r\n" + b"x: " + b"y" * MIB + b"\r\n\r\n" + _END,
    "bytes": _PURPOSE + _FILE + bytes(range(256)) * 100 + _END,
}
_KINDS = (
    b"multipart/form-data",
    b"multipart/form-data; boundary=" + b"b" * 5000,
    b"multipart/form-data; boundary=\xff",
    b"text/plain",
)


def http_cases() -> Iterator[Case]:
    """Bytes that are no HTTP, or odd HTTP."""
    yield from _HEADS
    yield from _BODIES_THAT_LIE
    yield from _IN_PIECES
    yield from _uploads()
    yield from _MORE_THAN_ONE


def _uploads() -> Iterator[Case]:
    """Forms that are none, or that lie."""
    kind = b"Content-Type: multipart/form-data; boundary=b"
    for name, body in _FORMS.items():
        yield _case(f"upload: {name}", posted(b"/v1/files", body, kind))
    for value in _KINDS:
        line = b"Content-Type: " + value
        yield _case(f"upload as {value[:46]!r}", posted(b"/v1/files", _PURPOSE, line))
