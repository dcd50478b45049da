"""What a placement is chosen by: seconds of a turn for `chat`, seconds of a request for `batch`."""

from math import ceil

from loadmaster.plan.rates import Rates
from loadmaster.plan.speed import Traffic, turn_s
from loadmaster.plan.steps import Step, StepCosts
from loadmaster.plan.types import EngineSettings, Workload


def cost_s(traffic: Traffic, rates: Rates, settings: EngineSettings, workload: Workload) -> float:
    """Seconds to make as few as possible."""
    if workload.kind == "batch":
        return request_s(traffic, rates, settings, workload)
    return turn_s(traffic, rates, settings, workload)


def request_s(
    traffic: Traffic, rates: Rates, settings: EngineSettings, workload: Workload
) -> float:
    """Seconds per finished request while all sequences are busy.

    A round finishes one request in each sequence. Some of its steps feed a new prompt beside the
    answers; the others feed a token of every answer.
    """
    n, answer = settings.n_seq_max, max(1, workload.output_tokens)
    prompt = max(1, workload.prompt_tokens - workload.shared_tokens)
    room = max(1, settings.n_ubatch - n)
    most = n * ceil(prompt / room)
    n_full = most if most <= answer else max(answer, ceil(n * prompt / room))
    n_plain = max(0, answer - n_full)
    decoding = min(n, round(n * answer / (n_full + n_plain)))
    used = workload.shared_tokens + n * (prompt + answer / 2)
    depth = workload.prompt_tokens + answer / 2
    full = Step(
        n_decode=decoding,
        n_prefill=ceil(n * prompt / n_full),
        n_outputs=decoding + 1,
        decode_cells=depth,
        prefill_cells=workload.shared_tokens + prompt / 2,
        used_cells=used,
    )
    plain = Step(n_decode=n, n_outputs=n, decode_cells=depth, used_cells=used)
    costs = StepCosts(traffic, rates, settings)
    return (n_full * _chosen_by(costs, full) + n_plain * _chosen_by(costs, plain)) / n


def _chosen_by(costs: StepCosts, step: Step) -> float:
    """Seconds of a step without handovers, as in `turn_s`: they show only in models so small that
    where they lie hardly matters."""
    return sum(cost for cause, cost in costs.of(step).items() if cause != "handover")
