"""What is said of drafts after an answer: on the terminal, in JSON, in the metrics."""

from dataclasses import replace

from loadmaster.engine.types import DoneEvent
from loadmaster.interfaces.cli.answer import Answer
from loadmaster.interfaces.cli.render import done_line
from loadmaster.interfaces.http import metrics
from loadmaster.plan.types import Prediction
from loadmaster.tasks.serving.counts import Counts

UNKNOWN = Prediction(
    decode_tok_s=None, prefill_tok_s=None, ttft_s=None, bound_by="overhead", basis="unknown"
)
PLAIN = DoneEvent(
    request_id="r", finish_reason="stop", n_prompt=4, n_cached=0, n_generated=12, prefill_s=0.5,
    decode_s=1.0,
)  # fmt: skip
DRAFTED = replace(PLAIN, n_drafted=9, n_accepted=7)


def test_the_line_after_an_answer() -> None:
    assert "7 of 9 drafted accepted" in done_line(DRAFTED, UNKNOWN)
    assert "draft" not in done_line(PLAIN, UNKNOWN)


def test_json_has_drafts_where_there_were_any() -> None:
    found = Answer(text="", done=DRAFTED).to_json(UNKNOWN)
    assert found["drafts"] == {"drafted": 9, "accepted": 7}
    assert "drafts" not in Answer(text="", done=PLAIN).to_json(UNKNOWN)
    assert "drafts" not in Answer(text="", done=None).to_json(UNKNOWN)


def test_a_server_sums_them_up() -> None:
    counts = Counts()
    for done in (DRAFTED, PLAIN, DRAFTED):
        counts.took(0.0, done, first=False)
    assert (counts.drafted_tokens, counts.accepted_tokens) == (18, 14)
    assert {"drafted_tokens", "accepted_tokens"} <= set(metrics._SUMS)
