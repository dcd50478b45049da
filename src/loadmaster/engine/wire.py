"""Frames between parent and worker: length-capped JSON, with raw bytes beside it where needed.

A frame is `uint32 size of the JSON, uint32 size of the payload, JSON object, payload`. The parent
treats whatever a worker sends as hostile: a size over the cap or a malformed object ends the
connection, and with it the worker.
"""

import json
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

MAX_JSON_BYTES = 64 << 20  # a prompt of a million tokens is 8 MB
MAX_PAYLOAD_BYTES = (1 << 32) - 1  # the state of a long sequence is gigabytes
_HEADER = struct.Struct("<II")
_RECEIVE_BYTES = 1 << 16


class WireError(Exception):
    """The other side sent something that is no frame."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One message; `kind` says what the other keys are."""

    body: dict[str, Any]
    payload: bytes = b""

    @property
    def kind(self) -> str:
        kind = self.body.get("kind")
        return kind if isinstance(kind, str) else ""


def encode(body: dict[str, Any], payload: bytes = b"") -> bytes:
    """The bytes of a frame.

    Raises:
        WireError: it is larger than the other side accepts.
    """
    text = json.dumps(body, separators=(",", ":")).encode()
    if len(text) > MAX_JSON_BYTES or len(payload) > MAX_PAYLOAD_BYTES:
        raise WireError(f"a frame of {len(text) + len(payload)} bytes is over the limit")
    return _HEADER.pack(len(text), len(payload)) + text + payload


class Decoder:
    """Frames out of a byte stream, however it is cut."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, chunk: bytes) -> Iterator[Frame]:
        """Add bytes; yield the frames that are complete.

        Raises:
            WireError: a size over the cap, or no JSON object.
        """
        self._buffer += chunk
        while len(self._buffer) >= _HEADER.size:
            n_json, n_payload = _HEADER.unpack_from(self._buffer)
            if n_json > MAX_JSON_BYTES or n_payload > MAX_PAYLOAD_BYTES:
                raise WireError(f"a frame of {n_json} + {n_payload} bytes is over the limit")
            end = _HEADER.size + n_json + n_payload
            if len(self._buffer) < end:
                return
            text = bytes(self._buffer[_HEADER.size : _HEADER.size + n_json])
            payload = bytes(self._buffer[_HEADER.size + n_json : end])
            del self._buffer[:end]
            yield Frame(body=_parse(text), payload=payload)


def _parse(text: bytes) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WireError(f"a frame is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise WireError("a frame is not a JSON object")
    return body


class Channel:
    """One end of the connection. Sending is safe from any thread, receiving from one."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._decoder = Decoder()
        self._sending = threading.Lock()

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, body: dict[str, Any], payload: bytes = b"") -> None:
        """Send a frame whole.

        Raises:
            OSError: the other side is gone.
            WireError: the frame is too large.
        """
        self._send(encode(body, payload))

    def send_all(self, bodies: Sequence[dict[str, Any]]) -> None:
        """Send frames behind each other, so that the other side reads them at once.

        Raises:
            OSError: the other side is gone.
            WireError: a frame is too large.
        """
        self._send(b"".join(map(encode, bodies)))

    def _send(self, frames: bytes) -> None:
        with self._sending:
            self._socket.sendall(frames)

    def receive(self) -> list[Frame] | None:
        """The frames that one read completes, perhaps none; None when the other side is gone."""
        try:
            chunk = self._socket.recv(_RECEIVE_BYTES)
        except ConnectionError:
            return None
        return list(self._decoder.feed(chunk)) if chunk else None

    def close(self) -> None:
        self._socket.close()
