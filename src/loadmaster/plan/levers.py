"""What would make a plan faster, in numbers: each lever alone, everything else as planned."""

from collections.abc import Iterator
from dataclasses import replace

from loadmaster.plan.curve import Curve
from loadmaster.plan.rates import Rates
from loadmaster.plan.speed import Reads, Traffic, decode_costs
from loadmaster.plan.types import EngineSettings, Lever, Workload
from loadmaster.units import GIB

MORE_VRAM_BYTES = 8 * GIB
_N_SEQUENCES = 8
# A lever that gives less is not worth a line.
_LEAST_GAIN = 1.03


def levers_of(
    traffic: Traffic, rates: Rates, settings: EngineSettings, workload: Workload
) -> tuple[Lever, ...]:
    """Levers that help, by what they give; none where the speed itself is unknown."""
    if rates.basis == "unknown":
        return ()
    depth = workload.prompt_tokens
    now = 1 / _step_s(traffic, rates, settings, depth)
    found = [
        lever for lever in _levers(traffic, rates, settings, depth)
        if lever.decode_tok_s >= now * _LEAST_GAIN
    ]  # fmt: skip
    return tuple(sorted(found, key=lambda lever: -lever.decode_tok_s))


def _levers(
    traffic: Traffic, rates: Rates, settings: EngineSettings, depth: float
) -> Iterator[Lever]:
    halved = replace(
        traffic,
        host=_scaled(traffic.host, 0.5),
        gpus=tuple(_scaled(reads, 0.5) for reads in traffic.gpus),
        disk_read_bytes=0,
    )
    yield _lever("half the bits per weight", halved, rates, settings, depth)
    if traffic.host_read_bytes:
        yield _lever("RAM and cores twice as fast", traffic, faster_host(rates), settings, depth)
    if traffic.host_read_bytes and rates.gpus:
        moved = with_vram(traffic, MORE_VRAM_BYTES)
        yield _lever("8 GiB more VRAM", moved, rates, settings, depth)
    many = _N_SEQUENCES / _step_s(traffic, rates, settings, depth, _N_SEQUENCES)
    yield Lever(what=f"{_N_SEQUENCES} sequences at once, together", decode_tok_s=many)


def _lever(
    what: str, traffic: Traffic, rates: Rates, settings: EngineSettings, depth: float
) -> Lever:
    return Lever(what=what, decode_tok_s=1 / _step_s(traffic, rates, settings, depth))


def _step_s(
    traffic: Traffic, rates: Rates, settings: EngineSettings, depth: float, n_sequences: int = 1
) -> float:
    return sum(decode_costs(traffic, rates, settings, depth, n_sequences).values())


def _scaled(reads: Reads, factor: float) -> Reads:
    return Reads(
        dense_bytes=int(reads.dense_bytes * factor),
        routed_bytes=int(reads.routed_bytes * factor),
        output_bytes=int(reads.output_bytes * factor),
    )


def faster_host(rates: Rates) -> Rates:
    """RAM and cores twice as fast."""

    def twice(curve: Curve) -> Curve:
        return replace(curve, s_per_byte=tuple(value / 2 for value in curve.s_per_byte))

    host = rates.host
    faster = replace(
        host, dense=twice(host.dense), experts=twice(host.experts), output=twice(host.output)
    )
    return replace(rates, host=faster)


def with_vram(traffic: Traffic, more_bytes: int) -> Traffic:
    """So many more weights on the first GPU; experts as they are read, dense ones before them."""
    dense = min(traffic.host.dense_bytes, more_bytes)
    routed = min(traffic.host.routed_bytes, more_bytes - dense)
    host = replace(
        traffic.host,
        dense_bytes=traffic.host.dense_bytes - dense,
        routed_bytes=traffic.host.routed_bytes - routed,
    )
    first = traffic.gpus[0]
    gpu = replace(
        first,
        dense_bytes=first.dense_bytes + dense,
        routed_bytes=first.routed_bytes + routed,
    )
    return replace(traffic, host=host, gpus=(gpu, *traffic.gpus[1:]))
