"""`/metrics` in Prometheus' text format: requests, tokens, times, memory planned and measured."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from loadmaster import __version__
from loadmaster.tasks.measurement import TOTAL, MemoryRow
from loadmaster.tasks.serving.counts import TTFT_BOUNDS_S, Counts
from loadmaster.tasks.serving.host import Serving
from loadmaster.tasks.serving.types import ModelRow

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Labels = Mapping[str, str]
Sample = tuple[Labels, float]

_SUMS = {
    "prompt_tokens": "Prompt tokens of finished requests.",
    "cached_tokens": "Prompt tokens whose cells were still there.",
    "generated_tokens": "Generated tokens of finished requests.",
    "drafted_tokens": "Tokens that were fed as drafts.",
    "accepted_tokens": "Drafted tokens that were then generated.",
    "loads": "Times the model was loaded.",
    "deaths": "Times its worker died.",
    "evictions": "Times it made room for another model.",
    "refused": "Requests refused because the queue was full.",
}
_SECONDS = {
    "prefill_s": ("prefill_seconds", "Seconds from admission to the first token, summed."),
    "decode_s": ("decode_seconds", "Seconds from the first token to the last, summed."),
}


def render(
    serving: Serving,
    memory: Mapping[str, Sequence[MemoryRow]],
    *,
    statuses: Mapping[str, int] | None = None,
    items: Mapping[str, Mapping[str, int]] | None = None,
) -> str:
    """All metrics; `memory` has the rows of each open model, `statuses` counts batches, `items`
    their items by model and outcome."""
    lines: list[str] = []
    for metric in _metrics(serving, memory):
        lines += metric
    for metric in _batches(statuses or {}, items or {}):
        lines += metric
    return "\n".join(lines) + "\n"


def _metrics(serving: Serving, memory: Mapping[str, Sequence[MemoryRow]]) -> Iterator[list[str]]:
    rows = [model.row() for model in serving.models.values()]
    yield _family("build_info", "gauge", "The version.", [({"version": __version__}, 1)])
    yield _family("model_up", "gauge", "Whether the model is loaded.", _of(rows, _is_up))
    yield _family("requests_running", "gauge", "Requests with the worker.", _of(rows, _running))
    yield _family("requests_waiting", "gauge", "Requests that wait.", _of(rows, _waiting))
    yield _family("batch_items_running", "gauge", "Items with the worker.", _of(rows, _items))
    yield _family("requests_total", "counter", "Requests by how they ended.", _ends(serving))
    for name, text in _SUMS.items():
        yield _family(f"{name}_total", "counter", text, _counts(serving, name))
    for name, (shown, text) in _SECONDS.items():
        yield _family(f"{shown}_total", "counter", text, _counts(serving, name))
    yield _histogram(serving.counts)
    yield _family("memory_planned_bytes", "gauge", "Bytes in the plan's ledger.", _planned(memory))
    yield _family("memory_measured_bytes", "gauge", "Bytes as measured.", _measured(memory))
    yield _family("memory_budget_bytes", "gauge", "The cap on the process total.", _caps(memory))


def _batches(
    statuses: Mapping[str, int], items: Mapping[str, Mapping[str, int]]
) -> Iterator[list[str]]:
    samples: list[Sample] = [({"status": name}, n) for name, n in sorted(statuses.items())]
    yield _family("batches", "gauge", "Batches by their status.", samples)
    ends: list[Sample] = [
        ({"model": model, "outcome": outcome}, n)
        for model, counts in items.items()
        for outcome, n in sorted(counts.items())
    ]
    yield _family("batch_items_total", "counter", "Items of batches with a result.", ends)


def _is_up(row: ModelRow) -> float:
    return float(row.state == "ready")


def _running(row: ModelRow) -> float:
    return row.n_running


def _waiting(row: ModelRow) -> float:
    return row.n_waiting


def _items(row: ModelRow) -> float:
    return row.n_items


def _of(rows: Sequence[ModelRow], value: Callable[[ModelRow], float]) -> list[Sample]:
    return [({"model": row.id}, value(row)) for row in rows]


def _ends(serving: Serving) -> list[Sample]:
    return [
        ({"model": model, "finish_reason": reason}, count)
        for model, counts in serving.counts.items()
        for reason, count in sorted(counts.ends.items())
    ]


def _counts(serving: Serving, name: str) -> list[Sample]:
    return [({"model": model}, getattr(counts, name)) for model, counts in serving.counts.items()]


def _planned(memory: Mapping[str, Sequence[MemoryRow]]) -> list[Sample]:
    return [
        (_labels(model, row), row.planned_bytes) for model, rows in memory.items() for row in rows
    ]


def _measured(memory: Mapping[str, Sequence[MemoryRow]]) -> list[Sample]:
    return [
        (_labels(model, row), row.measured_bytes)
        for model, rows in memory.items()
        for row in rows
        if row.measured_bytes is not None
    ]


def _caps(memory: Mapping[str, Sequence[MemoryRow]]) -> list[Sample]:
    return [
        ({"model": model, "device": row.device}, row.cap_bytes)
        for model, rows in memory.items()
        for row in rows
        if row.kind == TOTAL and row.cap_bytes is not None
    ]


def _labels(model: str, row: MemoryRow) -> Labels:
    return {"model": model, "device": row.device, "kind": row.kind}


def _histogram(counts: Mapping[str, Counts]) -> list[str]:
    name = "loadmaster_ttft_seconds"
    lines = [f"# HELP {name} From arrival to the first text.", f"# TYPE {name} histogram"]
    for model, one in counts.items():
        for bound in TTFT_BOUNDS_S:
            labels = {"model": model, "le": f"{bound:g}"}
            lines.append(_line(f"{name}_bucket", labels, one.ttft_buckets[bound]))
        lines.append(_line(f"{name}_bucket", {"model": model, "le": "+Inf"}, one.ttft_count))
        lines.append(_line(f"{name}_sum", {"model": model}, one.ttft_s))
        lines.append(_line(f"{name}_count", {"model": model}, one.ttft_count))
    return lines


def _family(name: str, kind: str, text: str, samples: Sequence[Sample]) -> list[str]:
    full = f"loadmaster_{name}"
    head = [f"# HELP {full} {text}", f"# TYPE {full} {kind}"]
    return head + [_line(full, labels, value) for labels, value in samples]


def _line(name: str, labels: Labels, value: float) -> str:
    shown = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    return f"{name}{{{shown}}} {value:.10g}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
