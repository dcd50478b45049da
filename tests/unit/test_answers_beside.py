"""Where answers sit out beside prompts: on engines that compute on the CPU."""

from loadmaster.engine.limits import answers_beside
from tests.engine_parts import settings
from tests.scheduler_parts import Run, limits


def test_answers_sit_out_where_the_cpu_computes() -> None:
    assert answers_beside(settings(n_gpu_layers=0)) == 4


def test_answers_go_along_where_a_gpu_does() -> None:
    assert answers_beside(settings(n_gpu_layers=1)) == 0


def answering_beside(prompt_priority: int, n_prompt: int = 100, **changes: int) -> list[int]:
    """How many answer in each step while a prompt is fed beside eight that answer."""
    run = Run(limits(n_ctx=400, n_seq_max=12, n_batch=16, n_ubatch=16, n_seq_ids=20, **changes))
    for i in range(8):
        run.submit(f"a{i}", (i, 1), max_tokens=60)
    run.run_step()
    run.submit("long", tuple(range(1, 5)) * (n_prompt // 4), priority=prompt_priority)
    found = []
    while not run.streams["long"]:
        step = run.decide()
        assert step is not None
        found.append(sum(part.sample and len(part.tokens) == 1 for part in step.work))
        run.run_step()
    return found


def test_many_answers_sit_out_while_a_person_s_prompt_is_fed() -> None:
    """Eight of them, four for each step in the mean: every second step has all."""
    found = answering_beside(0, answers_beside=4)
    assert found[:4] == [0, 8, 0, 8]
    assert len(found) < len(answering_beside(0))


def test_few_answers_do_not() -> None:
    assert set(answering_beside(0, answers_beside=8)) == {8}
    assert set(answering_beside(0)) == {8}


def test_no_answer_sits_out_more_than_three_steps_in_a_row() -> None:
    assert answering_beside(0, answers_beside=1)[:5] == [0, 0, 0, 8, 0]


def test_beside_a_prompt_that_fills_no_step_nobody_sits_out() -> None:
    assert set(answering_beside(0, 12, answers_beside=1)) == {8}
    assert answering_beside(0, 20, answers_beside=1)[0] == 0


def test_beside_the_items_of_a_job_nobody_sits_out() -> None:
    assert set(answering_beside(1, answers_beside=1)) == {8}
