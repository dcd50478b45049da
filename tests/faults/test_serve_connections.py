"""Connections that are open and ask nothing, while a server is told to end."""

import signal
import socket
import time
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path

from tests.serve_parts import PATIENCE_S, serving


def test_clients_that_are_idle_do_not_hold_up_the_end(tmp_path: Path) -> None:
    """One between two requests, one in the midst of a head, one that never said anything."""
    drain_s = 2 * PATIENCE_S
    words = ("demo", "--drain", str(drain_s))
    with serving(*words, home=tmp_path, fake={}) as server, ExitStack() as stack:
        idle = HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
        idle.request("GET", "/health")
        assert idle.getresponse().read()
        stack.callback(idle.close)
        for said in (b"POST /v1/chat/completions HTTP/1.1\r\nHost: lo", b""):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            client.sendall(said)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(drain_s) == 0
        assert time.monotonic() - began < drain_s / 2
