"""Attention over caches of several widths and depths."""

from collections.abc import Iterator

from loadmaster.engine.timing import TimeAttention
from loadmaster.machine.measurements import AttentionTime
from loadmaster.model.quants import BY_NAME
from loadmaster.tasks.measuring.asking import RUNS, Ask, best
from loadmaster.tasks.measuring.scale import Scale
from loadmaster.units import MIB

# Type, head size, KV heads, query heads for each, tokens, cells.
_AttentionPoint = tuple[str, int, int, int, int, int]
_ATTENTION_POINTS: tuple[_AttentionPoint, ...] = (
    *(("f16", 128, 4, 4, 1, cells) for cells in (256, 1024, 4096)),
    # A wider cell: the rows of one head lie further apart.
    *(("f16", 128, 8, 4, 1, cells) for cells in (1024, 4096)),
    # A row for each head: the same arithmetic reads four times as much.
    *(("f16", 128, 8, 1, 1, cells) for cells in (1024, 4096)),
    *(("f16", 64, 8, 4, 1, cells) for cells in (256, 1024, 4096)),
    # A narrower cell.
    *(("f16", 64, 4, 4, 1, cells) for cells in (1024, 4096)),
    *(("f16", 128, 4, 4, 256, cells) for cells in (512, 4096)),
    ("f16", 64, 8, 4, 256, 512),
    *(("q8_0", 128, 4, 4, 1, cells) for cells in (256, 4096)),
    ("q8_0", 128, 4, 4, 256, 512),
)
_CACHE_BYTES = 128 * MIB  # all layers of a decode together
_HIDDEN_TOKENS = 8


def attention_times(ask: Ask, device: str, scale: Scale) -> Iterator[AttentionTime]:
    for point in _ATTENTION_POINTS:
        question = _attend(device, point, scale)
        seconds = best(ask(question))
        if seconds is not None:
            quant, head_dim, n_head_kv, heads_per_kv, n_tokens, n_cells = point
            per_layer = n_head_kv * heads_per_kv * head_dim * n_tokens * n_cells
            yield AttentionTime(
                type=quant,
                head_dim=head_dim,
                n_head_kv=n_head_kv,
                heads_per_kv=heads_per_kv,
                tokens=n_tokens,
                cells=n_cells,
                s_per_element=seconds / (per_layer * question.n_layers),
            )


def _attend(
    device: str, point: _AttentionPoint, scale: Scale, n_visible: int | None = None
) -> TimeAttention:
    """A decode goes over layers that overflow the caches; a prompt's arithmetic takes long enough
    in one."""
    quant, head_dim, n_head_kv, heads_per_kv, n_tokens, n_cells = point
    layer_bytes = 2 * BY_NAME[quant].row_bytes(head_dim) * n_head_kv * n_cells
    return TimeAttention(
        device=device,
        n_threads=scale.n_threads,
        type=quant,
        head_dim=head_dim,
        n_head=n_head_kv * heads_per_kv,
        n_head_kv=n_head_kv,
        n_cells=n_cells,
        n_tokens=n_tokens,
        n_visible=n_cells if n_visible is None else n_visible,
        n_layers=max(1, _CACHE_BYTES // layer_bytes) if n_tokens == 1 else 1,
        runs=RUNS,
    )


def hidden_cell_s(ask: Ask, device: str, scale: Scale) -> float | None:
    """What a cell of another sequence costs: attention that sees next to nothing."""
    point = ("f16", 128, 4, 4, _HIDDEN_TOKENS, 2048)
    question = _attend(device, point, scale, n_visible=1)
    seconds = best(ask(question))
    if seconds is None:
        return None
    passes = question.n_head * question.n_tokens * question.n_layers
    return seconds / (passes * question.n_cells)
