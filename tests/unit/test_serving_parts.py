"""The parts of serving that need no server: answers, offers, keys, the memory that comes back."""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from loadmaster.engine.types import DoneEvent, FinishReason, PrefillEvent, TextEvent
from loadmaster.errors import EngineError, LoadmasterError, NotFoundError, UsageError
from loadmaster.interfaces.cli.progress import TerminalProgress
from loadmaster.interfaces.cli.serve import read_keys
from loadmaster.interfaces.http.owner import owner_of_port
from loadmaster.plan.types import CPU, Knobs
from loadmaster.tasks.api.client_configs import configuration
from loadmaster.tasks.opening import Opened
from loadmaster.tasks.planning import PlanOptions
from loadmaster.tasks.serving.answer import WAITING_LIMIT_CHARS, Answer, Mailbox, PartEvent
from loadmaster.tasks.serving.offers import read_offers, with_contexts
from loadmaster.tasks.serving.opening import Ledger, close_and_confirm, options_for, reduced
from loadmaster.tasks.serving.types import Offer, parse_keep_alive
from loadmaster.units import MIB, Bytes
from tests.checkpoint_parts import write_checkpoint
from tests.cli_parts import GPU, ScriptedEngine, plan, report


def text(said: str, n_tokens: int = 1) -> TextEvent:
    return TextEvent(request_id="r", text=said, n_tokens=n_tokens)


def done(reason: FinishReason = "stop", error: str | None = None) -> DoneEvent:
    return DoneEvent(
        request_id="r", finish_reason=reason, n_prompt=1, n_cached=0, n_generated=1,
        prefill_s=0, decode_s=0, error=error,
    )  # fmt: skip


async def _read(answer: Answer) -> tuple[list[PartEvent], LoadmasterError | None]:
    found = []
    try:
        async for item in answer.events():
            found.append(item)
    except LoadmasterError as error:
        return found, error
    return found, None


def read(answer: Answer) -> tuple[list[PartEvent], LoadmasterError | None]:
    return asyncio.run(_read(answer))


def test_what_a_slow_reader_has_not_taken_is_joined() -> None:
    answer = Answer(1)
    answer.put(0, PrefillEvent(request_id="r", n_done=1, n_prompt=9))
    answer.put(0, PrefillEvent(request_id="r", n_done=2, n_prompt=9))
    for count in range(1000):
        answer.put(0, text("x", count))
    assert answer.waiting_chars == 1000
    answer.put(0, done())
    events, error = read(answer)
    assert error is None
    assert [type(item.event) for item in events] == [PrefillEvent, TextEvent, DoneEvent]
    assert events[1].event == text("x" * 1000, 999)
    assert answer.waiting_chars == 0


def test_an_answer_nobody_reads_has_an_end() -> None:
    cancelled: list[int] = []
    answer = Answer(1)
    answer.on_cancel(0, lambda: cancelled.append(0))
    for _ in range(40):
        answer.put(0, text("x" * 100_000))
    assert WAITING_LIMIT_CHARS < answer.waiting_chars < 2 * WAITING_LIMIT_CHARS
    assert cancelled == [0]
    assert read(answer)[1] is not None


def test_a_part_ends_once_and_nothing_follows() -> None:
    answer = Answer(2)
    for part in (0, 1):
        answer.put(part, done())
        answer.put(part, text("late"))
        answer.put(part, done("failed", "late"))
    events, error = read(answer)
    assert error is None
    assert [item.part for item in events] == [0, 1]


def test_a_part_that_fails_ends_the_others() -> None:
    cancelled: list[int] = []
    answer = Answer(3)
    for part in range(3):
        answer.on_cancel(part, lambda part=part: cancelled.append(part))  # type: ignore[misc]
    answer.put(0, text("said"))
    answer.put(1, EngineError("gone"))
    events, error = read(answer)
    assert [item.event for item in events] == [text("said")]
    assert error is not None
    assert error.message == "gone"
    assert cancelled == [0, 2]


def test_the_first_event_can_be_waited_for_and_is_still_there() -> None:
    async def work() -> None:
        answer, failing = Answer(1), Answer(1)
        asyncio.get_running_loop().call_soon(answer.put, 0, text("a", 1))
        await answer.first()
        answer.put(0, done())
        assert len([item async for item in answer.events()]) == 2
        failing.put(0, EngineError("no such schema"))
        with pytest.raises(EngineError, match="no such schema"):
            await failing.first()
        cancelled: list[int] = []
        left = Answer(1)
        left.on_cancel(0, lambda: cancelled.append(0))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(left.first(), 0.01)
        assert cancelled == [0]

    asyncio.run(work())


def test_a_reader_that_leaves_cancels() -> None:
    cancelled: list[int] = []
    answer = Answer(1)
    answer.on_cancel(0, lambda: cancelled.append(0))

    async def leave() -> None:
        reading = asyncio.create_task(_read(answer))
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)

    asyncio.run(leave())
    assert cancelled == [0]


def test_calls_from_threads_come_in_order() -> None:
    seen: list[int] = []

    async def post() -> None:
        mailbox = Mailbox(asyncio.get_running_loop())

        def work() -> None:
            for number in range(500):
                mailbox.post(lambda number=number: seen.append(number))  # type: ignore[misc]

        await asyncio.to_thread(work)
        await asyncio.sleep(0)

    asyncio.run(post())
    assert seen == list(range(500))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5m", 300), ("90s", 90), ("1h", 3600), ("0", 0), ("7", 7), ("-1", float("inf"))],
)
def test_keep_alive_is_a_time(text: str, seconds: float) -> None:
    assert parse_keep_alive(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "5x", "nan", "m"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        parse_keep_alive(text)


# -- offers


def test_models_have_the_ids_they_are_given() -> None:
    offers = read_offers(["demo", "mine=demo"], ["vectors=demo"])
    assert [(offer.id, offer.embeds) for offer in offers] == [
        ("demo", False), ("mine", False), ("vectors", True)
    ]  # fmt: skip
    assert offers.find("mine:latest").id == "mine"
    assert offers.find(None).id == "demo"


@pytest.mark.parametrize("name", ["dem", "../../etc/passwd", "demo\0", "x" * 10_000, "ollama:x"])
def test_a_clients_word_never_becomes_a_path(name: str) -> None:
    with pytest.raises(NotFoundError, match="there is no model") as refusal:
        read_offers(["demo"]).find(name)
    assert refusal.value.code == "model_not_found"
    assert refusal.value.hint is not None
    assert "`demo`" in refusal.value.hint
    assert len(refusal.value.message) < 300


def test_a_model_may_have_an_n_ctx_of_its_own() -> None:
    offers = with_contexts(read_offers(["demo", "mine=demo"]), ["mine=4096"])
    assert [(offer.id, offer.n_ctx) for offer in offers] == [("demo", None), ("mine", 4096)]
    for text in ("mine", "mine=0", "mine=x", "=4"):
        with pytest.raises((UsageError, NotFoundError)):
            with_contexts(offers, [text])
    with pytest.raises(NotFoundError, match="`other`"):
        with_contexts(offers, ["other=4096"])


def test_two_models_of_one_id_are_refused() -> None:
    with pytest.raises(UsageError, match="id `demo`"):
        read_offers(["demo", "demo"])


def test_a_model_that_is_not_here_is_refused_before_anything_listens() -> None:
    with pytest.raises(NotFoundError):
        read_offers(["there-is-none.gguf"])


# -- keys


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "key"
    quiet = TerminalProgress(quiet=True)
    (made,) = read_keys(file, quiet)
    assert len(made) > 32
    assert read_keys(file, quiet) == (made,)
    file.chmod(0o644)
    with pytest.raises(UsageError, match="read by others"):
        read_keys(file, quiet)
    file.chmod(0o600)
    file.write_text("\n \n")
    with pytest.raises(UsageError, match="no key"):
        read_keys(file, quiet)


# -- memory that comes back


class Closing:
    """An open model on a GPU whose driver gives its memory back late."""

    def __init__(self, free_mib: Sequence[int]) -> None:
        self.free_mib = list(free_mib)
        self.slept = 0
        self.engine = ScriptedEngine(report(plan()))

    def free(self) -> Ledger:
        now = self.free_mib.pop(0) if len(self.free_mib) > 1 else self.free_mib[0]
        return {GPU: Bytes(now * MIB)}

    def close(self, timeout_s: float = 60.0) -> Ledger:
        opened: Any = type("Opened", (), {})()
        opened.session = type("Session", (), {"plan": plan(), "engine": self.engine})()
        opened.close = self.engine.close
        one: Opened = opened

        def sleep(seconds: float) -> None:
            self.slept += 1

        return close_and_confirm(one, free=self.free, timeout_s=timeout_s, sleep=sleep)


def test_a_swap_waits_until_the_driver_has_the_memory_back() -> None:
    closing = Closing([10, 10, 12, 100, 135])  # 130 MiB of buffers, 64 MiB of tolerance
    assert closing.close() == {}
    assert closing.engine.closed
    assert closing.slept == 2


def test_memory_that_does_not_come_back_is_told() -> None:
    missing = Closing([10]).close(timeout_s=0.0)
    assert missing == {GPU: Bytes((130 - 64) * MIB)}


def test_a_dead_worker_needs_no_wait() -> None:
    closing = Closing([10])
    closing.engine.failure = EngineError("dead")
    assert closing.close() == {}
    assert closing.slept == 0


def test_the_plan_after_an_out_of_memory_death_is_a_tenth_smaller_for_the_engine() -> None:
    caps = reduced(plan())
    for device in plan().devices:
        overhead = device.of("overhead")  # of processes, whatever they have open
        assert caps[device.id] - overhead == -(-(device.planned_bytes - overhead) * 9 // 10)
    assert set(caps) == {GPU, CPU}


# -- ports and clients


def test_whose_a_port_is(tmp_path: Path) -> None:
    line = "0: 0100007F:223D 00000000:0000 {} 0:0 0:0 0 0 0 {} 1"
    (tmp_path / "net").mkdir()
    rows = [line.format("01", 7), line.format("0A", 8)]  # connected; listening
    (tmp_path / "net" / "tcp").write_text("head\n" + "\n".join(rows) + "\n")
    folder = tmp_path / "42"
    (folder / "fd").mkdir(parents=True)
    (folder / "comm").write_text("server\n")
    os.symlink("socket:[7]", folder / "fd" / "3")
    assert owner_of_port(8765, tmp_path) is None
    os.symlink("socket:[8]", folder / "fd" / "4")
    assert owner_of_port(8765, tmp_path) == "server (pid 42)"
    assert owner_of_port(8766, tmp_path) is None


def test_continues_configuration_names_every_role() -> None:
    found = configuration(
        "continue", url="http://127.0.0.1:8765", model="m", autocomplete="qwen-coder",
        embed="e", rerank="r",
    )  # fmt: skip
    assert found.notes == ()
    for role in ("[chat, edit, apply]", "[autocomplete]", "[embed]", "[rerank]"):
        assert f"roles: {role}" in found.text
    assert "apiBase: http://127.0.0.1:8765/v1/" in found.text


@pytest.mark.parametrize(
    ("model", "word"), [("olmo-coder", "chat model"), ("mine", "family"), ("qwen3", "qwen…coder")]
)
def test_ids_that_continue_misreads_are_told(model: str, word: str) -> None:
    found = configuration("continue", url="http://x", model="m", autocomplete=model)
    assert any(word in note for note in found.notes)


@pytest.mark.parametrize("client", ["openwebui", "opencode"])
def test_other_clients_are_told_the_address(client: str) -> None:
    found = configuration(client, url="http://127.0.0.1:8765", model="m")
    assert "http://127.0.0.1:8765/v1" in found.text


def test_quantize_is_for_the_models_that_can_be_quantized(tmp_path: Path) -> None:
    plain = Offer(id="plain", model=str(write_checkpoint(tmp_path / "plain")))
    gguf = Offer(id="gguf", model="demo")
    options = PlanOptions(knobs=Knobs(quantize="nf4", double_quant=False))
    assert options_for(plain, options, [gguf, plain]) is options
    assert options_for(gguf, options, [gguf, plain]).knobs == Knobs()
    assert options_for(gguf, options, [gguf]) is options, "so that it is refused"
