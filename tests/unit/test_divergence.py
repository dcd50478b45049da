"""The figures of `benchmarks.hf_quality`, where they can be worked out by hand."""

from math import exp, log

import numpy as np
import pytest

from benchmarks.divergence import Vector, compare, intervals, log_probabilities
from benchmarks.hf_quality import Window, beginnings, by_source
from scripts.demo_model.corpus import Document


def logits(*rows: tuple[float, ...]) -> Vector:
    return np.array([[log(p) for p in row] for row in rows])


def test_a_divergence_by_hand() -> None:
    found = compare(logits((0.5, 0.25, 0.25)), logits((0.25, 0.5, 0.25)), [1])
    assert found.divergence == pytest.approx([0.5 * log(2) - 0.25 * log(2)])
    assert found.surprise == pytest.approx([log(2)])
    assert found.reference_surprise == pytest.approx([log(4)])
    assert found.same_first.tolist() == [False]


def test_it_has_a_direction() -> None:
    p, q = logits((0.9, 0.1)), logits((0.5, 0.5))
    there, back = compare(p, q, [0]).divergence[0], compare(q, p, [0]).divergence[0]
    assert there == pytest.approx(0.9 * log(1.8) + 0.1 * log(0.2))
    assert back == pytest.approx(0.5 * log(5 / 9) + 0.5 * log(5))


def test_a_model_is_no_distance_from_itself() -> None:
    rows = np.random.default_rng(1).normal(size=(20, 50)) * 5
    found = compare(rows, rows, [0] * 20)
    assert found.divergence.tolist() == [0.0] * 20
    assert found.same_first.all()


def test_large_and_shifted_logits() -> None:
    rows = np.random.default_rng(2).normal(size=(3, 9)).astype(np.float32)
    assert log_probabilities(rows + 1024) == pytest.approx(log_probabilities(rows), abs=1e-3)
    assert np.exp(log_probabilities(rows * 400)).sum(axis=1) == pytest.approx([1, 1, 1])


def text(n_tokens: int, surprise: float, reference: float, kl: float, same: int) -> Vector:
    """A text whose tokens are all alike."""
    return np.array(
        [n_tokens, 3 * n_tokens, n_tokens * surprise, n_tokens * reference, n_tokens * kl, same]
    )


def test_figures_are_of_all_tokens_together() -> None:
    rows = [text(100, 2.0, 1.9, 0.01, 99), text(300, 3.0, 2.9, 0.03, 270)]
    found = intervals(rows, n_resamples=200, seed=1)
    assert found["perplexity"][0] == pytest.approx(exp(2.75))
    assert found["bits_per_byte"][0] == pytest.approx(2.75 / 3 / log(2))
    assert found["perplexity_ratio"][0] == pytest.approx(exp(0.1))
    assert found["kl"][0] == pytest.approx(0.025)
    assert found["same_first"][0] == pytest.approx(369 / 400)
    assert found["kl"][1:] == pytest.approx((0.01, 0.03))  # one text alone, the other alone


def test_what_both_share_does_not_widen_the_ratio() -> None:
    random = np.random.default_rng(3)
    rows = [text(100, r + 0.1, r, 0.02, 90) for r in random.normal(2, 0.5, 30)]
    found = intervals(rows, n_resamples=500, seed=1)
    low, high = found["perplexity"][1:]
    assert high / low > 1.1
    assert found["perplexity_ratio"][1:] == pytest.approx((exp(0.1), exp(0.1)))


def test_an_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(4)
    held = 0
    for trial in range(100):
        rows = [text(50, 2, 2, kl, 45) for kl in random.gamma(4, 0.25, 40)]
        _, low, high = intervals(rows, n_resamples=150, seed=trial)["kl"]
        held += low <= 1.0 <= high
    assert 88 <= held <= 99


def test_the_seed_decides() -> None:
    rows = [text(100, 2 + i / 10, 2, i / 100, 90) for i in range(9)]
    first, again = (intervals(rows, n_resamples=100, seed=5) for _ in range(2))
    assert first == again
    assert first["kl"] != intervals(rows, n_resamples=100, seed=6)["kl"]


class Letters:
    """A vocabulary of letters, each worth two bytes."""

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        return [ord(letter) for letter in text]

    def piece(self, token: int, *, special: bool) -> bytes:
        return bytes((token, token))


def test_texts_are_read_until_there_is_no_room() -> None:
    texts = [Document(unit="a.py", kind="chat", text=text) for text in ("abc", "", "de", "f")]
    windows = list(beginnings(texts, Letters(), 4))
    assert [window.tokens for window in windows] == [(0, 97, 98, 99), (0, 100)]
    assert [window.n_bytes for window in windows] == [6, 2]


def test_the_windows_of_a_source_are_one_text() -> None:
    rows = np.random.default_rng(7).normal(size=(6, 9))
    windows = [
        Window(source=source, tokens=(0, *range(n)), n_bytes=10 * n)
        for source, n in (("a", 1), ("a", 2), ("b", 3))
    ]
    judged = [
        (window, compare(rows[at : at + n], -rows[at : at + n], window.tokens[1:]))
        for at, n, window in zip((0, 1, 3), (1, 2, 3), windows, strict=True)
    ]
    sums = list(by_source(judged))
    assert [row[:2].tolist() for row in sums] == [[3, 30], [3, 30]]
    assert sums[0] == pytest.approx(judged[0][1].sums(10) + judged[1][1].sums(20))


def test_parts_are_put_together_in_order() -> None:
    random = np.random.default_rng(8)
    p, q, following = random.normal(size=(70, 5)), random.normal(size=(70, 5)), [1] * 70
    whole = compare(p, q, following)
    single = [compare(p[i : i + 1], q[i : i + 1], [1]) for i in range(70)]
    assert whole.divergence == pytest.approx([one.divergence[0] for one in single])
    assert whole.surprise == pytest.approx([one.surprise[0] for one in single])
    assert whole.same_first.tolist() == [bool(one.same_first[0]) for one in single]
