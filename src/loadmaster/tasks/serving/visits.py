"""When a job may have a model: while it is open, and where loading it takes nothing from people.

A job never closes a model that people used within `job_patience_s`, and gives its own up as soon as
its memory is needed for another. After that it waits for as long, or until somebody asks for its
model.
"""

import asyncio
import time
from contextlib import suppress
from typing import Protocol

from loadmaster.errors import BusyError, InterruptedRunError
from loadmaster.tasks.opening import Opened
from loadmaster.tasks.serving.host import TICK_S, Serving
from loadmaster.tasks.serving.model import ServedModel, Visitor

LOOK_S = 2.0  # how often a job tries to load what it may not have yet


class Visiting(Visitor, Protocol):
    """A job, as its host sees it."""

    def grant(self, opened: Opened) -> None:
        """It may have the model now."""

    async def gone(self) -> None:
        """Wait until it has let go of it."""


async def entertain(serving: Serving, model: ServedModel, guest: Visiting) -> None:
    """Let a job have a model whenever that is allowed; until cancelled.

    Raises:
        LoadmasterError: the model cannot be loaded.
    """
    try:
        while True:
            await _until_open(serving, model)
            model.visitor = guest
            guest.grant(model.live)
            await guest.gone()
            model.visitor = None
    finally:
        if model.visitor is guest:
            model.visitor = None


async def _until_open(serving: Serving, model: ServedModel) -> None:
    while model.state != "ready" or model.worker_failure is not None:
        if model.state == "failed" and model.failure is not None:
            raise model.failure
        waited_s = time.monotonic() - model.turned_out_s
        if model.state != "unloaded" or waited_s < serving.options.job_patience_s:
            await asyncio.sleep(TICK_S)
            continue
        with suppress(BusyError, InterruptedRunError):
            await serving.load_for_job(model)
            continue
        await asyncio.sleep(LOOK_S)
