"""From an order to a job: which model its lines ask for, and whether they can be run."""

import itertools
from dataclasses import replace
from typing import Any

from loadmaster.errors import InterruptedRunError
from loadmaster.jobs.intake import BadInputError
from loadmaster.jobs.lines import CheckBody, read_lines
from loadmaster.jobs.orders import BatchOrder, OrderError
from loadmaster.jobs.types import BatchLine
from loadmaster.tasks.batch import jobs as batch_jobs
from loadmaster.tasks.batch.items import BodyCheck
from loadmaster.tasks.batch.opening import identify
from loadmaster.tasks.batch.policy import BatchSettings
from loadmaster.tasks.serving.opening import options_for
from loadmaster.tasks.serving.room import Room
from loadmaster.tasks.serving.types import Offer

_LOOK_LINES = 256  # so often it is looked at whether the reading is still wanted


def take_in(room: Room, order: BatchOrder) -> None:
    """Read an order's lines and make its job of them. Blocks.

    Raises:
        BadInputError: lines cannot be run.
        NotFoundError: the file or the model is not there.
        InterruptedRunError: the server ends, or the batch is to be cancelled.
    """
    files = room.files
    source = files.content(order.input_file_id)
    offer = _offer_of(room, order)
    names = {one.id for one in room.serving.offers}
    settings = BatchSettings(model="", plan=room.serving.options.plan)
    if offer is not None:
        names = {offer.id, f"{offer.id}:latest"}
        plan = options_for(offer, settings.plan, room.serving.offers)
        settings = replace(settings, model=offer.model, served_names=(offer.id,), plan=plan)
        settings, _ = identify(settings)
    batch_jobs.submit(
        room.shelf,
        source,
        settings,
        names,
        output_path=files.reserve(order.output_file_id),
        error_path=files.reserve(order.error_file_id),
        job_id=order.batch_id,
        check=_interruptible(room, order.batch_id, BodyCheck(names, order.endpoint)),
    )


def _interruptible(room: Room, batch_id: str, check: CheckBody) -> CheckBody:
    """The same check, which ends the reading when nobody wants it any more."""
    n_lines = itertools.count()

    def checking(url: str, body: dict[str, Any]) -> object:
        asked = next(n_lines) % _LOOK_LINES == 0 and room.orders.cancel_asked(batch_id)
        if room.is_closing or asked:
            raise InterruptedRunError("the reading of its lines was ended")
        return check(url, body)

    return checking


def _offer_of(room: Room, order: BatchOrder) -> Offer | None:
    """The served model that the first line asks for; None when no line names one."""
    offers = room.serving.offers
    known = {name: one for one in offers for name in (one.id, f"{one.id}:latest")}
    source = room.files.content(order.input_file_id)
    anything = _interruptible(room, order.batch_id, lambda url, body: None)
    for line in read_lines(source, anything):
        name = line.body.get("model") if isinstance(line, BatchLine) else None
        if isinstance(name, str) and name in known:
            return known[name]
    return None


def line_errors(error: BadInputError) -> list[OrderError]:
    """What is wrong with lines, as the batch tells it."""
    listed = [
        OrderError(code="invalid_line", message=line.message, line=line.number)
        for line in error.lines
    ]
    if error.count > len(listed):
        more = f"{error.count} lines cannot be run, the first {len(listed)} are listed"
        listed.append(OrderError(code="more_lines", message=more))
    return listed
