"""How much work fills a device for some tens of milliseconds."""

from dataclasses import dataclass

from loadmaster.units import GIB, MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much work fills a device for some tens of milliseconds."""

    n_in: int
    n_out: int
    weight_bytes: int  # more than the caches hold
    flops: float  # of one run at most
    n_threads: int


def cpu_scale(n_threads: int) -> Scale:
    """For processors: a run is about 50 ms on two cores, and shorter on more. Servers share caches
    of 260 MiB and more."""
    return Scale(n_in=2048, n_out=4096, weight_bytes=384 * MIB, flops=3e9, n_threads=n_threads)


CARD_SCALE = Scale(n_in=4096, n_out=8192, weight_bytes=GIB, flops=2e12, n_threads=0)
