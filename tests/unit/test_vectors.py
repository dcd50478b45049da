"""Jobs of embeddings: steps as the engine packs them, and what they come to."""

from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from loadmaster.engine.embedding import packed
from loadmaster.plan.vectors import packed_steps, predict_vectors
from loadmaster.units import MIB
from tests.job_parts import job_of, toy_setting
from tests.toy import toy_machine, toy_model

SETTINGS = replace(toy_setting()[2], n_seq_max=8, n_ubatch=128, pooling="mean")


@given(st.lists(st.integers(1, 128), min_size=1, max_size=60), st.sampled_from([1, 3, 8]))
def test_steps_are_those_of_the_engine(lengths: list[int], n_seq_max: int) -> None:
    settings = replace(SETTINGS, n_seq_max=n_seq_max)
    steps = packed_steps(job_of(*((1, length, 0, 0) for length in lengths)), settings)
    engine = [
        tuple(lengths[index] for index in step)
        for step in packed(lengths, settings.n_ubatch, n_seq_max)
    ]
    assert steps == Counter(engine)


def test_inputs_longer_than_a_step_take_no_time() -> None:
    job = job_of((100, 10, 0, 0), (3, 100, 0, 0), (2, 200, 0, 0))
    found = predict_vectors(toy_machine(4 * MIB), toy_model(n_layer=6), SETTINGS, job)
    assert (found.n_items, found.n_steps, found.prefilled_tokens) == (103, 16, 1300)
    assert found.generated_tokens == 0
    assert found.seconds > 0


def test_a_large_class_is_summed() -> None:
    few, many = (job_of((count, 10, 0, 0)) for count in (80, 8_000_000))
    machine, model = toy_machine(4 * MIB), toy_model(n_layer=6)
    first, second = (predict_vectors(machine, model, SETTINGS, job) for job in (few, many))
    assert abs(second.seconds / first.seconds - 100_000) < 1
