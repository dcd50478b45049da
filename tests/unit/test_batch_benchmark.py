"""The batch benchmark's own arithmetic: jobs, the sweep of peers, and when a bound is broken."""

import pytest

from benchmarks.batch import broken
from benchmarks.batching import jobs
from benchmarks.batching.jobs import Item, Job
from benchmarks.batching.llama_server import Options, hopeless, sweep


def test_shared_prompts_differ_only_behind_the_prefix() -> None:
    job = jobs.shared(8, 8192, 128256)
    assert job.distinct_tokens == 1024 + 8 * 32
    assert len({item.prompt[:1024] for item in job.items}) == 1
    assert job.longest == 1024 + 32 + 15


def test_distinct_tokens_counts_partial_beginnings_once() -> None:
    items = [Item(prompt=p, n_out=1) for p in ((1, 2, 3), (1, 2, 4), (5,), (1, 2))]
    assert Job(name="x", items=tuple(items), n_ctx=256).distinct_tokens == 5


def test_pressure_needs_exactly_so_many_times_the_cells() -> None:
    job = jobs.pressure(24, 2048, 4096)
    assert sum(item.n_cells for item in job.items) == 4 * 2048
    assert sum(len(item.prompt) for item in job.items) < 2048  # all of them can begin


def test_the_same_job_every_time() -> None:
    assert jobs.mixed(16, 16384, 4096) == jobs.mixed(16, 16384, 4096)


def test_a_slot_has_its_own_cache_where_the_longest_request_fits() -> None:
    job = jobs.shared(4, 8192, 128256)
    assert list(sweep(job, (4, 8))) == [
        Options(),
        Options(n_parallel=4),
        Options(n_parallel=8, unified=True),  # 1,024 cells for 1,071
    ]


@pytest.mark.parametrize(
    ("elapsed_s", "n_reached", "expected"),
    [
        (20, 4, False),  # too early to say
        (40, 33, False),  # 64 in 78 s
        (40, 20, True),  # 64 in 128 s
        (101, 64, True),  # past the limit
    ],
)
def test_a_run_is_stopped_when_it_cannot_end_in_time(
    elapsed_s: float, n_reached: int, expected: bool
) -> None:
    assert hopeless(elapsed_s, n_reached, 64, 100) is expected


def test_a_missing_speedup_is_a_broken_bound() -> None:
    good: dict[str, object] = {"completed": 64, "requests": 64, "speedup_vs_best": 1.0}
    assert list(broken("mixed", good)) == []
    assert list(broken("mixed", {**good, "speedup_vs_best": None})) == ["speedup_vs_best"]
    assert list(broken("mixed", {**good, "completed": 63})) == ["completed"]
    assert list(broken("mixed", {**good, "wrong_tokens": 1})) == ["wrong_tokens"]
