"""Windows, limits and blame: the rules of a run, without one."""

from datetime import datetime, time, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadmaster.errors import UsageError
from loadmaster.jobs.types import Counts, Item, ItemResult
from loadmaster.tasks.api.openai_requests import parse_completion
from loadmaster.tasks.batch.flights import MOST_SUSPECTS, Flight, judge
from loadmaster.tasks.batch.gate import Gate
from loadmaster.tasks.batch.items import Ready
from loadmaster.tasks.batch.policy import (
    BatchSettings,
    Clock,
    Policy,
    Window,
    parse_duration,
    parse_window,
)
from loadmaster.tasks.batch.progress import Tally


def test_a_window_may_go_over_midnight() -> None:
    night = parse_window("22:00-07:00")
    assert [night.is_open(time(h)) for h in (21, 22, 23, 0, 6, 7)] == [
        False, True, True, True, True, False,
    ]  # fmt: skip
    day = parse_window("9:30-17:00")
    assert [day.is_open(time(h)) for h in (9, 10, 16, 17)] == [False, True, True, False]
    assert str(day) == "09:30-17:00"


@given(st.times(), st.times(), st.times())
def test_a_window_and_the_rest_of_the_day_are_the_whole_day(a: time, b: time, now: time) -> None:
    if a == b:
        return
    inside, outside = Window(opens=a, closes=b), Window(opens=b, closes=a)
    assert inside.is_open(now) != outside.is_open(now)


def test_work_goes_on_when_the_window_opens_again() -> None:
    night, noon = parse_window("22:00-07:00"), datetime(2026, 3, 1, 12)
    hours = [night.after(noon, 3600 * hours) for hours in (1, 9, 10, 20)]
    assert hours == [
        datetime(2026, 3, 1, 23), datetime(2026, 3, 2, 7), datetime(2026, 3, 2, 23),
        datetime(2026, 3, 4, 0),
    ]  # fmt: skip
    assert night.after(datetime(2026, 3, 1, 6), 600) == datetime(2026, 3, 1, 6, 10)


@given(st.times(), st.times(), st.datetimes(max_value=datetime(2100, 1, 1)), st.integers(1, 10**6))
def test_a_window_never_ends_work_sooner(a: time, b: time, now: datetime, seconds: int) -> None:
    if a == b:
        return
    inside, outside = Window(opens=a, closes=b), Window(opens=b, closes=a)
    if min(_open_s(inside), _open_s(outside)) < 60:
        return
    first, second = inside.after(now, seconds), outside.after(now, seconds)
    assert min(first, second) >= now + timedelta(seconds=seconds)


def _open_s(window: Window) -> float:
    day = datetime(2026, 1, 1)
    span = datetime.combine(day, window.closes) - datetime.combine(day, window.opens)
    return span.total_seconds() % 86400


@pytest.mark.parametrize("text", ["", "22-7", "25:00-07:00", "22:00", "22:61-07:00", "07:00-07:00"])
def test_what_is_no_window_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_window(text)


def test_durations_have_units() -> None:
    texts = ["90", "90s", "1.5m", "2h", "1d"]
    assert [parse_duration(text) for text in texts] == [90, 90, 90, 7200, 86400]
    for text in ("", "0", "-1", "8 hours", "h"):
        with pytest.raises(UsageError):
            parse_duration(text)


class Hands:
    """Both clocks, as a test sets them."""

    def __init__(self) -> None:
        self.monotonic = 100.0
        self.wall = datetime(2026, 1, 1, 23, 0)

    def clock(self) -> Clock:
        return Clock(monotonic_s=lambda: self.monotonic, wall_s=lambda: self.wall.timestamp())


def look(gate: Gate, *, tokens: int = 0, run_s: float = 0.0, cancel: bool = False) -> None:
    gate.look(generated_tokens=tokens, run_s=run_s, cancel_asked=cancel)


def test_the_first_reason_counts_but_a_cancellation_outranks_it() -> None:
    gate = Gate(Policy(max_tokens=10, max_time_s=5), Hands().clock())
    look(gate, tokens=9, run_s=4)
    assert gate.may_start
    reasons = []
    for seen in ({"tokens": 10}, {"run_s": 6}, {"cancel": True}):
        look(gate, **seen)
        reasons.append(gate.reason)
    assert reasons == ["token limit", "token limit", "cancelled"]
    assert gate.drain_is_over


def test_what_is_in_flight_has_the_drain_time_to_end() -> None:
    hands = Hands()
    gate = Gate(Policy(drain_s=30), hands.clock())
    gate.stop("interrupted")
    hands.monotonic += 29
    hands.wall = datetime(2031, 1, 1)
    assert not gate.drain_is_over
    hands.monotonic += 2
    assert gate.drain_is_over


def test_a_closed_window_waits_and_ends_nothing() -> None:
    hands = Hands()
    gate = Gate(Policy(window=parse_window("22:00-07:00")), hands.clock())
    look(gate)
    assert gate.may_start
    hands.wall = datetime(2026, 1, 2, 8, 0)
    look(gate)
    assert (gate.may_start, gate.reason, gate.waiting) == (False, None, "waiting for 22:00-07:00")
    hands.wall = datetime(2026, 1, 2, 22, 0)
    look(gate)
    assert gate.may_start


def flight(number: int, deaths: int = 0) -> Flight:
    item = Item(
        number=number, custom_id=str(number), url="", body={}, cost=1, deaths=deaths, rank=number
    )  # fmt: skip
    request = parse_completion({"prompt": "a"})
    ready = Ready(item=item, request=request, prompts=((1,),))
    return Flight(ready=ready, serial=1, gatherings=[])


def test_after_a_death_the_youngest_run_alone() -> None:
    verdict = judge(flight(n) for n in range(40, 0, -1))
    assert verdict.guilty is None
    assert [r.item.number for r in verdict.alone] == list(range(40, 40 - MOST_SUSPECTS, -1))
    assert all(r.alone and r.item.deaths == 1 for r in verdict.alone)
    assert len(verdict.others) == 40 - MOST_SUSPECTS


def test_those_of_two_deaths_are_suspected_before_the_youngest() -> None:
    verdict = judge([flight(3), flight(2, deaths=1), flight(1, deaths=1)])
    assert [r.item.number for r in verdict.alone] == [2, 1]
    assert [r.item.number for r in verdict.others] == [3]


def test_one_that_was_alone_at_its_second_death_is_guilty() -> None:
    assert judge([flight(1)]).guilty is None
    guilty = judge([flight(1, deaths=1)]).guilty
    assert guilty is not None
    assert guilty.item.deaths == 2


def test_what_is_left_is_told_by_what_was_done() -> None:
    tally = Tally(Counts(done=0, failed=0, left=4), cost_left=400, now=0.0)
    result = ItemResult(number=1, failed=False, line={}, generated_tokens=50)
    tally.generated_tokens = 50
    tally.commit([result], {1: 100})
    tally.idle(True, 10.0)
    tally.idle(False, 60.0)
    state = tally.state(60.0, in_flight=0, waiting=None)
    assert (state.counts.done, state.counts.left) == (1, 3)
    assert (state.run_s, tally.idle_s(60.0)) == (10.0, 50.0)  # the wait for a window
    assert state.left_s == 30.0


def test_items_that_were_refused_say_nothing_of_the_time_that_others_take() -> None:
    tally = Tally(Counts(done=0, failed=0, left=4), cost_left=100_400, now=0.0)
    too_long = ItemResult(number=1, failed=True, line={})
    answered = ItemResult(number=2, failed=False, line={}, prompt_tokens=9, generated_tokens=50)
    tally.commit([too_long], {1: 100_000})
    assert tally.state(5.0, in_flight=0, waiting=None).left_s is None
    tally.commit([answered], {2: 100})
    assert tally.state(10.0, in_flight=0, waiting=None).left_s == 30.0


def test_settings_survive_their_json() -> None:
    from loadmaster.schema import from_json, to_json

    settings = BatchSettings(model="m", served_names=("a",), window="22:00-07:00", max_tokens=5)
    assert from_json(BatchSettings, to_json(settings)) == settings
    assert settings.policy().window == parse_window("22:00-07:00")
