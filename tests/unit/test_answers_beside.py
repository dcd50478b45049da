"""Where answers sit out beside prompts: on engines that compute on the CPU."""

from loadmaster.engine import worker
from tests.engine_parts import settings


def test_answers_sit_out_where_the_cpu_computes() -> None:
    assert worker._answers_beside(settings(n_gpu_layers=0)) == 4


def test_answers_go_along_where_a_gpu_does() -> None:
    assert worker._answers_beside(settings(n_gpu_layers=1)) == 0
