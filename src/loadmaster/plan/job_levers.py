"""What would end a job sooner, in numbers: each lever alone, everything else as planned."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from loadmaster.plan.batch import JobOutline
from loadmaster.plan.curve import Curve
from loadmaster.plan.kernel_rates import AttentionRate
from loadmaster.plan.levers import MORE_VRAM_BYTES, faster_host, with_vram
from loadmaster.plan.rates import DeviceRates, Rates
from loadmaster.plan.simulate import simulate
from loadmaster.plan.speed import Traffic
from loadmaster.plan.types import EngineSettings

# A lever that gives less is not worth a line.
LEAST_GAIN = 1.03


@dataclass(frozen=True, slots=True, kw_only=True)
class JobLever:
    """Something that would end the job sooner, and how long it would then take."""

    what: str
    seconds: float


def job_levers(
    traffic: Traffic, rates: Rates, settings: EngineSettings, job: JobOutline, seconds: float
) -> tuple[JobLever, ...]:
    """Levers that help, by what they give; none where the speed itself is unknown."""
    if rates.basis == "unknown":
        return ()
    found = [
        JobLever(what=what, seconds=simulate(there, then, settings, job).seconds)
        for what, there, then in _changes(traffic, rates)
    ]
    helpful = [lever for lever in found if lever.seconds * LEAST_GAIN <= seconds]
    return tuple(sorted(helpful, key=lambda lever: lever.seconds))


def _changes(traffic: Traffic, rates: Rates) -> Iterator[tuple[str, Traffic, Rates]]:
    if traffic.host_read_bytes and rates.gpus:
        moved = with_vram(traffic, MORE_VRAM_BYTES)
        yield "8 GiB more VRAM", replace(moved, streamed_bytes=moved.host_bytes), rates
        link = tuple(2 * bytes_s for bytes_s in rates.link_bytes_s)
        yield "a link twice as fast", traffic, replace(rates, link_bytes_s=link)
    if rates.gpus:
        gpus = tuple(_twice(gpu) for gpu in rates.gpus)
        yield "GPUs twice as fast", traffic, replace(rates, gpus=gpus)
    if traffic.host_read_bytes:
        yield "RAM and cores twice as fast", traffic, faster_host(rates)


def _twice(gpu: DeviceRates) -> DeviceRates:
    return replace(
        gpu,
        dense=_halved(gpu.dense),
        experts=_halved(gpu.experts),
        output=_halved(gpu.output),
        attention={
            kv: AttentionRate(
                decode=_halved(rate.decode),
                prefill=_halved(rate.prefill),
                hidden_s=rate.hidden_s / 2,
            )
            for kv, rate in gpu.attention.items()
        },
    )


def _halved(curve: Curve) -> Curve:
    return replace(curve, s_per_byte=tuple(value / 2 for value in curve.s_per_byte))
