"""Items in flight: their requests, what has come back of them, and who is suspected of a death."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from loadmaster.engine.types import DoneEvent
from loadmaster.tasks.api.openai_answers import Gathering
from loadmaster.tasks.batch.items import Ready

# After a worker's death so many of the youngest in flight run alone, for the one that kills is most
# often the last to join. If it was another, the next death narrows it down to those of both.
MOST_SUSPECTS = 16
DEATHS_TO_FAIL = 2


@dataclass(slots=True, kw_only=True, eq=False)
class Flight:
    """One item in the engine; it has a request for each choice of each prompt."""

    ready: Ready
    serial: int  # of this try: an earlier one of the same item may still speak
    gatherings: list[Gathering]
    begun_s: float | None = None  # when the engine first spoke of it: before, it waited there
    open: set[str] = field(default_factory=set)  # ids of requests without their last event
    expired: bool = False  # cancelled by us, for its deadline
    given_up: bool = False  # cancelled by us, for the run stops

    @property
    def number(self) -> int:
        return self.ready.item.number

    @property
    def request_ids(self) -> list[str]:
        return [f"{self.number}.{self.serial}.{g.index}" for g in self.gatherings]

    def gathering(self, request_id: str) -> Gathering:
        """Where the events of a request are gathered."""
        return self.gatherings[int(request_id.rpartition(".")[2])]

    @property
    def dones(self) -> list[DoneEvent]:
        return [g.done for g in self.gatherings if g.done is not None]


class Flights:
    """All items in flight, by number; the oldest first."""

    def __init__(self) -> None:
        self._by_number: dict[int, Flight] = {}

    def __len__(self) -> int:
        return len(self._by_number)

    def __iter__(self) -> Iterator[Flight]:
        return iter(list(self._by_number.values()))

    def __contains__(self, flight: object) -> bool:
        return isinstance(flight, Flight) and self._by_number.get(flight.number) is flight

    @property
    def n_requests(self) -> int:
        """Requests that have not ended."""
        return sum(len(flight.open) for flight in self._by_number.values())

    @property
    def suspect(self) -> bool:
        """Whether the one in flight is suspected of a worker's death: it has no company."""
        return any(flight.ready.alone for flight in self._by_number.values())

    def add(self, flight: Flight) -> None:
        """An item takes off."""
        self._by_number[flight.number] = flight

    def of(self, request_id: str) -> Flight | None:
        """The item of a request, while both are in flight."""
        flight = self._by_number.get(int(request_id.partition(".")[0]))
        return flight if flight is not None and request_id in flight.open else None

    def land(self, flight: Flight) -> None:
        """An item is no more in flight."""
        del self._by_number[flight.number]

    def clear(self) -> list[Flight]:
        """All of them land; the youngest first."""
        flights = list(self._by_number.values())[::-1]
        self._by_number.clear()
        return flights


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What becomes of the items that were in flight when a worker died."""

    guilty: Ready | None
    alone: tuple[Ready, ...]  # to run alone, in this order
    others: tuple[Ready, ...]


def judge(flights: Iterable[Flight]) -> Verdict:
    """After a death: an item that was alone at two deaths is guilty; else the youngest run alone.

    `flights` come youngest first.
    """
    counted = [_with_death(flight.ready) for flight in flights]
    if len(counted) == 1 and counted[0].item.deaths >= DEATHS_TO_FAIL:
        return Verdict(guilty=counted[0], alone=(), others=())
    twice = [ready for ready in counted if ready.item.deaths >= DEATHS_TO_FAIL]
    suspects = twice or counted[:MOST_SUSPECTS]
    numbers = {ready.item.number for ready in suspects}
    return Verdict(
        guilty=None,
        alone=tuple(replace(ready, alone=True) for ready in suspects),
        others=tuple(replace(r, alone=False) for r in counted if r.item.number not in numbers),
    )


def _with_death(ready: Ready) -> Ready:
    return replace(ready, item=replace(ready.item, deaths=ready.item.deaths + 1))
