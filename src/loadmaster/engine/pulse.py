"""The pulse of a worker: says what the main thread does, and for how long, and meters memory."""

import os
import threading
import time

from loadmaster.engine.meter import process_memory
from loadmaster.engine.wire import Channel
from loadmaster.units import Bytes

_BEAT_S = 0.5
_SAMPLE_S = 0.1  # the memory meter


class Pulse:
    """The thread that beats and measures while the main thread is in native code."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._doing = ("starting", time.monotonic())
        self.peak_bytes = Bytes(0)
        threading.Thread(target=self._run, daemon=True, name="pulse").start()

    def doing(self, what: str) -> None:
        """Note what the main thread begins now."""
        self._doing = (what, time.monotonic())

    def sample(self) -> None:
        self.peak_bytes = max(self.peak_bytes, process_memory().own_bytes)

    def _run(self) -> None:
        next_beat = 0.0
        try:
            while True:
                now = time.monotonic()
                if now >= next_beat:
                    what, since = self._doing
                    self._channel.send({"kind": "beat", "doing": what, "age_s": now - since})
                    next_beat = now + _BEAT_S
                self.sample()
                time.sleep(_SAMPLE_S)
        except OSError:
            os._exit(0)
