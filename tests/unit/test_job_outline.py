"""What items of a job share, and how many of them stand for how many."""

import pytest

from loadmaster.plan.batch import (
    LISTED_ITEMS,
    ItemClass,
    JobOutline,
    outline_of,
    unshared,
    with_outputs,
)


def test_a_shared_prefix_is_counted_once() -> None:
    prefix = tuple(range(100))
    job = outline_of([((*prefix, 1000 + i, 2000 + i), 8) for i in range(5)])
    assert job.n_items == 5
    assert job.prompt_tokens == 5 * 102
    assert job.distinct_tokens == 100 + 5 * 2
    assert job.prefix_tokens == 100
    assert job.output_tokens == 40
    assert job.longest == 110


def test_a_radix_tree_shares_nested_prefixes_too() -> None:
    a = [*range(10), *range(50, 60)]
    b = [*range(10), *range(70, 80)]
    prompts = [(*a, 1), (*a, 2), (*b, 3), (*b, 4)]
    job = outline_of([(prompt, 1) for prompt in prompts])
    assert job.distinct_tokens == 10 + 10 + 10 + 4
    assert {it.shared_tokens for it in job.classes} == {20}


def test_equal_prompts_feed_a_token_each() -> None:
    job = outline_of([((7, 8, 9), 4)] * 3)
    assert job.distinct_tokens == 2 + 3
    assert all(it.own_tokens == 1 for it in job.classes)


def test_items_keep_their_order_and_neighbours_are_gathered() -> None:
    job = outline_of([((1,), 4), ((2,), 4), ((3, 4), 4), ((5,), 4)])
    assert [(it.count, it.prompt_tokens) for it in job.classes] == [(2, 1), (1, 2), (1, 1)]
    assert not job.mixed


def test_many_items_become_a_few_classes_with_the_same_sums() -> None:
    items = [(tuple(range(i * 1000, i * 1000 + 100 + i % 50)), 16 + i % 7) for i in range(2000)]
    job = outline_of(items)
    assert job.mixed
    assert job.n_items == 2000 > LISTED_ITEMS
    assert len(job.classes) < 60
    assert job.prompt_tokens == pytest.approx(sum(len(p) for p, _ in items), rel=0.01)
    assert job.output_tokens == pytest.approx(sum(n for _, n in items), rel=0.02)


def test_a_sample_stands_for_more_and_a_common_prefix_does_not_grow() -> None:
    prefix = tuple(range(100))
    items = [((*prefix, 1000 + i), 8) for i in range(40)]
    job = outline_of(items, lengths="sample", times=10.0)
    assert job.n_items == 400
    assert job.prefix_tokens == 100
    assert job.lengths == "sample"


def test_prefixes_of_small_groups_grow_with_the_file() -> None:
    items = [((*range(g * 100, g * 100 + 50), 9000 + i), 8) for g in range(20) for i in range(2)]
    job = outline_of(items, lengths="sample", times=10.0)
    assert job.prefix_tokens == 10 * 20 * 50


def test_live_prefixes_are_those_of_a_window() -> None:
    one = JobOutline(
        classes=(ItemClass(count=100, prompt_tokens=60, output_tokens=8, shared_tokens=50),),
        prefix_tokens=50,
    )
    assert one.prefix_cells(1) == 50
    assert one.prefix_cells(64) == 50
    pairs = JobOutline(classes=one.classes, prefix_tokens=50 * 50)
    assert pairs.prefix_cells(10) == pytest.approx(50 + 9 * 25)
    assert pairs.prefix_cells(0) == 0


def test_shorter_answers_and_caches_that_share_nothing() -> None:
    job = JobOutline(
        classes=(ItemClass(count=4, prompt_tokens=60, output_tokens=8, shared_tokens=50),),
        prefix_tokens=50,
    )
    assert with_outputs(job, 0.5).output_tokens == 16
    assert with_outputs(job, 0.01).output_tokens == 4
    assert unshared(job).distinct_tokens == 240
