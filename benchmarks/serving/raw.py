"""HTTP by hand: bytes to a port of loopback, and what comes back, however malformed either is."""

import socket
import time
from dataclasses import dataclass

LIMIT_S = 30.0  # a request without an answer by then hangs
_SHOWN = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The first answer on a connection; no status where the server closed it without one."""

    status: int | None = None
    head: bytes = b""
    body: bytes = b""
    seconds: float = 0.0
    hung: bool = False

    @property
    def shown(self) -> str:
        text = self.body[:_SHOWN].decode("utf-8", "replace")
        return f"{self.status} {text}"

    def header(self, name: str) -> str:
        """The value of a header, or nothing."""
        for line in self.head.split(b"\r\n")[1:]:
            found, _, value = line.partition(b":")
            if found.strip().lower() == name.encode():
                return value.strip().decode("latin-1")
        return ""


def exchange(
    port: int,
    *pieces: bytes,
    pause_s: float = 0.0,
    leave: bool = False,
    head_only: bool = False,
    limit_s: float = LIMIT_S,
) -> Reply:
    """Send the pieces, read one answer. `leave`: the server is told that nothing more is sent;
    `head_only`: what is asked for never ends, so a 200 is enough."""
    started = time.monotonic()
    buffer = bytearray()
    hung = False
    with socket.create_connection(("127.0.0.1", port), timeout=limit_s) as connection:
        try:
            _send(connection, pieces, pause_s)
            if leave:
                connection.shutdown(socket.SHUT_WR)
            while not _complete(buffer, head_only) and (chunk := connection.recv(1 << 16)):
                buffer += chunk
                connection.settimeout(max(0.01, limit_s - (time.monotonic() - started)))
        except TimeoutError:
            hung = True
        except OSError:  # it closed while we wrote: what it said before counts
            _drain(connection, buffer)
    return _reply(bytes(buffer), time.monotonic() - started, hung)


def _send(connection: socket.socket, pieces: tuple[bytes, ...], pause_s: float) -> None:
    for piece in pieces:
        connection.sendall(piece)
        if pause_s:
            time.sleep(pause_s)


def _drain(connection: socket.socket, buffer: bytearray) -> None:
    try:
        while chunk := connection.recv(1 << 16):
            buffer += chunk
    except OSError:
        return


def _complete(buffer: bytearray, head_only: bool) -> bool:
    head, end, body = bytes(buffer).partition(b"\r\n\r\n")
    if not end:
        return False
    if head_only and head.split(b" ", 2)[1:2] == [b"200"]:  # a refusal has an end
        return True
    lower = head.lower()
    if b"transfer-encoding: chunked" in lower:
        return body.endswith(b"0\r\n\r\n")
    marker = b"content-length: "
    if marker not in lower:
        return False  # until it closes
    length = int(lower.split(marker)[1].split(b"\r\n")[0])
    return len(body) >= length


def _reply(raw: bytes, seconds: float, hung: bool) -> Reply:
    head, _, body = raw.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    has_status = len(words) > 1 and words[0].startswith(b"HTTP/") and words[1].isdigit()
    if b"transfer-encoding: chunked" in head.lower():
        body = _unchunked(body)
    return Reply(
        status=int(words[1]) if has_status else None,
        head=head,
        body=body,
        seconds=seconds,
        hung=hung and not has_status,
    )


def _unchunked(body: bytes) -> bytes:
    parts = []
    while body:
        size, _, rest = body.partition(b"\r\n")
        n_bytes = int(size, 16) if size else 0
        parts.append(rest[:n_bytes])
        body = rest[n_bytes + 2 :] if n_bytes else b""
    return b"".join(parts)
