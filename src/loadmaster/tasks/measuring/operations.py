"""What is neither products nor attention: small operations, copies, the link, and RAM."""

from loadmaster.engine.timing import TimeLink, TimeRead, TimeSmall
from loadmaster.tasks.measuring.asking import RUNS, Ask, best
from loadmaster.tasks.measuring.scale import CARD_SCALE, Scale
from loadmaster.units import MIB

_READ_BYTES = 256 * MIB
_LINK_BYTES = 256 * MIB


def small_s(ask: Ask, device: str, operation: str, scale: Scale) -> float | None:
    """Seconds per element of an operation over a prompt's activations."""
    width, n_tokens, n_ops = 2048, 512, 4
    seconds = best(
        ask(
            TimeSmall(
                device=device, n_threads=scale.n_threads, operation=operation, width=width,
                n_tokens=n_tokens, n_ops=n_ops, runs=RUNS,
            )
        )
    )  # fmt: skip
    return None if seconds is None else seconds / (width * n_tokens * n_ops)


def node_s(ask: Ask, device: str, scale: Scale) -> float | None:
    """Seconds for an operation on next to nothing: handing it out and waiting for all threads."""
    n_ops = 500
    seconds = best(
        ask(
            TimeSmall(
                device=device, n_threads=scale.n_threads, operation="gate", width=64, n_tokens=1,
                n_ops=n_ops, runs=RUNS,
            )
        )
    )  # fmt: skip
    return None if seconds is None else seconds / n_ops


def copy_bytes_s(ask: Ask, device: str, scale: Scale) -> float | None:
    """Bytes read and written per second inside a device."""
    width, n_tokens = 1 << 20, 64 if scale is CARD_SCALE else 8
    seconds = best(
        ask(
            TimeSmall(
                device=device, n_threads=scale.n_threads, operation="copy", width=width,
                n_tokens=n_tokens, n_ops=4, runs=RUNS,
            )
        )
    )  # fmt: skip
    return None if not seconds else 4 * 2 * 4 * width * n_tokens / seconds


def link_bytes_s(ask: Ask, device: str, *, pinned: bool) -> float | None:
    size = _LINK_BYTES
    seconds = best(ask(TimeLink(device=device, size_bytes=size, pinned=pinned, runs=RUNS)))
    return size / seconds if seconds else None


def ram_read(ask: Ask, n_threads: int) -> tuple[float, ...]:
    """Bytes per second that 1 … n threads read together; empty where it cannot be timed."""
    found = []
    for count in range(1, n_threads + 1):
        question = TimeRead(n_threads=count, size_bytes=_READ_BYTES, runs=RUNS)
        seconds = best(ask(question))
        if not seconds:
            return ()
        found.append(_READ_BYTES / seconds)
    return tuple(found)
