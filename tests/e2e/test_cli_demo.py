"""The packaged model on the built engine, through the commands people type."""

import json
import re

import pytest

from tests.cli_parts import Run, in_own_process

pytestmark = pytest.mark.engine

SMALL = ("-c", "256", "-ub", "64", "--temp", "0", "-n", "24")


def test_the_measured_buffers_equal_the_plan_and_the_total_is_inside_the_cap() -> None:
    words = ("run", "demo", "What does os.path.join do?", "--ram", "400MiB", *SMALL)
    code, out, err = in_own_process(*words)
    assert code == 0, err
    assert out.strip()
    for kind in ("model", "kv", "compute"):
        assert re.search(rf"cpu\s+{kind}\s.*equal", err), err
    assert re.search(r"cpu\s+total\s.*cap 400.00 MiB", err)
    assert re.search(r"prefill [\d.]+ tok/s · decode [\d.]+ tok/s · \d+ tokens", err)


def test_json_says_what_was_planned_measured_and_used(run: Run) -> None:
    code, out, _ = run("run", "demo", "Hello", "--json", *SMALL)
    value = json.loads(out)
    assert code == 0
    assert value["finish_reason"] in ("stop", "length")
    assert 0 < value["usage"]["completion_tokens"] <= 24
    rows = {row["kind"]: row for row in value["memory"]}
    assert rows["model"]["planned_bytes"] == rows["model"]["measured_bytes"]
    assert rows["total"]["measured_bytes"] <= rows["total"]["cap_bytes"]


def test_a_conversation_goes_on_from_the_cells_it_has(run: Run) -> None:
    lines = "What is a list?\nWhat is a tuple?\n"
    code, out, _ = run("chat", "demo", "--json", *SMALL, stdin=lines)
    first, second = map(json.loads, out.splitlines())
    assert code == 0
    assert first["usage"]["cached_tokens"] == 0
    assert second["usage"]["cached_tokens"] > 0
    assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"]


def test_a_conversation_that_outgrows_n_ctx_is_refused_with_the_numbers(run: Run) -> None:
    code, _, err = run("chat", "demo", *SMALL, stdin=f"{'list ' * 400}\nstill here?\n")
    assert code == 0
    assert re.search(r"this message has \d+ tokens, n_ctx is 256; nothing was sent", err)
    assert "/set ctx" in err
