"""The printed table is the ledger."""

import re

import pytest

from loadmaster.interfaces.cli import render
from loadmaster.plan.types import CPU, Override
from loadmaster.tasks.measurement import compare
from loadmaster.units import Bytes, parse_size
from tests import cli_parts as parts


def total_on(text: str, device: str) -> int:
    """The planned total that the table prints for a device."""
    match = re.search(rf"^\s+{device}\s+total\s+([\d.]+ \w+)", text, re.MULTILINE)
    assert match, text
    return parse_size(match[1])


def test_the_printed_totals_are_the_sums_of_the_printed_rows() -> None:
    plan = parts.plan()
    text = render.ledger(plan.devices)
    for device in plan.devices:
        printed = re.findall(rf"^\s+{device.id}\s+(?!total)\w+\s+([\d.]+ MiB)", text, re.MULTILINE)
        assert sum(map(parse_size, printed)) == total_on(text, device.id) == device.planned_bytes


def test_every_row_says_where_its_figure_is_from_and_why() -> None:
    row = next(line for line in render.ledger(parts.plan().devices).splitlines() if " kv " in line)
    assert row.split() == ["gpu:0", "kv", "20.00", "MiB", "header", "why", "kv"]


def test_the_plan_has_its_ledger_settings_speed_and_neighbours() -> None:
    plan = parts.plan(alternatives=parts.refusal().nearest, notes=("half is on the CPU",))
    text = render.plan_text(plan)
    assert "fits on test machine: n_ctx 512, 5 of 11 layers on gpu:0" in text
    assert "-ngl 5" in text
    assert "predicted: decode 12.5 tok/s · prefill 300.0 tok/s · TTFT 0.4 s" in text
    assert "bound by ram-bandwidth; from a table of bandwidths, not measured here" in text
    assert "note: half is on the CPU" in text
    assert "`--kv q8_0`  half the KV cache, frees 20.00 MiB on gpu:0, decode 11.0 tok/s" in text


def test_flags_fix_every_setting_that_was_chosen() -> None:
    engine = parts.settings(
        overrides=(Override(pattern=r"blk\.3\.ffn", device=CPU),),
        offload_kqv=False,
        swa_full=True,
        flash_attn=False,
        layers_per_device=(3, 2),
    )
    flags = render.settings_flags(engine)
    assert {r"-ot 'blk\.3\.ffn=cpu'", "-nkvo", "--swa-full", "-fa off", "-ts 3,2"} <= set(flags)


def test_a_refusal_says_what_is_missing_and_what_would_fit() -> None:
    text = render.refusal_table(parts.refusal())
    assert "short by 40.00 MiB on gpu:0" in text
    assert "needs 140.00 MiB, the budget is 100.00 MiB" in text
    assert "40.00 MiB too much" in text
    assert "`--kv q8_0`" in text


def test_measured_memory_is_judged_beside_the_plan() -> None:
    plan = parts.plan()
    text = render.memory_table(compare(plan, parts.report(plan), parent_bytes=Bytes(0)))
    assert re.search(r"gpu:0\s+kv\s+20.00 MiB\s+20.00 MiB\s+equal", text)
    assert re.search(r"cpu\s+total\s+211.00 MiB\s+206.00 MiB\s+cap 300.00 MiB", text)


def test_what_could_not_be_measured_is_a_dash() -> None:
    plan = parts.plan()
    measured = parts.report(plan)
    unknown = dict.fromkeys(measured.device_used_bytes)
    rows = compare(
        plan,
        type(measured)(
            buffers=measured.buffers,
            process_bytes=measured.process_bytes,
            process_peak_bytes=measured.process_peak_bytes,
            mapped_bytes=measured.mapped_bytes,
            device_used_bytes=unknown,
            device_peak_bytes=unknown,
            device_denied={},
        ),
        parent_bytes=Bytes(0),
    )
    assert re.search(r"gpu:0\s+total\s+140.00 MiB\s+–\s+cap", render.memory_table(rows))


def test_tables_align_and_have_no_trailing_blanks() -> None:
    text = render.table([("a", "1", "x"), ("long", "100")], right={1})
    assert text == "  a       1  x\n  long  100"


@pytest.mark.parametrize(("value", "printed"), [(45.62, "45.6"), (1.0, "1.0"), (0.123, "0.12")])
def test_slow_models_keep_their_digits(value: float, printed: str) -> None:
    plan = parts.plan()
    predicted = type(plan.predicted)(
        decode_tok_s=value, prefill_tok_s=None, ttft_s=None, bound_by="disk", basis="table"
    )
    assert f"decode {printed} tok/s" in render.prediction_text(predicted)


def test_the_figures_of_an_answer() -> None:
    engine = parts.ScriptedEngine(parts.report(parts.plan()))
    chat = parts.chat(engine)
    list(chat.ask("hi"))
    assert chat.last is not None
    line = render.done_line(chat.last, parts.plan().predicted)
    assert line.endswith(
        "decode 8.0 tok/s · 2 tokens · predicted prefill 300.0, decode 12.5 tok/s (table)"
    )
