"""Requests made from the server's own OpenAPI document, and answers held to it."""

import json
import random
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import quote, urlencode

from benchmarks.serving.bodies import TEXTS, Bodies, Operation, operations
from benchmarks.serving.conform import complaints
from benchmarks.serving.raw import LIMIT_S

MODELS = ("demo", "embed")
THREADS = 4
_COSTLY = ("/models/load", "/models/unload", "/loadmaster/v1/plan", "/loadmaster/v1/doctor")
_FEW = 12
_ENDLESS = "/loadmaster/v1/events"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request."""

    operation: Operation
    target: str
    body: bytes | None = None


@dataclass(slots=True)
class Verdict:
    """What the answers showed."""

    asked: int = 0
    answered_200: int = 0
    server_errors: list[str] = field(default_factory=list)
    undocumented: list[str] = field(default_factory=list)  # a status that the document has not
    nonconforming: list[str] = field(default_factory=list)  # a body that is not as it says
    hung: list[str] = field(default_factory=list)


def fuzz(port: int, seed: int, n_wrong: int, n_soup: int, n_odd: int = len(TEXTS)) -> Verdict:
    """Ask every operation: so many bodies with one field wrong, and with several; so many odd texts
    in paths and queries."""
    connection = HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    connection.request("GET", "/openapi.json")
    document = json.loads(connection.getresponse().read())
    connection.close()
    verdict, dice = Verdict(), random.Random(seed)
    asked = [a for o in operations(document) for a in _requests(o, dice, n_wrong, n_soup, n_odd)]
    dice.shuffle(asked)
    lock = threading.Lock()
    with ThreadPoolExecutor(THREADS) as pool:
        shares = [asked[i::THREADS] for i in range(THREADS)]
        list(pool.map(lambda share: _ask_all(port, document, share, verdict, lock), shares))
    return verdict


def _requests(
    operation: Operation, dice: random.Random, n_wrong: int, n_soup: int, n_odd: int
) -> Iterator[Asked]:
    schema = operation.body
    for target in _targets(operation, n_odd):
        yield Asked(operation=operation, target=target, body=b"{}" if schema else None)
    if schema is None:
        return
    source = Bodies(schema, dice, MODELS)
    n_right = n_soup // 4
    found = [source.right(all_fields=dice.random() < 0.3) for _ in range(n_right)]
    wrong = list(source.wrong())
    found += dice.sample(wrong, min(n_wrong, len(wrong)))
    found += [source.soup() for _ in range(n_soup)]
    if operation.path in _COSTLY:
        found = dice.sample(found, min(_FEW, len(found)))
    for body in found:
        target = _targets(operation, 0)[0]
        yield Asked(operation=operation, target=target, body=json.dumps(body).encode())


def _targets(operation: Operation, n_odd: int) -> list[str]:
    """The path with odd texts in its places, and odd queries."""
    if operation.in_path:
        names = ("demo", *filter(None, TEXTS[:n_odd]))
        return [_filled(operation, quote(name, safe="")) for name in names]
    odd = [
        f"{operation.path}?{urlencode({name: text})}"
        for name in operation.queries
        for text in ("demo", *TEXTS[:n_odd])
    ]
    return [operation.path, *odd]


def _filled(operation: Operation, value: str) -> str:
    path = operation.path
    for name in operation.in_path:
        path = path.replace(f"{{{name}}}", value)
    return path


def _ask_all(
    port: int,
    document: Mapping[str, Any],
    share: list[Asked],
    verdict: Verdict,
    lock: threading.Lock,
) -> None:
    connection = HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    for asked in share:
        try:
            status, media, body = _ask(connection, asked)
        except TimeoutError:
            with lock:
                verdict.asked += 1
                verdict.hung.append(_shown(asked, 0, b""))
            connection.close()
            continue
        except (HTTPException, OSError) as error:
            with lock:
                verdict.asked += 1
                verdict.server_errors.append(_shown(asked, 0, repr(error).encode()))
            connection.close()
            continue
        with lock:
            _judge(verdict, document, asked, status, media, body)
    connection.close()


def _ask(connection: HTTPConnection, asked: Asked) -> tuple[int, str, bytes]:
    headers = {"Content-Type": "application/json"} if asked.body is not None else {}
    connection.request(asked.operation.method, asked.target, asked.body, headers)
    response = connection.getresponse()
    media = response.headers.get_content_type()
    if asked.operation.path == _ENDLESS and response.status == 200:
        connection.close()  # it goes on until the client leaves
        return response.status, media, b""
    return response.status, media, response.read()


def _judge(
    verdict: Verdict,
    document: Mapping[str, Any],
    asked: Asked,
    status: int,
    media: str,
    body: bytes,
) -> None:
    shown = _shown(asked, status, body)
    verdict.asked += 1
    verdict.answered_200 += status == 200
    if status >= 500 or b'"server_error"' in body or b'"api_error"' in body:
        verdict.server_errors.append(shown)
    spec = asked.operation.spec["responses"].get(str(status))
    if spec is None:
        verdict.undocumented.append(shown)
        return
    if media not in spec["content"]:
        verdict.nonconforming.append(f"{media}: {shown}")
    elif media == "application/json":
        schema = spec["content"][media]["schema"]
        found = next(complaints(_json(body), schema, document), None)
        if found is not None:
            verdict.nonconforming.append(f"{found}: {shown}")
    elif media in ("text/event-stream", "application/x-ndjson"):
        verdict.nonconforming += [f"{c}: {shown}" for c in _of_stream(media, body)]


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return object()  # of no type that a schema names


def _of_stream(media: str, body: bytes) -> Iterator[str]:
    """Every event is JSON, and text is whole characters."""
    is_lines = media == "application/x-ndjson"
    for line in body.decode("utf-8").split("\n"):
        text = line if is_lines else line.removeprefix("data: ")
        if not text or (not is_lines and (not line.startswith("data: ") or text == "[DONE]")):
            continue
        try:
            json.loads(text)
        except ValueError:
            yield f"an event is no JSON: {text[:80]}"


def _shown(asked: Asked, status: int, body: bytes) -> str:
    sent = (asked.body or b"")[:300].decode()
    told = body[:300].decode("utf-8", "replace")
    return f"{asked.operation.method} {asked.target[:80]} {sent} -> {status} {told}"
