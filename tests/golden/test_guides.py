"""The guides say what the tool says, and what they claim is so. `make check` compares all pages."""

from pathlib import Path

import pytest

from scripts.guides.__main__ import DOCS
from scripts.guides.asking import ask
from scripts.guides.machines import machines_page
from scripts.guides.pages import PAGES

QUICK = ("llama-3-70b-on-24gb.md", "gpt-oss-120b-on-24gb.md", "jetson-orin-latency.md")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOADMASTER_HOME", str(tmp_path))


@pytest.mark.parametrize("name", QUICK)
def test_a_page_is_current(name: str) -> None:
    written = (DOCS / "guides" / name).read_text(encoding="utf-8")
    assert PAGES[name]() == written, "`python -m scripts.guides` writes it"


def test_the_list_of_machines_is_current() -> None:
    assert machines_page() == (DOCS / "machines.md").read_text(encoding="utf-8")


def test_every_page_is_there() -> None:
    assert {path.name for path in (DOCS / "guides").glob("*.md")} >= set(PAGES)


def test_the_70b_on_24_gb_waits_for_its_ram() -> None:
    answer = ask("loadmaster plan shape:llama-3-70b@Q4_K_M --machine rtx4090-24g -c 8192")
    assert answer.made.predicted.bound_by == "ram-bandwidth"
    assert 2.5 < answer.decode_tok_s < 89.6e9 / (answer.ram_gib * (1 << 30))
    assert 18 < answer.ram_gib < 22


def test_a_longer_context_leaves_less_to_weights() -> None:
    command = "loadmaster plan shape:llama-3-70b@Q4_K_M --machine rtx4090-24g -c {}"
    short, long = ask(command.format(4096)), ask(command.format(8192))
    assert short.gib("gpu:0", "model") > long.gib("gpu:0", "model")
    assert short.decode_tok_s > long.decode_tok_s


def test_exactly_eleven_and_a_half_gib() -> None:
    command = "loadmaster plan shape:qwen2.5-72b@Q6_K --machine rtx3060-12g-ram64g --vram 11.5GiB"
    gpu = ask(command).made.device("gpu:0")
    assert gpu.budget_bytes == int(11.5 * (1 << 30))
    assert 0 <= gpu.left_bytes < 256 << 20


def test_two_cards_wait_for_no_ram() -> None:
    answer = ask("loadmaster plan shape:llama-3-70b@Q4_K_M --machine rtx3090-x2")
    assert answer.ram_gib < 1  # the embedding, of which a token reads a row
    assert answer.decode_tok_s > 10
